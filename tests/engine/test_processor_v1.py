"""The processor under runner V1, fed by vLLM's own InputBatch; the edge workers answer exactly, so every row can be checked."""

import atexit
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality
from vllm.v1.sample.logits_processor.state import LogitsProcessors
from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch

from costeer_vllm.delta import encode_lossless
from costeer_vllm.engine import hooks
from costeer_vllm.engine.board import Board, Tickets
from costeer_vllm.engine.processor import CoSteerLogitsProcessor
from costeer_vllm.errors import InvalidParameter
from costeer_vllm.protocol.messages import (
    Advance,
    Begin,
    Candidates,
    Choice,
    Delta,
    End,
    Join,
    Joined,
    Message,
    Query,
    Sampling,
)
from costeer_vllm.protocol.stream import extend_hash
from costeer_vllm.request import SteeringRequest, to_extra_args

from .fake_hub import TIMEOUT_S, ExactEdges, FakeHub, choice_of, delta_of

VOCAB = 16
STOP = 15
STRENGTH = 1.5
EDGE: dict[str, Any] = {"fusion": "edge", "candidates": 5}
SWAP, UNIDIRECTIONAL = MoveDirectionality.SWAP, MoveDirectionality.UNIDIRECTIONAL

pytestmark = pytest.mark.timeout(TIMEOUT_S * 3)


def config() -> Any:
    return SimpleNamespace(model_config=SimpleNamespace(get_vocab_size=lambda: VOCAB))


def params(name: str | None = None, strength: float = STRENGTH, **fields: Any) -> SamplingParams:
    """Of a request steered under ``name``; of an ordinary one if None."""
    if name is None:
        return SamplingParams(stop_token_ids=[STOP])
    given = {"deadline_ms": 60_000.0, "on_missing": "continue", **fields}
    request = SteeringRequest(name, "laptop", Query(prompt="Hello?"), strength, **given)
    return SamplingParams(stop_token_ids=[STOP], extra_args={"costeer": to_extra_args(request)})


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    hub = FakeHub(ExactEdges(VOCAB))
    yield hub
    hub.close()


