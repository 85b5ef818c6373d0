"""Tensor parallelism over two real processes: all ranks add the same bits in the same step, whatever rank 0 got."""

import multiprocessing
import os
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from costeer_vllm.delta import encode_sparse
from costeer_vllm.protocol.messages import Begin, Choice, Delta, End, HubToEngine, Join, Message, Query
from costeer_vllm.request import SteeringRequest, to_extra_args

from .fake_hub import TIMEOUT_S, ExactEdges, FakeHub, choice_of, delta_of

VOCAB = 16
NAMES = ["silent", "dense", "broken", "chosen", "unoffered", "sparse"]  # a missing answer before each one that is there
AT_THE_EDGE = ("chosen", "unoffered")
CANDIDATES = 4
STEPS = 4
NUM_ROWS = len(NAMES) + 1  # one request is not steered

pytestmark = pytest.mark.timeout(TIMEOUT_S * 6)


def work(rank: int, store: str, endpoint: str, results: str) -> None:
    """One tensor-parallel worker: the processor under V1 for a few steps of one batch."""
    os.environ.update({"COSTEER_HUB": endpoint, "COSTEER_ATTACH_KEY": ""})
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import (
        destroy_distributed_environment,
        destroy_model_parallel,
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )
    from vllm.sampling_params import SamplingParams
    from vllm.v1.sample.logits_processor.interface import BatchUpdate

    from costeer_vllm.engine.processor import CoSteerLogitsProcessor

    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(2, rank, f"file://{store}", rank, "gloo")
        ensure_model_parallel_initialized(2, 1)
    config: Any = SimpleNamespace(model_config=SimpleNamespace(get_vocab_size=lambda: VOCAB))
    processor = CoSteerLogitsProcessor(config, torch.device("cpu"), False)
    batch: list[tuple[SamplingParams, list[int]]] = [(SamplingParams(), [])]
    for name in NAMES:
        fusion: Any = {"fusion": "edge", "candidates": CANDIDATES} if name in AT_THE_EDGE else {}
        deadline_ms = 100.0 if name == "silent" else 60_000.0
        request = SteeringRequest(name, "laptop", Query(prompt="Hello?"), 1.5, deadline_ms, "continue", **fusion)
        batch.append((SamplingParams(extra_args={"costeer": to_extra_args(request)}), []))
    processor.update_state(BatchUpdate(len(batch), [], [(row, own, [1], ids) for row, (own, ids) in enumerate(batch)], []))
    steps = []
    for step in range(STEPS):
        logits = torch.zeros(len(batch), VOCAB)
        logits[[row for row, name in enumerate(NAMES, 1) if name in AT_THE_EDGE], step : step + CANDIDATES] = 1.0
        processor.apply(logits)
        steps.append(logits.numpy())
        for _, ids in batch:
            ids.append(step)
        processor.update_state(None)
    processor.update_state(BatchUpdate(0, list(range(len(batch))), [], []))
    np.save(f"{results}/{rank}.npy", np.stack(steps))
    assert processor._table is not None
    processor._table.close()  # what it has sent is out before the process is
    destroy_model_parallel()  # threads of the group that are left at the end of a process abort it now and then
    destroy_distributed_environment()


def answer(exact: ExactEdges, message: Message) -> Iterable[HubToEngine]:
    for reply in exact(message):
        name = getattr(reply, "stream", "").partition(".")[0]
        if isinstance(reply, Choice) and name == "unoffered":
            yield Choice(reply.stream, reply.position, reply.prefix_hash, VOCAB - 1)
        elif not isinstance(reply, Delta) or name == "dense":
            yield reply
        elif name == "sparse":
            rows = np.log(np.random.default_rng(reply.position).dirichlet(np.ones(VOCAB), 2)).astype(np.float32)
            yield Delta(reply.stream, reply.position, reply.prefix_hash, encode_sparse(*rows, 1.5, max_entries=5))
        elif name == "broken":
            yield Delta(reply.stream, reply.position, reply.prefix_hash, b"no delta")


def test_two_ranks_add_the_same_bits(tmp_path: Path) -> None:
    exact = ExactEdges(VOCAB)
    hub = FakeHub(lambda message: answer(exact, message))
    spawn = multiprocessing.get_context("spawn")
    arguments = (str(tmp_path / "store"), hub.endpoint, str(tmp_path))
    workers = [spawn.Process(target=work, args=(rank, *arguments)) for rank in (0, 1)]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(TIMEOUT_S * 5)
            assert worker.exitcode == 0
        hub.wait_for(lambda received: sum(isinstance(message, End) for message in received) == len(NAMES))
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.kill()
        hub.close()
    first, second = (np.load(tmp_path / f"{rank}.npy") for rank in (0, 1))
    assert first.shape == (STEPS, NUM_ROWS, VOCAB)
    assert first.tobytes() == second.tobytes()
    assert len(hub.messages(Join)) == 1  # only rank 0 talks to the hub
    assert len(hub.messages(Begin)) == len(NAMES)
    assert exact.problems == []
    plain, silent, dense, broken, chosen, unoffered, sparse = first.transpose(1, 0, 2)
    assert not plain.any()
    assert not silent.any()
    assert not broken.any()
    for step in range(STEPS):
        np.testing.assert_allclose(dense[step], 1.5 * delta_of(range(step), VOCAB), rtol=1e-6)
        likeliest = range(step, step + CANDIDATES)
        assert np.flatnonzero(np.isfinite(chosen[step])).tolist() == [choice_of(range(step), likeliest)]
        assert np.flatnonzero(unoffered[step]).tolist() == list(likeliest)  # untouched
    assert (np.count_nonzero(sparse, axis=1) >= 4).all()
    counts = {end.stream.partition(".")[0]: (end.tokens_steered, end.tokens_missed) for end in hub.messages(End)}
    heard, missed = (4, 0), (0, 4)
    assert counts == {
        "dense": heard,
        "sparse": heard,
        "chosen": heard,
        "silent": missed,
        "broken": missed,
        "unoffered": missed,
    }
