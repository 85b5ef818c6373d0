"""The processor under Model Runner V2, driven through vLLM's own RequestState and the hooks around it.

RequestState's buffers need a GPU or Triton; here they are plain tensors with the same methods. The real runner is in tests/e2e.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext, LogitsProcRequestState
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.states import RequestState

from costeer_vllm.engine import hooks
from costeer_vllm.engine.processor import CoSteerLogitsProcessor
from costeer_vllm.engine.slots import Slots, TokenReader
from costeer_vllm.protocol.messages import Advance, Begin, Candidates, End, Sampling

from .fake_hub import TIMEOUT_S, ExactEdges, FakeHub
from .test_processor_v1 import (
    EDGE,
    GARBAGE,
    STOP,
    VOCAB,
    accounts,
    assert_chosen,
    assert_steered,
    config,
    edges_of,
    hear_out,
    leave,
    params,
)

SLOTS = 4
MAX_LEN = 64
PROMPT = [1, 2, 3]

pytestmark = pytest.mark.timeout(TIMEOUT_S * 3)


class Buffer:
    """StagedWriteTensor and UvaBackedTensor without staging: what is written is there."""

    def __init__(self, *shape: int) -> None:
        self.gpu = torch.zeros(shape, dtype=torch.int32)
        self.np = self.gpu.numpy()

    def stage_write(self, index: int, start: int, values: list[int]) -> None:
        self.gpu[index, start : start + len(values)] = torch.tensor(values, dtype=torch.int32)

    def stage_write_elem(self, index: int, value: int) -> None:
        self.gpu[index] = value


def request_state() -> RequestState:
    state = object.__new__(RequestState)
    state.max_num_reqs, state.vocab_size, state.device = SLOTS, VOCAB, torch.device("cpu")
    state.req_id_to_index, state.index_to_req_id, state.free_indices = {}, {}, list(range(SLOTS))
    buffers: Any = state
    buffers.all_token_ids = Buffer(SLOTS, MAX_LEN)
    for name in ("prompt_len", "prefill_len", "total_len", "num_computed_tokens"):
        setattr(buffers, name, Buffer(SLOTS))
    state.max_seq_len, state.num_computed_prefill_tokens, state.num_computed_tokens_np = np.zeros((3, SLOTS), np.int32)
    state.draft_tokens = torch.zeros(SLOTS, 0, dtype=torch.int64)
    return state


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
    """The steps of vLLM's GPU model runner that a logits processor takes part in, in their order."""

    def __init__(self, processor: CoSteerLogitsProcessor, state: RequestState, rng: random.Random, stops: float = 0.0) -> None:
        self.processor, self.state, self.rng, self.stops = processor, state, rng, stops
        self.needs_apply: set[int] = set()
        self.steered_rows = [0, 0]  # fused in the cloud, at the edge

    def step(self, scheduled: list[Generation], gone: list[Generation]) -> None:
        """``gone`` finished, were aborted or preempted since the last step; those that have no slot get one."""
        for generation in sorted(gone, key=lambda g: g.name):
            self.state.remove_request(generation.name)
        for generation in scheduled:
            if generation.name not in self.state.req_id_to_index:
                self.add(generation)
        self.processor.apply_staged_writes()
        if not scheduled:
            return
        rows = self.rng.sample(scheduled, len(scheduled))
        generator = torch.Generator().manual_seed(self.rng.getrandbits(32))
        logits = torch.randn(len(rows), VOCAB, generator=generator)
        if not self.stops:
            logits[:, STOP] = -50.0  # no candidate
        before = logits.clone()
        context = self.context(rows)
        if self.needs_apply & set(context.idx_mapping_np.tolist()):
            assert self.processor.apply(logits, context) is logits
        for row, generation in enumerate(rows):
            difference = logits[row] - before[row]
            if generation.steered and not generation.chunks and not generation.stopped:
                if generation.is_edge_fused:
                    assert_chosen(logits[row], before[row], generation.tokens)
                else:
                    assert_steered(difference, generation.tokens)
                self.steered_rows[generation.is_edge_fused] += 1
            elif not generation.steered or generation.chunks:
                assert torch.equal(difference, torch.zeros(VOCAB))
        self.sample(rows, logits)

    def add(self, generation: Generation) -> None:
        self.state.add_request(generation.name, len(PROMPT), PROMPT + generation.tokens, 0, 32)
        slot = self.state.req_id_to_index[generation.name]
        self.needs_apply.discard(slot)
        if self.processor.add_request(slot, generation.params):
            self.needs_apply.add(slot)

    def context(self, rows: list[Generation]) -> LogitsContext:
        slots = np.array([self.state.req_id_to_index[g.name] for g in rows], np.int32)
        lengths = np.array([int(self.state.total_len.gpu[slot]) - (g.chunks > 0) for slot, g in zip(slots, rows, strict=True)])
        mapping, zeros = torch.from_numpy(slots), torch.zeros(len(rows), dtype=torch.int64)
        return LogitsContext(mapping, mapping, slots, zeros, zeros, torch.from_numpy(lengths - 1), lengths)

    def sample(self, rows: list[Generation], logits: torch.Tensor) -> None:
        for row, generation in enumerate(rows):
            if generation.chunks:
                generation.chunks -= 1
                continue
            token = STOP if self.rng.random() < self.stops else self.rng.randrange(STOP)
            if generation.is_edge_fused:
                token = int(logits[row].argmax())
            slot = self.state.req_id_to_index[generation.name]
            self.state.all_token_ids.gpu[slot, self.state.total_len.gpu[slot]] = token
            self.state.total_len.gpu[slot] += 1
            if not generation.stopped:  # else it is the step past a stop token, and thrown away
                generation.tokens.append(token)
                generation.stopped = token == STOP


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    hub = FakeHub(ExactEdges(VOCAB))
    yield hub
    hub.close()