@pytest.fixture
def processor(
    hub: FakeHub, tensor_parallel_group: None, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> Iterator[CoSteerLogitsProcessor]:
    monkeypatch.setenv("COSTEER_HUB", hub.endpoint)
    monkeypatch.delenv("COSTEER_ATTACH_KEY", raising=False)
    processor = CoSteerLogitsProcessor(config(), torch.device("cpu"), False)
    yield processor
    leave(processor)


def accounts(hub: FakeHub) -> tuple[Counter[str], Counter[str]]:
    """Tokens steered and missed by request, over all of its streams."""
    steered: Counter[str] = Counter()
    missed: Counter[str] = Counter()
    for end in hub.messages(End):
        name = end.stream.rpartition(".")[0]
        steered[name] += end.tokens_steered
        missed[name] += end.tokens_missed
    return steered, missed


def leave(processor: CoSteerLogitsProcessor) -> None:
    """What happens at the end of the engine's process."""
    if processor._table is not None:
        atexit.unregister(processor._table.close)
        processor._table.close()


def hear_out(hub: FakeHub, processor: CoSteerLogitsProcessor) -> None:
    """Until the hub has heard all that the processor sent."""
    assert processor._table is not None
    assert processor._table._link is not None
    last = Join(-1)
    processor._table._link.send(last)
    hub.wait_for(lambda received: received[-1:] == [last])


def steer(processor: CoSteerLogitsProcessor, num_rows: int) -> torch.Tensor:
    """What ``apply`` adds to each row."""
    logits = torch.randn(num_rows, VOCAB)
    before = logits.clone()
    assert processor.apply(logits) is logits
    return logits - before


def expected(tokens: list[int], strength: float = STRENGTH) -> torch.Tensor:
    return torch.from_numpy(strength * delta_of(tokens, VOCAB))


def assert_steered(row: torch.Tensor, tokens: list[int], strength: float = STRENGTH) -> None:
    torch.testing.assert_close(row, expected(tokens, strength), rtol=1e-4, atol=1e-4)


def assert_chosen(row: torch.Tensor, before: torch.Tensor, tokens: list[int], num_candidates: int = 5) -> None:
    """The row of an edge-fused request: nothing is left but what the edge worker chose among the likeliest."""
    likeliest = before.topk(num_candidates).indices.sort().values.tolist()
    assert row.isfinite().nonzero().tolist() == [[choice_of(tokens, likeliest)]]


@dataclass
class Generation:
    """One request as the scheduler knows it."""

    name: str
    params: SamplingParams
    steered: bool
    is_edge_fused: bool = False
    chunks: int = 0  # steps of prefill left that choose no token
    tokens: list[int] = field(default_factory=list)
    stopped: bool = False


class Runner:
    """What GPUModelRunner does around InputBatch in one step, with or without async scheduling."""

    def __init__(self, processor: CoSteerLogitsProcessor, is_async: bool, rng: random.Random) -> None:
        self.processor, self.is_async, self.rng = processor, is_async, rng
        self.batch = InputBatch(
            max_num_reqs=8,
            max_model_len=64,
            max_num_batched_tokens=64,
            device=torch.device("cpu"),
            vocab_size=VOCAB,
            block_sizes=[16],
            max_num_blocks_per_req=[8],
            logitsprocs=LogitsProcessors([processor]),
            logitsprocs_need_output_token_ids=True,  # as for a processor that is named on the command line
        )
        self.states: dict[str, CachedRequestState] = {}
        self.steered_rows = [0, 0]  # fused in the cloud, at the edge

    def step(self, scheduled: list[Generation]) -> None:
        """One step in which these requests are scheduled, and all others are not."""
        self.update_states({generation.name: generation for generation in scheduled})
        self.batch.refresh_metadata()
        generator = torch.Generator().manual_seed(self.rng.getrandbits(32))
        logits = torch.randn(self.batch.num_reqs, VOCAB, generator=generator)
        before = logits.clone()
        self.batch.update_async_output_token_ids()
        rows = [next(g for g in scheduled if g.name == name) for name in self.batch.req_ids]
        mask = SimpleNamespace(np=np.array([g.chunks > 0 for g in rows] + [True] * 3))
        runner = SimpleNamespace(input_batch=self.batch, discard_request_mask=mask)
        hooks._sample(lambda _: self.processor.apply(logits), runner)  # as it is wrapped around the runner's own
        for row, generation in enumerate(rows):
            if not generation.steered or generation.chunks:
                assert torch.equal(logits[row], before[row])
            elif not generation.stopped:
                if generation.is_edge_fused:
                    assert_chosen(logits[row], before[row], generation.tokens)
                else:
                    assert_steered(logits[row] - before[row], generation.tokens)
                self.steered_rows[generation.is_edge_fused] += 1
        self.sample(rows, logits)

    def update_states(self, scheduled: dict[str, Generation]) -> None:
        for name in list(self.batch.req_id_to_index):
            if name not in scheduled:
                self.batch.remove_request(name)
        for name, generation in scheduled.items():
            if name in self.batch.req_id_to_index:
                continue
            if name not in self.states:
                no_cache: Any = {"mm_features": [], "generator": None, "block_ids": ([0],), "num_computed_tokens": 0}
                self.states[name] = CachedRequestState(
                    req_id=name, prompt_token_ids=[1, 2], sampling_params=generation.params, output_token_ids=[], **no_cache
                )
            elif self.is_async:  # the worker's own list may end in placeholders
                self.states[name].output_token_ids = list(generation.tokens)
            self.batch.add_request(self.states[name])
        self.batch.condense()
        if self.batch.num_reqs > 1 and self.rng.random() < 0.5:  # as attention backends do
            self.batch.swap_states(*self.rng.sample(range(self.batch.num_reqs), 2))

    def sample(self, rows: list[Generation], logits: torch.Tensor) -> None:
        sampled = [STOP if self.rng.random() < 0.1 else self.rng.randrange(STOP) for _ in rows]
        for row, generation in enumerate(rows):
            if generation.is_edge_fused:
                sampled[row] = int(logits[row].argmax())
        kept: dict[str, int] = {}
        for row, generation in enumerate(rows):
            if generation.chunks:
                generation.chunks -= 1
                continue
            kept[generation.name] = row
            self.states[generation.name].output_token_ids.append(-1 if self.is_async else sampled[row])
            if not generation.stopped:  # else it is the step past a stop token, and thrown away
                generation.tokens.append(sampled[row])
                generation.stopped = sampled[row] == STOP
        if self.is_async:
            self.batch.prev_req_id_to_index = kept
            done: Any = SimpleNamespace(synchronize=lambda: None)
            self.batch.set_async_sampled_token_ids(torch.tensor(sampled).reshape(-1, 1), done)


GARBAGE: list[Any] = [None, 5, "x", [], {}, {"request": "r"}, {"strength": float("nan")}, b"\xff", {1: 2}]


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_every_row_of_every_step_gets_its_own_delta(
    processor: CoSteerLogitsProcessor, hub: FakeHub, log: pytest.LogCaptureFixture, seed: int, is_async: bool
) -> None:
    """Requests come, wait, are preempted, swapped, moved and stopped at random."""
    rng = random.Random(seed)
    runner = Runner(processor, is_async, rng)
    alive: list[Generation] = []
    finished: list[Generation] = []
    stopping: list[Generation] = []
    for number in range(40):
        while len(alive) < 6 and rng.random() < 0.5:
            steered, is_edge_fused = rng.choice([(False, False), (True, False), (True, True)])
            name = f"r{number}-{len(alive)}"
            own = params(name if steered else None, **EDGE if is_edge_fused else {})
            if not steered and rng.random() < 0.5:
                own.extra_args = {"costeer": rng.choice(GARBAGE)}
            alive.append(Generation(name, own, steered, is_edge_fused, chunks=rng.choice([0, 0, 1, 2])))
        waiting = [g for g in alive if g.tokens and not g.stopped and rng.random() < 0.2]
        runner.step([g for g in alive if g not in waiting])
        # Without async scheduling a stop is seen before the next step, with it one step later.
        leaving = stopping if is_async else [g for g in alive if g.stopped]
        stopping = [g for g in alive if g.stopped and g not in leaving]
        leaving += [g for g in alive if len(g.tokens) > 8 and g not in leaving and not g.stopped]
        finished += leaving
        alive = [g for g in alive if g not in leaving]
        stopping = [g for g in stopping if g in alive]
    if is_async:
        runner.step(alive)  # the one past each stop token that the last step chose
    runner.step([])
    hear_out(hub, processor)
    edges = hub.answer
    assert isinstance(edges, ExactEdges)
    assert edges.problems == []
    assert edges.prefixes == {}
    assert sum(runner.steered_rows) > 30
    assert min(runner.steered_rows) >= 3
    steered, missed = accounts(hub)
    assert sum(missed.values()) == 0
    for generation in [*finished, *alive] if not is_async else finished:
        assert steered[generation.name] == (len(generation.tokens) if generation.steered else 0), generation
    assert "Traceback" not in log.text


def added(row: int, own: SamplingParams, output_ids: list[int]) -> Any:
    return (row, own, [1, 2], output_ids)


def update(*, add: list[Any] | None = None, removed: list[int] | None = None, moved: list[Any] | None = None) -> BatchUpdate:
    return BatchUpdate(4, removed or [], add or [], moved or [])


def test_a_steered_row_among_others(processor: CoSteerLogitsProcessor) -> None:
    processor.update_state(update(add=[added(0, params(), []), added(1, params("a"), []), added(2, params("b", -0.5), [4])]))
    difference = steer(processor, 4)
    assert torch.equal(difference[0], torch.zeros(VOCAB))
    assert torch.equal(difference[3], torch.zeros(VOCAB))
    assert_steered(difference[1], [])
    assert_steered(difference[2], [4], -0.5)


def test_nothing_steered_costs_no_hub(processor: CoSteerLogitsProcessor, hub: FakeHub) -> None:
    processor.update_state(update(add=[added(0, params(), [])]))
    processor.update_state(None)
    assert torch.equal(steer(processor, 1), torch.zeros(1, VOCAB))
    assert processor._table is None


def test_a_row_that_is_taken_over_without_being_removed(processor: CoSteerLogitsProcessor, hub: FakeHub) -> None:
    old, new = [3], [5]
    processor.update_state(update(add=[added(0, params("old"), old)]))
    steer(processor, 1)
    old.append(4)
    processor.update_state(update(add=[added(0, params("new"), new)]))
    assert_steered(steer(processor, 1)[0], [5])
    hear_out(hub, processor)
    assert accounts(hub) == ({"old": 1}, {"old": 0})


def test_a_row_that_is_taken_over_by_an_ordinary_request(processor: CoSteerLogitsProcessor, hub: FakeHub) -> None:
    processor.update_state(update(add=[added(0, params("old"), [])]))
    processor.update_state(update(add=[added(0, params(), [])]))
    assert torch.equal(steer(processor, 1), torch.zeros(1, VOCAB))
    hear_out(hub, processor)


def test_moves_and_swaps(processor: CoSteerLogitsProcessor, hub: FakeHub) -> None:
    a, b, c = [1], [2], [3]
    processor.update_state(update(add=[added(0, params("a"), a), added(1, params(), []), added(2, params("b"), b)]))
    assert_steered(steer(processor, 3)[2], [2])
    a.append(4)
    b.append(5)
    processor.update_state(update(moved=[(0, 1, SWAP), (1, 2, SWAP)]))  # ordinary, b, a
    difference = steer(processor, 3)
    assert torch.equal(difference[0], torch.zeros(VOCAB))
    assert_steered(difference[1], [2, 5])
    assert_steered(difference[2], [1, 4])
    b.append(6)
    # Row 0 was removed, but is not listed, since row 2 takes its place; b's place is taken by c.
    processor.update_state(update(add=[added(1, params("c"), c)], moved=[(2, 0, UNIDIRECTIONAL)]))
    difference = steer(processor, 2)
    assert_steered(difference[0], [1, 4])
    assert_steered(difference[1], [3])
    processor.update_state(update(moved=[(1, 0, UNIDIRECTIONAL)]))
    assert_steered(steer(processor, 1)[0], [3])
    processor.update_state(update(removed=[0]))
    hear_out(hub, processor)
    assert accounts(hub)[0] == {"a": 1, "b": 2, "c": 0}


def test_streams_that_no_further_step_ends_are_reported_at_the_end(processor: CoSteerLogitsProcessor, hub: FakeHub) -> None:
    tokens: list[int] = []
    processor.update_state(update(add=[added(0, params("a"), tokens)]))
    steer(processor, 1)
    tokens.append(3)
    processor.update_state(None)
    steer(processor, 1)
    leave(processor)
    hub.wait_for(lambda received: isinstance(received[-1], End))
    assert accounts(hub)[0] == {"a": 2}


def test_a_resumed_request_goes_on_where_it_was(processor: CoSteerLogitsProcessor, hub: FakeHub) -> None:
    tokens: list[int] = []
    processor.update_state(update(add=[added(0, params("a"), tokens)]))
    steer(processor, 1)
    tokens.append(3)
    processor.update_state(update(removed=[0]))
    tokens_again = list(tokens)
    processor.update_state(update(add=[added(0, params("a"), tokens_again)]))
    assert_steered(steer(processor, 1)[0], [3])
    tokens_again.append(4)
    processor.update_state(update(removed=[0]))
    hear_out(hub, processor)
    assert [begin.tokens for begin in hub.messages(Begin)] == [[], [3]]
    assert accounts(hub)[0] == {"a": 2}


def test_chunks_of_a_prefill_neither_advance_nor_count(processor: CoSteerLogitsProcessor, hub: FakeHub) -> None:
    tokens: list[int] = []
    processor.update_state(update(add=[added(0, params("a"), tokens)]))
    for _ in range(3):
        assert_steered(steer(processor, 1)[0], [])
        processor.update_state(None)
    tokens.append(9)
    processor.update_state(update(removed=[0]))
    hear_out(hub, processor)
    assert accounts(hub)[0] == {"a": 1}
    assert hub.messages(Advance) == []


def test_a_request_aborted_in_its_prefill_counts_nothing(processor: CoSteerLogitsProcessor, hub: FakeHub) -> None:
    processor.update_state(update(add=[added(0, params("a"), [])]))
    steer(processor, 1)
    processor.update_state(update(removed=[0]))
    hear_out(hub, processor)
    assert accounts(hub) == ({"a": 0}, {"a": 0})


def test_a_placeholder_is_not_sent_and_its_row_not_steered_until_the_id_is_known(
    processor: CoSteerLogitsProcessor, hub: FakeHub
) -> None:
    """The delta of the shorter prefix is at hand, and must not be used for the longer one."""
    tokens: list[int] = []
    processor.update_state(update(add=[added(0, params("a"), tokens), added(1, params("b"), [])]))
    steer(processor, 2)
    tokens.append(-1)
    processor.update_state(None)
    difference = steer(processor, 2)
    assert torch.equal(difference[0], torch.zeros(VOCAB))
    assert_steered(difference[1], [])
    tokens[:] = [3, -1]
    processor.update_state(None)
    assert torch.equal(steer(processor, 2)[0], torch.zeros(VOCAB))
    tokens[:] = [3, 4]
    assert_steered(steer(processor, 2)[0], [3, 4])
    tokens.append(5)
    processor.update_state(update(removed=[0, 1]))
    hear_out(hub, processor)
    assert accounts(hub) == ({"a": 2, "b": 0}, {"a": 1, "b": 0})


def test_a_request_that_comes_with_placeholders_begins_with_what_is_known(
    processor: CoSteerLogitsProcessor, hub: FakeHub
) -> None:
    tokens = [3, -1]
    processor.update_state(update(add=[added(0, params("a"), tokens)]))
    assert torch.equal(steer(processor, 1), torch.zeros(1, VOCAB))
    tokens[1] = 4
    assert_steered(steer(processor, 1)[0], [3, 4])
    assert [begin.tokens for begin in hub.messages(Begin)] == [[3]]


def test_tokens_that_the_runner_takes_back(processor: CoSteerLogitsProcessor, hub: FakeHub) -> None:
    """After a failed load of KV cache vLLM shortens the list in place and generates those tokens again, perhaps others."""
    tokens: list[int] = []
    processor.update_state(update(add=[added(0, params("a"), tokens)]))
    for token in (1, 2, 3):
        steer(processor, 1)
        tokens.append(token)
        processor.update_state(None)
    del tokens[1:]
    processor.update_state(None)
    assert_steered(steer(processor, 1)[0], [1])
    tokens.append(9)
    processor.update_state(None)
    assert_steered(steer(processor, 1)[0], [1, 9])
    assert [begin.tokens for begin in hub.messages(Begin)] == [[], [1]]


def test_a_silent_edge_worker_leaves_its_row_alone_and_is_counted(hub: FakeHub, processor: CoSteerLogitsProcessor) -> None:
    exact = hub.answer
    hub.answer = lambda message: [] if getattr(message, "stream", "").startswith("silent") else exact(message)
    silent, good = [], []
    request = params("silent", deadline_ms=1.0)
    processor.update_state(update(add=[added(0, request, silent), added(1, params("good"), good)]))
    for token in range(3):
        difference = steer(processor, 2)
        assert torch.equal(difference[0], torch.zeros(VOCAB))
        assert_steered(difference[1], good)
        silent.append(token)
        good.append(token)
        processor.update_state(None)
    processor.update_state(update(removed=[0, 1]))
    hear_out(hub, processor)
    assert accounts(hub) == ({"silent": 0, "good": 3}, {"silent": 3, "good": 0})


def test_masked_logits_stay_masked_and_nothing_becomes_nan(hub: FakeHub, processor: CoSteerLogitsProcessor) -> None:
    def extreme(message: Message) -> list[Any]:
        if isinstance(message, Begin):
            values = np.resize(np.array([10_000, -10_000], np.float32), VOCAB)
            return [Delta(message.stream, 0, 0, encode_lossless(values))]
        return [Joined("x")] if isinstance(message, Join) else []

    hub.answer = extreme
    processor.update_state(update(add=[added(0, params("a", 1000.0), [])]))
    logits = torch.full((1, VOCAB), -torch.inf)
    logits[0, 3] = 0.0
    processor.apply(logits)
    assert logits[0, 3] == -1e7
    assert torch.isneginf(torch.cat([logits[0, :3], logits[0, 4:]])).all()


# Edge fusion


def edges_of(hub: FakeHub) -> ExactEdges:
    assert isinstance(hub.answer, ExactEdges)
    return hub.answer


def test_a_begin_says_how_to_draw(processor: CoSteerLogitsProcessor, hub: FakeHub) -> None:
    own = params("a", confidence=0.9, max_bits=12.0, rounding=0.25, **EDGE)
    own.temperature, own.top_p, own.top_k, own.min_p, own.seed = 0.7, 0.9, 20, 0.1, 5
    everything = params("b", **EDGE)
    everything.top_k = -1  # all, in vLLM's words
    processor.update_state(update(add=[added(0, own, [4]), added(1, everything, []), added(2, params("c"), [])]))
    hear_out(hub, processor)
    assert [begin.sampling for begin in hub.messages(Begin)] == [Sampling(0.7, 0.9, 20, 0.1, 5, 0.9, 12.0), Sampling(), None]


def test_plain_cloud_fused_and_edge_fused_rows_in_one_batch(processor: CoSteerLogitsProcessor, hub: FakeHub) -> None:
    tokens: dict[str, list[int]] = {name: [] for name in ("cloud", "edge", "few")}
    processor.update_state(
        update(
            add=[
                added(0, params("edge", **EDGE), tokens["edge"]),
                added(1, params(), []),
                added(2, params("cloud"), tokens["cloud"]),
                added(3, params("few", fusion="edge", candidates=2), tokens["few"]),
            ]
        )
    )
    for step in range(4):
        logits = torch.randn(5, VOCAB)
        before = logits.clone()
        assert processor.apply(logits) is logits
        assert_chosen(logits[0], before[0], tokens["edge"])
        assert_chosen(logits[3], before[3], tokens["few"], 2)
        assert_steered(logits[2] - before[2], tokens["cloud"])
        assert torch.equal(logits[[1, 4]], before[[1, 4]])
        for name, row in (("cloud", 2), ("edge", 0), ("few", 3)):
            tokens[name].append(int(logits[row].argmax()))
        processor.update_state(None)
        stream = next(stream for stream in edges_of(hub).offers if stream.startswith("edge"))
        (base,) = edges_of(hub).offers[stream][step:]
        np.testing.assert_allclose(base.log_probs, before[0].double().log_softmax(-1)[base.ids].numpy(), atol=1e-5)
    processor.update_state(update(removed=[0, 2, 3]))
    hear_out(hub, processor)
    assert edges_of(hub).problems == []
    assert len(hub.messages(Candidates)) == 8
    assert accounts(hub) == ({"cloud": 4, "edge": 4, "few": 4}, {"cloud": 0, "edge": 0, "few": 0})


def test_candidates_are_rounded_as_the_request_asks(processor: CoSteerLogitsProcessor, hub: FakeHub) -> None:
    processor.update_state(update(add=[added(0, params("a", rounding=0.5, **EDGE), [])]))
    processor.apply(torch.randn(1, VOCAB))
    ((base,),) = edges_of(hub).offers.values()
    assert (base.log_probs % 0.5 == 0).all()


def test_candidates_are_of_the_logits_that_will_be_sampled_from(processor: CoSteerLogitsProcessor, hub: FakeHub) -> None:
    """V1 applies penalties after the logits processors."""
    own = params("a", fusion="edge", candidates=VOCAB)
    own.repetition_penalty, own.frequency_penalty, own.presence_penalty = 2.0, 0.5, 0.25
    output_ids = [3, 3, 5]
    processor.update_state(update(add=[(0, own, [2, 3], output_ids), added(1, params(), [])]))
    processor.update_state(update(moved=[(0, 1, SWAP)]))
    logits = torch.randn(2, VOCAB)
    penalized = logits[1].double()
    for token in (2, 3, 5):
        penalized[token] *= 0.5 if penalized[token] > 0 else 2.0
    penalized[3] -= 2 * 0.5 + 0.25
    penalized[5] -= 0.5 + 0.25
    processor.apply(logits)
    ((base,),) = edges_of(hub).offers.values()
    np.testing.assert_allclose(base.log_probs, penalized.log_softmax(-1)[base.ids].numpy(), atol=1e-5)
    assert logits[1].isfinite().sum() == 1


def test_only_what_a_grammar_allows_is_offered(processor: CoSteerLogitsProcessor, hub: FakeHub) -> None:
    processor.update_state(update(add=[added(0, params("a", **EDGE), [])]))
    logits = torch.full((1, VOCAB), -torch.inf)
    logits[0, [4, 9]] = torch.tensor([0.1, 0.2])
    processor.apply(logits)
    ((base,),) = edges_of(hub).offers.values()
    assert base.ids.tolist() == [4, 9]
    assert logits.isfinite().nonzero().tolist() == [[0, choice_of([], [4, 9])]]


def test_a_row_without_a_distribution_is_neither_offered_nor_waited_for(processor: CoSteerLogitsProcessor, hub: FakeHub) -> None:
    tokens: list[int] = []
    processor.update_state(update(add=[added(0, params("bad", **EDGE), tokens), added(1, params("good", **EDGE), [])]))
    logits = torch.randn(2, VOCAB)
    logits[0, 3] = torch.nan
    before = logits.clone()
    processor.apply(logits)  # a wait of a minute would fail the test
    assert torch.equal(logits[0].isnan(), before[0].isnan())
    assert_chosen(logits[1], before[1], [])
    processor.update_state(update(removed=[0, 1]))
    hear_out(hub, processor)
    assert [offer.stream.partition(".")[0] for offer in hub.messages(Candidates)] == ["good"]


def test_a_row_without_a_distribution_fails_where_a_choice_is_asked_for(processor: CoSteerLogitsProcessor) -> None:
    processor.update_state(update(add=[added(0, params("bad", on_missing="wait", **EDGE), [])]))
    processor.apply(torch.full((1, VOCAB), torch.nan))
    failure = processor._rows[0].stream.failure
    assert failure is not None
    assert "gives no token a probability" in failure


def test_rows_that_change_places_as_they_come_back_keep_their_streams(
    processor: CoSteerLogitsProcessor, hub: FakeHub, tmp_path: Path
) -> None:
    """All were preempted at once; vLLM lists a row that another request takes in the same update in no ``removed``."""
    processor._board = board = Board(tmp_path / "board")
    tickets = Tickets(board)
    own = {name: params(name, ticket=tickets.issue()) for name in "abc"}
    tokens: dict[str, list[int]] = {name: [] for name in "abc"}
    processor.update_state(update(add=[added(row, own[name], tokens[name]) for row, name in enumerate("cab")]))
    steer(processor, 3)
    for ids in tokens.values():
        ids.append(1)
    processor.update_state(None)
    processor.update_state(update(add=[added(row, own[name], tokens[name]) for row, name in enumerate("abc")]))
    for row in steer(processor, 3):
        assert_steered(row, [1])
    assert len(hub.messages(Begin)) == 3
    for name in "abc":
        tickets.withdraw(own[name].extra_args["costeer"]["ticket"])
    processor.update_state(update(removed=[0, 1, 2]))
    hear_out(hub, processor)
    assert len(hub.messages(End)) == 3
    assert processor._table is not None
    assert len(processor._table) == 0


def test_chunks_of_a_prefill_neither_ask_nor_wait(processor: CoSteerLogitsProcessor, hub: FakeHub) -> None:
    exact = hub.answer
    hub.answer = lambda message: []  # whoever waits now waits for a minute
    tokens: list[int] = []
    processor.update_state(update(add=[added(0, params("edge", **EDGE), tokens), added(1, params("cloud"), [])]))
    for _ in range(3):
        processor.unfinished_rows = frozenset({0, 1})
        assert torch.equal(steer(processor, 2), torch.zeros(2, VOCAB))
        processor.update_state(None)
    hear_out(hub, processor)
    assert hub.messages(Candidates) == []
    for begin in hub.messages(Begin):
        hub.send(*exact(begin))
    hub.answer = exact
    processor.unfinished_rows = frozenset({1})
    logits = torch.randn(2, VOCAB)
    before = logits.clone()
    processor.apply(logits)
    assert_chosen(logits[0], before[0], [])
    assert torch.equal(logits[1], before[1])
    tokens.append(int(logits[0].argmax()))
    processor.unfinished_rows = frozenset()
    processor.update_state(None)
    processor.apply(logits := torch.randn(2, VOCAB))
    assert logits[0].isfinite().sum() == 1
    processor.update_state(update(removed=[0, 1]))
    hear_out(hub, processor)
    assert accounts(hub) == ({"edge": 1, "cloud": 0}, {"edge": 0, "cloud": 0})


def test_which_rows_are_chunks_is_told_before_they_are_sampled() -> None:
    ours = SimpleNamespace(unfinished_rows=frozenset({7}), steered_rows={1}, taken_back_rows=frozenset())
    other = SimpleNamespace()
    batch = SimpleNamespace(num_reqs=3, generators={}, logitsprocs=SimpleNamespace(non_argmax_invariant=[other, ours]))
    mask = SimpleNamespace(np=np.array([True, False, True, True]))  # the last is left over from a larger batch
    runner = SimpleNamespace(input_batch=batch, discard_request_mask=mask)
    seen = hooks._sample(lambda runner, logits, spec=None: (ours.unfinished_rows, logits, spec), runner, "logits", spec=1)
    assert seen == (frozenset({0, 2}), "logits", 1)
    assert not hasattr(other, "unfinished_rows")


def test_a_seeded_row_whose_token_is_taken_back_draws_the_same_number_again() -> None:
    steered, kept, plain = (torch.Generator().manual_seed(seed) for seed in (1, 2, 3))
    ours = SimpleNamespace(unfinished_rows=frozenset(), steered_rows={0, 1, 9}, taken_back_rows=frozenset())
    generators = {0: steered, 1: kept, 2: plain}
    batch = SimpleNamespace(num_reqs=3, generators=generators, logitsprocs=SimpleNamespace(non_argmax_invariant=[ours]))
    runner = SimpleNamespace(input_batch=batch, discard_request_mask=SimpleNamespace(np=np.zeros(3, bool)))

    def draw(runner: Any) -> list[float]:
        ours.taken_back_rows = taken_back
        return [float(torch.rand(1, generator=generator)) for generator in generators.values()]

    taken_back = frozenset({0})
    first = hooks._sample(draw, runner)
    taken_back = frozenset()
    second = hooks._sample(draw, runner)
    assert second[0] == first[0]
    assert (second[1] != first[1], second[2] != first[2]) == (True, True)


@pytest.mark.parametrize("asked", [{"prompt_logprobs": 0}, {"prompt_logprobs": 5}])
def test_prompt_log_probabilities_are_refused_for_a_steered_request(asked: dict[str, int]) -> None:
    steered = params("a")
    steered.prompt_logprobs = asked["prompt_logprobs"]
    with pytest.raises(InvalidParameter, match=f"prompt_logprobs is {asked['prompt_logprobs']}"):
        CoSteerLogitsProcessor.validate_params(steered)
    CoSteerLogitsProcessor.validate_params(SamplingParams(**asked))


def test_a_token_that_was_not_offered_is_not_forced(processor: CoSteerLogitsProcessor, hub: FakeHub) -> None:
    def rogue(message: Message) -> list[Any]:
        if isinstance(message, Candidates):
            return [Choice(message.stream, message.position, message.prefix_hash, VOCAB + message.position)]
        return [Joined("x")] if isinstance(message, Join) else []

    hub.answer = rogue
    tokens: list[int] = []
    processor.update_state(update(add=[added(0, params("a", **EDGE), tokens)]))
    for token in range(3):
        assert torch.equal(steer(processor, 1), torch.zeros(1, VOCAB))
        tokens.append(token)
        processor.update_state(None)
    processor.update_state(update(removed=[0]))
    hear_out(hub, processor)
    assert accounts(hub) == ({"a": 0}, {"a": 3})


def test_a_device_that_is_gone_costs_no_further_look_at_the_vocabulary(
    processor: CoSteerLogitsProcessor, hub: FakeHub, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    exact = hub.answer
    hub.answer = lambda message: (
        [End(message.stream, "detached")] if isinstance(message, Candidates) and message.position else exact(message)
    )
    tokens: list[int] = []
    processor.update_state(update(add=[added(0, params("a", **EDGE), tokens)]))
    for token in range(4):
        if token == 2:
            monkeypatch.setattr("costeer_vllm.engine.processor.base_policies", None)
        logits = torch.randn(1, VOCAB)
        processor.apply(logits)
        assert logits.isfinite().sum() == (1 if token == 0 else VOCAB)
        tokens.append(int(logits.argmax()))
        processor.update_state(None)
    assert "failed" not in log.text
    processor.update_state(update(removed=[0]))
    hear_out(hub, processor)
    assert accounts(hub) == ({"a": 1}, {"a": 3})


def test_a_silent_device_leaves_its_row_to_the_base_policy(processor: CoSteerLogitsProcessor, hub: FakeHub) -> None:
    exact = hub.answer
    hub.answer = lambda message: [] if isinstance(message, Candidates) else exact(message)
    tokens: list[int] = []
    processor.update_state(update(add=[added(0, params("a", deadline_ms=1.0, **EDGE), tokens)]))
    for token in range(3):
        assert torch.equal(steer(processor, 1), torch.zeros(1, VOCAB))
        tokens.append(token)
        processor.update_state(None)
    processor.update_state(update(removed=[0]))
    hear_out(hub, processor)
    assert len(hub.messages(Candidates)) == 3  # asked at every position all the same: it may come back
    assert accounts(hub) == ({"a": 0}, {"a": 3})


def test_an_edge_fused_request_whose_tokens_are_taken_back_begins_again_at_the_edge(
    processor: CoSteerLogitsProcessor, hub: FakeHub
) -> None:
    own = params("a", fusion="edge", candidates=VOCAB)
    own.frequency_penalty = 1.0
    tokens: list[int] = []
    processor.update_state(update(add=[added(0, own, tokens)]))
    for _ in range(3):
        processor.apply(logits := torch.zeros(1, VOCAB))
        tokens.append(int(logits.argmax()))
        processor.update_state(None)
    del tokens[1:]
    processor.update_state(None)
    processor.apply(logits := torch.zeros(1, VOCAB))
    assert logits.isfinite().nonzero().tolist() == [[0, choice_of(tokens, range(VOCAB))]]
    assert [(begin.tokens, begin.sampling) for begin in hub.messages(Begin)] == [([], Sampling()), (tokens, Sampling())]
    base = next(iter(edges_of(hub).offers.values()))[0]
    assert base.ids[base.log_probs.argmin()] == tokens[0], "penalties go on as well"


# Hooks never raise


@pytest.mark.parametrize("value", GARBAGE, ids=repr)
def test_garbage_is_refused_at_the_front_end_and_ignored_in_the_engine(processor: CoSteerLogitsProcessor, value: Any) -> None:
    own = SamplingParams(extra_args={"costeer": value})
    with pytest.raises(InvalidParameter):
        processor.validate_params(own)
    processor.update_state(update(add=[added(0, own, []), added(1, params("good"), [])]))
    difference = steer(processor, 2)
    assert torch.equal(difference[0], torch.zeros(VOCAB))
    assert_steered(difference[1], [])


def test_parameters_without_steering_are_none_of_ours(processor: CoSteerLogitsProcessor) -> None:
    for extra_args in (None, {}, {"other": 1}):
        processor.validate_params(SamplingParams(extra_args=extra_args))
    processor.validate_params(params("a"))


def test_vllms_log_line_of_a_request_shows_no_query() -> None:
    assert "Hello?" not in repr(params("a"))
    assert "laptop" in repr(params("a"))


def test_extra_args_of_any_type_do_no_harm(processor: CoSteerLogitsProcessor) -> None:
    strange = [SamplingParams() for _ in range(3)]
    for own, extra_args in zip(strange, [5, "costeer", ["costeer"]], strict=True):
        own.extra_args = extra_args  # type: ignore[assignment]
    processor.update_state(update(add=[added(row, own, []) for row, own in enumerate([*strange, params("good")])]))
    assert_steered(steer(processor, 4)[3], [])


def test_a_failure_in_a_hook_stops_steering_and_nothing_else(
    processor: CoSteerLogitsProcessor, hub: FakeHub, log: pytest.LogCaptureFixture
) -> None:
    tokens: list[int] = []
    processor.update_state(update(add=[added(0, params(), []), added(1, params("a"), tokens)]))
    assert_steered(steer(processor, 2)[1], [])
    tokens.append(3)
    processor.update_state(None)
    logits = torch.zeros(2, VOCAB, dtype=torch.float64)  # not what vLLM promises: cannot be steered
    assert processor.apply(logits) is logits
    assert "apply failed" in log.text
    tokens.append(4)
    processor.update_state(None)
    assert torch.equal(steer(processor, 2), torch.zeros(2, VOCAB))  # which delta belongs where is not certain any more
    tokens.append(5)
    # New requests are steered again.
    processor.update_state(update(add=[added(0, params("new"), [])]))
    difference = steer(processor, 2)
    assert_steered(difference[0], [])
    assert torch.equal(difference[1], torch.zeros(VOCAB))
    processor.update_state(update(removed=[0, 1]))
    hear_out(hub, processor)
    assert accounts(hub) == ({"a": 1, "new": 0}, {"a": 2, "new": 0})


def test_an_update_that_cannot_be_read_stops_steering(processor: CoSteerLogitsProcessor, log: pytest.LogCaptureFixture) -> None:
    processor.update_state(update(add=[added(0, params("a"), [])]))
    nonsense: Any = SimpleNamespace(removed=[], added=[added(1, params("b"), []), 5], moved=[])
    processor.update_state(nonsense)
    assert "update_state failed" in log.text
    assert torch.equal(steer(processor, 2), torch.zeros(2, VOCAB))


@pytest.mark.parametrize("address", ["nonsense", ""])
def test_without_the_address_of_a_hub_it_is_told_that_requests_fail(
    processor: CoSteerLogitsProcessor, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture, address: str
) -> None:
    monkeypatch.setenv("COSTEER_HUB", address)
    tokens: list[int] = []
    processor.update_state(update(add=[added(0, params("a"), tokens)]))
    assert torch.equal(steer(processor, 1), torch.zeros(1, VOCAB))
    tokens.append(1)
    processor.update_state(None)
    assert torch.equal(steer(processor, 1), torch.zeros(1, VOCAB))
    assert "every steered request will fail" in log.text
    stream = processor._rows[0].stream
    assert (stream.steered, stream.missed, stream.undecided) == (0, 1, False)


def test_a_query_that_cannot_be_sent_does_no_harm_to_the_others(processor: CoSteerLogitsProcessor) -> None:
    """An offline caller's own steering request, with text that is no Unicode."""
    bad = SamplingParams(extra_args={"costeer": to_extra_args(SteeringRequest("bad", "laptop", Query(prompt="\ud800"), 1.0))})
    processor.update_state(update(add=[added(0, bad, []), added(1, params("good"), [])]))
    difference = steer(processor, 2)
    assert torch.equal(difference[0], torch.zeros(VOCAB))
    assert_steered(difference[1], [])


def test_no_random_number_generator_is_touched(processor: CoSteerLogitsProcessor) -> None:
    """vLLM draws seeds from the global ones on every tensor-parallel rank: they must stay in step."""
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]
    processor.update_state(update(add=[added(0, params("a"), [])]))
    processor.apply(torch.zeros(1, VOCAB))
    processor.update_state(update(removed=[0]))
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_steering_is_not_skipped_for_greedy_requests(processor: CoSteerLogitsProcessor) -> None:
    assert processor.is_argmax_invariant() is False
    assert LogitsProcessors([processor]).non_argmax_invariant == [processor]


def test_the_hash_in_an_advance_is_of_all_that_was_generated(processor: CoSteerLogitsProcessor, hub: FakeHub) -> None:
    tokens = [3, 1]
    processor.update_state(update(add=[added(0, params("a"), tokens)]))
    steer(processor, 1)
    tokens.append(4)
    processor.update_state(None)
    steer(processor, 1)
    (advance,) = hub.messages(Advance)
    assert (advance.position, advance.prefix_hash, advance.tokens) == (3, extend_hash(0, [3, 1, 4]), [4])


def test_a_thinking_budget_that_would_overrule_choices_is_refused() -> None:
    for fusion in ("cloud", "edge"):
        request = SteeringRequest("r", "laptop", Query(prompt="Hi"), 1.0, fusion=fusion)
        wanted = SamplingParams(extra_args={"costeer": to_extra_args(request)}, thinking_token_budget=5)
        if fusion == "cloud":
            CoSteerLogitsProcessor.validate_params(wanted)
        else:
            with pytest.raises(InvalidParameter, match="thinking_token_budget is 5"):
                CoSteerLogitsProcessor.validate_params(wanted)


def test_when_candidates_cannot_be_shown_the_ranks_stay_in_step(
    processor: CoSteerLogitsProcessor, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    agreed: list[int] = []

    def out_of_memory(*args: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("costeer_vllm.engine.processor.base_policies", out_of_memory)
    monkeypatch.setattr(processor._ranks, "agree", lambda table, streams: agreed.append(len(streams)))
    processor.update_state(update(add=[added(0, params("edge", **EDGE), []), added(1, params("cloud"), [])]))
    difference = steer(processor, 2)
    assert torch.equal(difference[0], torch.zeros(VOCAB))
    assert_steered(difference[1], [])
    assert agreed == [2]
    assert "candidates cannot be shown" in log.text
