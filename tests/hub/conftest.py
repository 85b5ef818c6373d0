"""A hub for the tests of one module: they leave no worker, engine or stream behind."""

from collections.abc import Iterator

import pytest
from ends import RunningHub, eventually, running_hub


@pytest.fixture(scope="module")
def module_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHub]:
    with running_hub(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture
def hub(module_hub: RunningHub) -> Iterator[RunningHub]:
    yield module_hub
    eventually(lambda: module_hub.counts() == (0, 0, 0), "the hub being empty again")