@pytest.fixture
def state() -> RequestState:
    return request_state()


@pytest.fixture
def processor(
    hub: FakeHub,
    state: RequestState,
    tensor_parallel_group: None,
    monkeypatch: pytest.MonkeyPatch,
    log: pytest.LogCaptureFixture,
) -> Iterator[CoSteerLogitsProcessor]:
    monkeypatch.setenv("COSTEER_HUB", hub.endpoint)
    monkeypatch.delenv("COSTEER_ATTACH_KEY", raising=False)
    # The constructor wraps these two; the class gets its own back afterwards.
    monkeypatch.setattr(RequestState, "add_request", RequestState.add_request)
    monkeypatch.setattr(RequestState, "remove_request", RequestState.remove_request)
    processor = CoSteerLogitsProcessor(config(), LogitsProcRequestState.from_request_state(state))
    yield processor
    leave(processor)


@pytest.fixture
def runner(processor: CoSteerLogitsProcessor, state: RequestState) -> Runner:
    return Runner(processor, state, random.Random(0))


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_every_row_of_every_step_gets_its_own_delta(
    processor: CoSteerLogitsProcessor,
    state: RequestState,
    hub: FakeHub,
    log: pytest.LogCaptureFixture,
    seed: int,
    is_async: bool,
) -> None:
    """Requests come, wait in their slot, are preempted, resumed in another, and stopped at random."""
    rng = random.Random(seed)
    runner = Runner(processor, state, rng, stops=0.1)
    alive: list[Generation] = []
    finished: list[Generation] = []
    stopping: list[Generation] = []
    gone: list[Generation] = []
    for number in range(40):
        while len(alive) < SLOTS and rng.random() < 0.5:
            steered, is_edge_fused = rng.choice([(False, False), (True, False), (True, True)])
            name = f"r{number}-{len(alive)}"
            own = params(name if steered else None, **EDGE if is_edge_fused else {})
            if not steered and rng.random() < 0.5:
                own.extra_args = {"costeer": rng.choice(GARBAGE)}
            alive.append(Generation(name, own, steered, is_edge_fused, chunks=rng.choice([0, 0, 1, 2])))
        held = [g for g in alive if g.tokens and not g.stopped and rng.random() < 0.15]  # keep their slots
        preempted = [g for g in alive if g not in held and g.tokens and not g.stopped and rng.random() < 0.1]
        runner.step([g for g in alive if g not in held + preempted], gone + preempted)
        # Without async scheduling a stop is seen before the next step, with it one step later.
        gone = stopping if is_async else [g for g in alive if g.stopped]
        stopping = [g for g in alive if g.stopped and g not in gone]
        gone += [g for g in alive if len(g.tokens) > 8 and g not in gone and not g.stopped]
        finished += gone
        alive = [g for g in alive if g not in gone]
    runner.step([], gone + alive)
    hear_out(hub, processor)
    edges = hub.answer
    assert isinstance(edges, ExactEdges)
    assert edges.problems == []
    assert edges.prefixes == {}
    assert sum(runner.steered_rows) > 15
    assert min(runner.steered_rows) >= 3
    steered, missed = accounts(hub)
    assert sum(missed.values()) == 0
    for generation in [*finished, *alive]:
        assert steered[generation.name] == (len(generation.tokens) if generation.steered else 0), generation
    assert "Traceback" not in log.text


