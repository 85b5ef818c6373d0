"""Exactness where GPUs run and a CPU server does not by itself: async scheduling, preemption, chunked prefill, TP = 2."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from costeer_vllm.processes import edge_worker, free_port, running, wait_until

from .conftest import EDGE_OPTIONS, RUNNERS
from .links import delayed, relay_to
from .reference import NUM_TOKENS, PARAMS, queries

NUM_QUERIES = 8


@pytest.fixture(scope="module")
def hub(pair_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A hub of its own, as COSTEER_HUB names it, with the edge worker ``open`` and, with a longer way, ``far``."""
    logs, port = tmp_path_factory.mktemp("logs-hub"), free_port()
    command = [sys.executable, "-m", "costeer_vllm.cli", "hub", "--port", str(port), "--engine-endpoint", f"ipc://{logs}/engines"]
    with running(command, logs / "hub.log", {}) as process:
        wait_until(lambda: "hub ready" in process.log_text, process)
        context = sorted((pair_folder / "contexts").glob("*.md"))[0]
        small = pair_folder / "small"
        with (
            edge_worker(f"127.0.0.1:{port}", "open", small, context, logs, EDGE_OPTIONS),
            relay_to(f"127.0.0.1:{port}") as relay,
            edge_worker(relay.address, "far", small, context, logs, EDGE_OPTIONS),
        ):
            relay.up = relay.down = delayed(0.05)
            yield f"127.0.0.1:{port}"


@pytest.fixture(scope="session")
def expected_in_turns(expected: list[list[int]], expected_of_candidates: list[list[int]]) -> list[list[int]]:
    """Cloud fusion and edge fusion by turns, as ``offline`` asks for them."""
    return [(expected_of_candidates if i % 2 else expected)[i] for i in range(NUM_QUERIES)]


def run_offline(
    folder: Path, hub: str, runner: str, multiprocessing: bool, environment: dict[str, str], workers: str = "open", **options: Any
) -> dict[str, Any]:
    variables = {
        **os.environ,
        **RUNNERS[runner],
        "COSTEER_HUB": hub,
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(multiprocessing)),
        "TORCHDYNAMO_DISABLE": "1",
        **environment,
    }
    arguments = {"queries": queries()[:NUM_QUERIES], "T": PARAMS.T, "num_tokens": NUM_TOKENS, **options}
    answer_file = folder / "answer.json"
    answer_file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.e2e.offline", str(folder), workers, json.dumps(arguments), str(answer_file)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    answer: dict[str, Any] = json.loads(answer_file.read_text())
    return answer


def counts(hub: str, number: int) -> tuple[int, int]:
    """Tokens steered and missed of the newest request of that number, summed over its restarts."""
    rows = httpx.get(f"http://{hub}/v1/streams/offline-{number}", trust_env=False).json()
    return rows["tokens_steered"], rows["tokens_missed"]


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "sync": {},
    "async": {"async_scheduling": True},
    "chunked prefill": {"max_num_batched_tokens": 24, "max_num_seqs": 8},
    "async, chunked prefill": {"async_scheduling": True, "max_num_batched_tokens": 24, "max_num_seqs": 8},
    "preemption": {"num_gpu_blocks_override": 16, "block_size": 32},
    "async, preemption": {"async_scheduling": True, "num_gpu_blocks_override": 16, "block_size": 32},
}


HELD = ("async, chunked prefill", "async, preemption")  # also with half of the requests at an edge worker that is held up


@pytest.mark.parametrize("runner", list(RUNNERS))
@pytest.mark.parametrize(
    ("name", "workers"), [*((name, "open") for name in CONFIGURATIONS), *((name, "open,far") for name in HELD)]
)
def test_tokens_equal_algorithm_1(
    pair_folder: Path, hub: str, expected_in_turns: list[list[int]], runner: str, name: str, workers: str
) -> None:
    before = [counts_or_zero(hub, i) for i in range(NUM_QUERIES)]
    answer = run_offline(pair_folder, hub, runner, False, {}, workers, **CONFIGURATIONS[name])
    assert answer["tokens"] == expected_in_turns
    assert (answer["preemptions"] > 0) == ("preemption" in name)
    for i in range(NUM_QUERIES):
        steered, missed = counts(hub, i)
        assert (steered - before[i][0], missed - before[i][1]) == (NUM_TOKENS, 0)


def counts_or_zero(hub: str, number: int) -> tuple[int, int]:
    answer = httpx.get(f"http://{hub}/v1/streams/offline-{number}", trust_env=False)
    return (0, 0) if answer.status_code == 404 else counts(hub, number)


@pytest.mark.parametrize("workers", ["open", "open,far"])
@pytest.mark.parametrize("runner", list(RUNNERS))
def test_two_tensor_parallel_ranks_choose_the_same_tokens(
    pair_folder: Path, hub: str, expected_in_turns: list[list[int]], runner: str, workers: str
) -> None:
    one_core_each = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    answer = run_offline(pair_folder, hub, runner, True, one_core_each, workers, tensor_parallel_size=2)
    assert answer["tokens"] == expected_in_turns
