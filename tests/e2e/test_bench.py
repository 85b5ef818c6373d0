"""What the report asks of a server, asked of a real one: exact numbers of tokens, counts, and one stream beside others."""

import contextlib
from collections.abc import Iterator

import httpx
import pytest

from costeer_vllm.bench.load import Client, Incomplete
from costeer_vllm.demo.task import EVENTS
from costeer_vllm.processes import wait_until

from .conftest import Deployment

STEERING = {"worker": "open", "deadline_ms": 60_000}
WORDS = 13  # of the prompts that the client makes up: short ones, for the demo's tokenizer knows none of them
MESSAGES = [{"role": "user", "content": f"Write an invitation to the {EVENTS[2].name}."}]


@pytest.fixture
def client(deployment: Deployment) -> Iterator[Client]:
    with contextlib.closing(Client(deployment.server, WORDS, 4)) as client:
        yield client


def num_streams(deployment: Deployment) -> int:
    """That the hub holds as live."""
    answer = httpx.get(f"http://{deployment.server.hub}/healthz", trust_env=False)
    return int(answer.json()["streams"])


@pytest.mark.parametrize("fusion", ["cloud", "edge"])
def test_a_load_has_its_tokens_steered_and_counted(client: Client, fusion: str) -> None:
    result = client.load(3, 8, STEERING | {"fusion": fusion})
    assert (result.steered, result.missed) == (24, 0)
    assert result.tokens_per_s > 0
    assert result.step_ms > 0


def test_a_plain_load_has_no_counts(client: Client) -> None:
    result = client.load(2, 4)
    assert (result.steered, result.missed) == (0, 0)


def test_an_answer_is_that_of_any_client(deployment: Deployment, client: Client) -> None:
    reply, result = client.answer(MESSAGES, 48, STEERING | {"T": 1})
    asked = deployment.chat(MESSAGES[0]["content"], {"T": 1})
    assert reply.text == asked.choices[0].message.content
    assert reply.num_tokens == asked.usage.completion_tokens == result.steered


def test_a_companion_runs_beside_a_load_and_ends_with_it(deployment: Deployment, client: Client) -> None:
    with client.companion(STEERING, 300):
        assert num_streams(deployment) == 1
        assert client.load(2, 8, STEERING).missed == 0
        assert num_streams(deployment) == 1
    wait_until(lambda: num_streams(deployment) == 0, deployment.server, 30.0)


def test_a_companion_that_ends_too_early_is_told(client: Client) -> None:
    with pytest.raises(Incomplete, match="before"), client.companion(STEERING, 2):
        client.load(1, 32, STEERING)