def test_tokens_are_sent_before_the_forward_pass(runner: Runner, hub: FakeHub) -> None:
    one = Generation("a", params("a"), True)
    runner.step([one], [])
    runner.step([], [])  # ``apply_staged_writes`` alone
    hub.wait_for(lambda received: isinstance(received[-1], Advance))
    (advance,) = hub.messages(Advance)
    assert advance.tokens == one.tokens


def test_a_chunk_of_a_prefill_neither_waits_nor_counts(runner: Runner, hub: FakeHub) -> None:
    exact = hub.answer
    hub.answer = lambda message: []  # whoever waits now waits for a minute
    one = Generation("a", params("a"), True, chunks=2)
    runner.step([one], [])
    runner.step([one], [])
    hub.wait_for(lambda received: any(isinstance(message, Begin) for message in received))
    hub.send(*exact(hub.messages(Begin)[0]))
    hub.answer = exact
    runner.step([one], [])
    runner.step([], [one])
    hear_out(hub, runner.processor)
    assert accounts(hub) == ({"a": 1}, {"a": 0})


def test_a_request_aborted_in_its_prefill_counts_nothing(runner: Runner, hub: FakeHub) -> None:
    one = Generation("a", params("a"), True, chunks=2)
    runner.step([one], [])
    runner.step([], [one])
    hear_out(hub, runner.processor)
    assert accounts(hub) == ({"a": 0}, {"a": 0})


def test_a_preempted_request_resumes_in_another_slot_where_it_was(runner: Runner, state: RequestState, hub: FakeHub) -> None:
    one, other = Generation("a", params("a"), True), Generation("b", params("b"), True)
    for _ in range(3):
        runner.step([one], [])
    first = state.req_id_to_index["a"]
    runner.step([other], [one])
    assert state.req_id_to_index["b"] == first
    known = list(one.tokens)
    runner.step([one, other], [])
    assert state.req_id_to_index["a"] != first
    runner.step([], [one, other])
    hear_out(hub, runner.processor)
    assert [begin.tokens for begin in hub.messages(Begin)] == [[], [], known]
    assert accounts(hub)[0] == {"a": 4, "b": 2}


def test_a_slot_that_is_taken_without_notice_ends_its_former_stream(
    processor: CoSteerLogitsProcessor, state: RequestState, hub: FakeHub
) -> None:
    assert processor.add_request(2, params("old"))
    assert not processor.add_request(2, params())
    assert processor.add_request(2, params("new"))
    assert processor.add_request(2, params("newer"))
    hear_out(hub, processor)
    assert [end.stream.partition(".")[0] for end in hub.messages(End)] == ["old", "new"]


