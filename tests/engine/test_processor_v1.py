"""The processor under runner V1, fed by vLLM's own InputBatch; the edge workers answer exactly, so every row can be checked."""

import atexit
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
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
from costeer_vllm.engine.processor import CoSteerLogitsProcessor
from costeer_vllm.errors import InvalidParameter
from costeer_vllm.protocol.messages import Advance, Begin, Delta, End, Join, Joined, Message, Query
from costeer_vllm.protocol.stream import extend_hash
from costeer_vllm.request import SteeringRequest, to_extra_args

from .fake_hub import TIMEOUT_S, ExactEdges, FakeHub, delta_of

VOCAB = 16
STOP = 15
STRENGTH = 1.5
SWAP, UNIDIRECTIONAL = MoveDirectionality.SWAP, MoveDirectionality.UNIDIRECTIONAL

pytestmark = pytest.mark.timeout(TIMEOUT_S * 3)


def config() -> Any:
    return SimpleNamespace(model_config=SimpleNamespace(get_vocab_size=lambda: VOCAB))


def params(name: str | None = None, strength: float = STRENGTH, **fields: Any) -> SamplingParams:
    """Of a request steered under ``name``; of an ordinary one if None."""
    if name is None:
        return SamplingParams(stop_token_ids=[STOP])
    request = SteeringRequest(name, "laptop", Query(prompt="Hello?"), strength, **{"deadline_ms": 60_000.0, **fields})
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
        atexit.unregister(processor._table.leave)
        processor._table.leave()


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


@dataclass
class Generation:
    """One request as the scheduler knows it."""

    name: str
    params: SamplingParams
    steered: bool
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
        self.steered_rows = 0

    def step(self, scheduled: list[Generation]) -> None:
        """One step in which these requests are scheduled, and all others are not."""
        self.update_states({generation.name: generation for generation in scheduled})
        self.batch.refresh_metadata()
        logits = torch.randn(self.batch.num_reqs, VOCAB)
        before = logits.clone()
        self.batch.update_async_output_token_ids()
        self.processor.apply(logits)
        rows = [next(g for g in scheduled if g.name == name) for name in self.batch.req_ids]
        for row, generation in enumerate(rows):
            if generation.steered and not generation.stopped:
                assert_steered(logits[row] - before[row], generation.tokens)
                self.steered_rows += 1
            elif not generation.steered:
                assert torch.equal(logits[row], before[row])
        self.sample(rows)

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

    def sample(self, rows: list[Generation]) -> None:
        sampled = [STOP if self.rng.random() < 0.1 else self.rng.randrange(STOP) for _ in rows]
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
            steered = rng.random() < 0.7
            name = f"r{number}-{len(alive)}"
            own = params(name if steered else None)
            if not steered and rng.random() < 0.5:
                own.extra_args = {"costeer": rng.choice(GARBAGE)}
            alive.append(Generation(name, own, steered, chunks=rng.choice([0, 0, 1, 2])))
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
    assert runner.steered_rows > 50
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
def test_without_the_address_of_a_hub_tokens_are_missed_and_told(
    processor: CoSteerLogitsProcessor, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture, address: str
) -> None:
    monkeypatch.setenv("COSTEER_HUB", address)
    tokens: list[int] = []
    processor.update_state(update(add=[added(0, params("a"), tokens)]))
    assert torch.equal(steer(processor, 1), torch.zeros(1, VOCAB))
    tokens.append(1)
    processor.update_state(None)
    assert torch.equal(steer(processor, 1), torch.zeros(1, VOCAB))
    assert "no token of a steered request will be steered" in log.text
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