def test_what_a_former_occupant_generated_is_not_taken_for_the_next_ones(
    processor: CoSteerLogitsProcessor, state: RequestState, hub: FakeHub
) -> None:
    state.add_request("old", len(PROMPT), [*PROMPT, 7, 8], 0, 32)
    slot = state.req_id_to_index["old"]
    state.remove_request("old")
    state.add_request("new", len(PROMPT), PROMPT, 0, 32)
    assert state.req_id_to_index["new"] == slot
    processor.add_request(slot, params("new"))
    state.add_request("third", len(PROMPT), [*PROMPT, 9], 0, 32)
    processor.add_request((slot + 1) % SLOTS, params("elsewhere"))
    hear_out(hub, processor)
    assert [begin.tokens for begin in hub.messages(Begin)] == [[], []]


def test_a_token_of_a_request_that_left_is_not_looked_for_in_its_successors_row(
    runner: Runner, processor: CoSteerLogitsProcessor, state: RequestState, log: pytest.LogCaptureFixture
) -> None:
    """Prompt and position of two requests together would point beyond the buffer: on a GPU the end of the engine."""
    old = Generation("old", params("old"), True)
    for _ in range(5):
        runner.step([old], [])
    slot = state.req_id_to_index["old"]
    state.remove_request("old")
    state.add_request("new", MAX_LEN - 2, [1] * (MAX_LEN - 2), 0, 2)
    assert state.req_id_to_index["new"] == slot
    assert processor.add_request(slot, params("new"))
    processor.apply_staged_writes()
    assert "failed" not in log.text


# Edge fusion


def test_an_edge_fused_row_among_others_says_how_to_draw_and_gets_its_token(runner: Runner, hub: FakeHub) -> None:
    own = params("edge", max_bits=3.0, **EDGE)
    own.temperature, own.top_k = 0.0, -1
    batch = [Generation("edge", own, True, True), Generation("cloud", params("cloud"), True), Generation("no", params(), False)]
    for _ in range(5):
        runner.step(batch, [])
    runner.step([], batch)
    hear_out(hub, runner.processor)
    assert runner.steered_rows == [5, 5]
    assert {begin.stream.partition(".")[0]: begin.sampling for begin in hub.messages(Begin)} == {
        "edge": Sampling(temperature=0.0, max_bits=3.0),
        "cloud": None,
    }
    assert [offer.position for offer in hub.messages(Candidates)] == [0, 1, 2, 3, 4]
    assert edges_of(hub).problems == []
    assert accounts(hub) == ({"edge": 5, "cloud": 5}, {"edge": 0, "cloud": 0})


def test_a_chunk_of_a_prefill_neither_asks_nor_waits_at_the_edge(runner: Runner, hub: FakeHub) -> None:
    exact = hub.answer
    hub.answer = lambda message: []  # whoever waits now waits for a minute
    one = Generation("a", params("a", **EDGE), True, True, chunks=2)
    runner.step([one], [])
    runner.step([one], [])
    hear_out(hub, runner.processor)
    assert hub.messages(Candidates) == []
    exact(hub.messages(Begin)[0])
    hub.answer = exact
    runner.step([one], [])
    runner.step([], [one])
    hear_out(hub, runner.processor)
    assert accounts(hub) == ({"a": 1}, {"a": 0})


def test_the_runner_has_applied_the_penalties_before(runner: Runner, state: RequestState, hub: FakeHub) -> None:
    """Model Runner V2 applies them before its logits processors: they must not count twice."""
    own = params("a", fusion="edge", candidates=VOCAB)
    own.repetition_penalty, own.frequency_penalty = 2.0, 0.5
    one = Generation("a", own, True, True)
    runner.add(one)
    logits = torch.randn(1, VOCAB)
    log_probs = logits[0].double().log_softmax(-1).numpy()
    runner.processor.apply(logits, runner.context([one]))
    ((base,),) = edges_of(hub).offers.values()
    np.testing.assert_allclose(base.log_probs, log_probs, atol=1e-5)


def test_a_preempted_edge_fused_request_resumes_at_the_edge_where_it_was(runner: Runner, hub: FakeHub) -> None:
    one = Generation("a", params("a", **EDGE), True, True)
    for _ in range(3):
        runner.step([one], [])
    known = list(one.tokens)
    runner.step([], [one])
    runner.step([one], [])
    runner.step([], [one])
    hear_out(hub, runner.processor)
    assert [(begin.tokens, begin.sampling) for begin in hub.messages(Begin)] == [([], Sampling()), (known, Sampling())]
    assert accounts(hub)[0] == {"a": 4}


@pytest.mark.parametrize("value", GARBAGE, ids=repr)
def test_garbage_is_declined(processor: CoSteerLogitsProcessor, hub: FakeHub, value: Any) -> None:
    own = SamplingParams(extra_args={"costeer": value})
    assert processor.add_request(0, own) is False
    processor.apply_staged_writes()
    assert hub.received == []


def test_an_ordinary_batch_costs_nothing(runner: Runner, processor: CoSteerLogitsProcessor) -> None:
    """As vLLM's warm-up, which comes without extra_args."""
    others = [Generation(name, params(), False) for name in "abc"]
    for _ in range(3):
        runner.step(others, [])
    assert runner.needs_apply == set()
    assert processor._table is None


def test_two_engines_in_one_process_keep_apart(processor: CoSteerLogitsProcessor, state: RequestState, hub: FakeHub) -> None:
    other_state = request_state()
    other = CoSteerLogitsProcessor(config(), LogitsProcRequestState.from_request_state(other_state))
    runners = [Runner(processor, state, random.Random(1)), Runner(other, other_state, random.Random(2))]
    generations = [Generation("a", params("a"), True), Generation("b", params("b"), True)]
    for runner, generation in zip(runners, generations, strict=True):
        runner.step([generation], [])
    runners[0].step([], [generations[0]])
    runners[1].step([generations[1]], [])
    runners[1].step([], [generations[1]])
    hear_out(hub, processor)
    hear_out(hub, other)
    assert accounts(hub)[0] == {"a": 1, "b": 2}
    leave(other)


def test_a_failure_in_a_hook_stops_steering_and_nothing_else(
    runner: Runner, processor: CoSteerLogitsProcessor, state: RequestState, hub: FakeHub, log: pytest.LogCaptureFixture
) -> None:
    one = Generation("a", params("a"), True)
    runner.step([one], [])
    logits = torch.zeros(1, VOCAB, dtype=torch.float64)  # not what vLLM promises: cannot be steered
    processor.apply_staged_writes()
    assert processor.apply(logits, runner.context([one])) is logits
    assert "apply failed" in log.text
    runner.sample([one], logits)
    one.steered = False  # from here on
    runner.step([one], [])
    new = Generation("b", params("b"), True)
    runner.step([one, new], [])
    runner.step([], [one, new])
    hear_out(hub, processor)
    assert accounts(hub) == ({"a": 1, "b": 1}, {"a": len(one.tokens) - 1, "b": 0})


def test_a_closed_link_ends_no_engine(runner: Runner, processor: CoSteerLogitsProcessor, hub: FakeHub) -> None:
    """remove_request is vLLM's own method with our hook inside: nothing may come out of it."""
    one = Generation("a", params("a"), True)
    runner.step([one], [])
    assert processor._table is not None
    assert processor._table._link is not None
    processor._table._link.close()
    runner.step([], [one])
    assert processor.add_request(0, params("b", deadline_ms=1.0))


def test_the_hooks_wrap_once(processor: CoSteerLogitsProcessor, state: RequestState) -> None:
    wrapped = RequestState.add_request, RequestState.remove_request
    CoSteerLogitsProcessor(config(), LogitsProcRequestState.from_request_state(state))
    assert (RequestState.add_request, RequestState.remove_request) == wrapped
    assert state.remove_request("nobody") is None


def test_states_without_a_processor_are_left_alone(processor: CoSteerLogitsProcessor) -> None:
    plain = request_state()
    plain.add_request("a", len(PROMPT), PROMPT, 0, 32)
    assert plain.remove_request("a") is not None


def test_a_token_that_no_apply_has_read_goes_out_with_the_next_step(
    runner: Runner, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the read of a token is only started before a step; a step without a row of ours has no apply() to finish it."""
    monkeypatch.setattr(TokenReader, "is_ready", property(lambda reader: reader._tokens is None))
    held, plain = Generation("a", params("a"), True), Generation("p", params(), False)
    runner.step([held, plain], [])
    runner.step([plain], [])
    assert hub.messages(Advance) == []
    runner.step([plain], [])
    hub.wait_for(lambda received: any(isinstance(message, Advance) for message in received))


def test_a_row_behind_a_prefill_whose_token_was_taken_back_is_stale() -> None:
    """Scheduled before that was known, it was fed no proper input: its length, as the host has it, is one too long."""
    state = SimpleNamespace(
        prompt_len=SimpleNamespace(np=np.array([5, 5, 5])),
        prefill_len=SimpleNamespace(np=np.array([5, 5, 7])),
        all_token_ids=SimpleNamespace(),
    )
    slots = Slots(state, on_vacated=lambda slot: None)
    fresh, decoding, resumed = (SimpleNamespace(position=position, taken_back=True) for position in (0, 1, 2))
    slots.streams = {0: fresh, 1: decoding, 2: resumed}

    def rows(*lengths: int) -> tuple[set[int], set[int]]:
        ctx = SimpleNamespace(idx_mapping_np=np.arange(3), seq_lens_upper_bound_np=np.array(lengths))
        return set(slots.rows(ctx)), set(slots.stale_rows)

    assert rows(5, 6, 7) == ({0, 1, 2}, set()), "the ends of two prefills and a decode"
    assert rows(6, 7, 8) == ({1}, {0, 2}), "a decode may be one too long on the host, and is prepared on the device"
    assert rows(4, 6, 6) == ({1}, set()), "chunks of prefills"
    fresh.taken_back = False
    assert rows(6, 7, 8) == ({0, 1}, {2}), (
        "nothing was taken back: a token was lost, and the row must not be repeated for ever"
    )


def test_what_is_taken_back_is_a_rejected_draft_to_all_of_the_runner() -> None:
    """Also to what reads the sampler's own output, as the connector of routed experts does."""
    slots = SimpleNamespace(taken_back=[1], take_taken_back=lambda device: torch.tensor([1], device=device))
    runner = SimpleNamespace(req_states=SimpleNamespace(all_token_ids=SimpleNamespace(costeer_slots=slots)))
    ones, zeros = torch.ones(3, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    sampled = SamplerOutput(torch.tensor([[4], [5], [6]]), None, None, ones, zeros)
    output, *counts = hooks._sample_v2(lambda runner: (sampled, ones, zeros), runner)
    for num_sampled, num_rejected in (counts, (output.num_sampled, output.num_rejected)):
        assert num_sampled.tolist() == [1, 0, 1]
        assert num_rejected.tolist() == [0, 1, 0]


def test_a_request_that_comes_back_in_vain_is_not_answered_plainly(
    processor: CoSteerLogitsProcessor, state: RequestState, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    runner = Runner(processor, state, random.Random(0))
    one = Generation("a", params("a", on_missing="wait"), steered=True)
    runner.step([one], [])
    (stream,) = processor._slots.streams.values()  # type: ignore[union-attr]
    monkeypatch.setattr(processor, "_begin", lambda *args: 1 / 0)
    runner.add(one)
    assert "add_request failed" in log.text
    assert stream.failure is not None
