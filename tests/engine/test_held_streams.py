"""Streams whose requests can be held: a board, a hub over a real socket, and what each ``on_missing`` makes of a fault."""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from costeer_vllm.candidates import BasePolicy, encode_candidates
from costeer_vllm.delta import encode_lossless
from costeer_vllm.engine import streams as streams_module
from costeer_vllm.engine.board import ROWS, Board, State, Tickets
from costeer_vllm.engine.link import HubLink
from costeer_vllm.engine.steered import MAX_FAILURES, SteeredStream
from costeer_vllm.engine.streams import StreamTable
from costeer_vllm.protocol.messages import (
    Advance,
    Begin,
    Candidates,
    Choice,
    Delta,
    End,
    HubToEngine,
    Join,
    Query,
    Reattached,
    Refused,
    Sampling,
)
from costeer_vllm.request import SteeringRequest

from .fake_hub import TIMEOUT_S, FakeHub

VOCAB = 8
LONG_MS = 60_000.0  # a wait of this length fails the test
GREEDY = Sampling(temperature=0.0)
OFFER = encode_candidates(BasePolicy(np.array([1, 4, 6]), np.log([0.5, 0.3, 0.1]), 0.1))

pytestmark = pytest.mark.timeout(TIMEOUT_S * 2)


@dataclass
class Engine:
    """One engine worker's streams, the hub that they talk to, and the scheduler's side of the board."""

    hub: FakeHub
    table: StreamTable
    board: Board
    tickets: Tickets = field(init=False)

    def __post_init__(self) -> None:
        self.tickets = Tickets(self.board)

    def begin(self, on_missing: Any = "wait", deadline_ms: float = LONG_MS, sampling: Sampling | None = None) -> SteeredStream:
        request = SteeringRequest("r", "laptop", Query(prompt="Hi"), 1.5, deadline_ms, on_missing, ticket=self.tickets.issue())
        stream = self.table.begin(request, [], frozenset(), sampling)
        self._read_up_to(Begin, stream)
        return stream

    def row(self, stream: SteeredStream) -> Any:
        """What the scheduler reads."""
        assert stream.request.ticket is not None
        return self.board.rows[stream.request.ticket % ROWS]

    def hear(self, *messages: HubToEngine) -> None:
        """Let the table take these: they come in order, so that the last one, whose arrival shows, tells that all are there."""
        marker = self.begin("continue")
        self.hub.send(*messages, answer_to(marker))
        while marker.answer is None:
            self.table.look_after()
        self.table.end(marker, "finished", 0)
        self._read_up_to(End, marker)

    def _read_up_to(self, kind: type[Begin] | type[End], stream: SteeredStream) -> None:
        self.hub.wait_for(lambda received: any(isinstance(m, kind) and m.stream == stream.id for m in received))
        self.hub._read = len(self.hub.received)


def answer_to(stream: SteeredStream) -> Delta:
    values = np.arange(VOCAB, dtype=np.float32)
    return Delta(stream.id, stream.position, stream.protocol.prefix_hash, encode_lossless(values))


@pytest.fixture
def engine(hub: FakeHub, tmp_path: Path, log: pytest.LogCaptureFixture) -> Iterator[Engine]:
    link, board = HubLink(hub.endpoint, None), Board(tmp_path / "board")
    hub.next(Join)
    yield Engine(hub, StreamTable(link, VOCAB, board), board)
    link.close()


# The board


def test_the_scheduler_sees_a_question_and_its_answer(engine: Engine) -> None:
    stream = engine.begin()
    assert (engine.row(stream)["position"], engine.row(stream)["state"]) == (0, State.ASKED)
    engine.hear(answer_to(stream))
    assert engine.row(stream)["state"] == State.SETTLED
    engine.table.collect([stream])
    engine.table.advance(stream, [3])
    assert (engine.row(stream)["position"], engine.row(stream)["state"]) == (1, State.ASKED)
    assert engine.row(stream)["asked_at"] == stream.asked_at


def test_a_table_without_a_link_writes_nothing(tmp_path: Path) -> None:
    """By which the scheduler sees, and fails, what this engine does not steer; other ranks than the first write nothing."""
    board = Board(tmp_path / "board")
    request = SteeringRequest("r", "laptop", Query(prompt="Hi"), 1.5, ticket=Tickets(board).issue())
    table = StreamTable(None, VOCAB, board)
    stream = table.begin(request, [], frozenset())
    table.look_after()
    table.collect([stream])
    table.advance(stream, [3])
    assert not board.rows["ticket"].any()


def test_answer_times_are_those_of_next_tokens_and_of_the_worker(engine: Engine) -> None:
    first = engine.begin()
    engine.hear(answer_to(first))
    assert engine.row(first)["answer_s"] == 0, "a prompt's time tells nothing"
    engine.table.advance(first, [3])
    engine.hear(answer_to(first))
    assert 0 < engine.row(first)["answer_s"] < TIMEOUT_S
    second = engine.begin()
    assert engine.row(second)["answer_s"] == 0
    engine.hear(answer_to(second))
    engine.table.advance(second, [4])
    assert engine.row(second)["answer_s"] > 0


def test_an_edge_fused_stream_is_asked_by_its_offer(engine: Engine) -> None:
    stream = engine.begin(sampling=GREEDY)
    assert engine.row(stream)["state"] == State.UNASKED
    engine.table.offer(stream, OFFER)
    assert engine.row(stream)["state"] == State.ASKED
    engine.hear(Choice(stream.id, 0, stream.protocol.prefix_hash, 4))
    assert engine.row(stream)["state"] == State.SETTLED


# A step


def test_a_step_in_company_does_not_wait_and_takes_the_token_back(engine: Engine) -> None:
    stream = engine.begin()
    start = time.monotonic()
    engine.table.collect([stream], in_company=True)
    assert time.monotonic() - start < LONG_MS / 1000 / 2
    assert stream.taken_back
    assert engine.row(stream)["taken_back"] == 0
    engine.hear(answer_to(stream))
    engine.table.collect([stream], in_company=True)
    assert not stream.taken_back
    assert engine.row(stream)["taken_back"] == -1
    engine.table.advance(stream, [5])
    assert (stream.steered, stream.missed) == (1, 0), "what was taken back counts as nothing"


def test_a_step_that_is_alone_waits_for_an_answer_on_its_way(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams_module, "PATIENCE_S", TIMEOUT_S)
    stream = engine.begin()
    engine.hub.send(answer_to(stream))
    engine.table.collect([stream])
    assert not stream.taken_back
    assert stream.answer is not None


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_step_does_not_wait_for_a_request_that_is_over(engine: Engine, when: str) -> None:
    """Scheduled before its end was known; nobody will see the token."""
    stream = engine.begin()
    ticket = stream.request.ticket
    assert ticket is not None
    end = threading.Timer(0.05 if when == "meanwhile" else 0.0, engine.tickets.withdraw, [ticket])
    end.start()
    if when == "before":
        end.join()
    start = time.monotonic()
    engine.table.collect([stream])
    assert time.monotonic() - start < LONG_MS / 1000 / 2
    end.join()
    if when == "before":
        assert stream.taken_back, "so that it counts as neither steered nor missed"
    engine.table.leave(stream, 1)
    assert (stream.steered, stream.missed) == (0, 0)
    assert engine.row(stream)["taken_back"] == -1 or when == "meanwhile", "its row may be another request's by now"


def test_without_a_ticket_the_step_waits_until_the_deadline(engine: Engine) -> None:
    request = SteeringRequest("r", "laptop", Query(prompt="Hi"), 1.5, 300.0, "continue")
    stream = engine.table.begin(request, [], frozenset())
    held = engine.begin()
    engine.hub.send(answer_to(held))
    engine.table.collect([stream, held], in_company=True)
    assert time.monotonic() >= stream.deadline
    assert (stream.taken_back, stream.undecided) == (False, False)
    assert held.answer is not None


# Leaving the batch and coming back


def test_a_live_request_comes_back_to_its_stream(engine: Engine) -> None:
    stream = engine.begin()
    engine.hear(answer_to(stream))
    engine.table.collect([stream])
    assert engine.table.leave(stream, 1)
    engine.table.look_after()
    assert engine.table.begin(stream.request, [5], frozenset()) is stream
    assert engine.hub.next(Advance).tokens == [5]
    assert (stream.steered, stream.missed) == (1, 0)


def test_a_request_that_is_over_ends_its_stream_wherever_it_is(engine: Engine) -> None:
    parked, present = engine.begin(), engine.begin()
    assert engine.table.leave(parked, 0)
    for stream in (parked, present):
        engine.tickets.withdraw(stream.request.ticket or 0)
    engine.table.look_after()
    assert engine.hub.next(End) == End(parked.id, "finished", "", 0, 0)
    assert not engine.table.leave(present, 0)
    assert engine.hub.next(End) == End(present.id, "finished", "", 0, 0)
    assert len(engine.table) == 0


def test_a_dropped_token_is_forgotten_when_the_request_comes_back(engine: Engine) -> None:
    """Runner V1 shows the dropped token until the row has left the batch."""
    stream = engine.begin()
    engine.table.collect([stream], in_company=True)
    engine.table.leave(stream, 1)
    engine.hear(answer_to(stream))
    assert engine.table.begin(stream.request, [], frozenset()) is stream
    assert not stream.taken_back
    assert stream.answer is not None, "the position is the same, and so is its answer"
    engine.table.collect([stream])
    engine.table.advance(stream, [5])
    assert (stream.steered, stream.missed) == (1, 0)


# wait


def test_a_worker_that_comes_back_is_told_all_tokens_and_goes_on(engine: Engine) -> None:
    stream = engine.begin()
    engine.hear(answer_to(stream))
    engine.table.collect([stream])
    engine.hear(End(stream.id, "detached", "its connection is gone"))
    engine.table.advance(stream, [5])
    assert engine.hub.messages(Advance) == [], "nobody is there to hear it"
    assert engine.row(stream)["state"] == State.ASKED
    engine.hear(Reattached(stream.id))
    again = next(m for m in engine.hub.messages(Begin) if m.tokens)
    assert (again.stream, again.tokens) == (stream.id, [5])
    engine.hear(answer_to(stream))
    engine.table.collect([stream])
    assert stream.undecided
    assert stream.failure is None


def test_a_stream_is_begun_again_by_the_clock_where_nobody_says_that_it_can(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams_module, "_REOPEN_S", 0.0)
    stream = engine.begin()
    engine.hear(End(stream.id, "overloaded", "64 streams are the most"))
    engine.table.look_after()
    assert len([m for m in engine.hub.messages(Begin) if m.stream == stream.id]) >= 1
    engine.hub.wait_for(lambda received: sum(isinstance(m, Begin) and m.stream == stream.id for m in received) >= 2)
    assert stream.closed_by is None


def test_a_question_is_repeated_where_no_answer_comes(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams_module, "_ASK_AGAIN_S", 0.0)
    stream = engine.begin(sampling=GREEDY)
    engine.table.offer(stream, OFFER)
    engine.table.look_after()
    kinds = (Begin, Candidates)
    engine.hub.wait_for(lambda received: [type(m) for m in received if isinstance(m, kinds)][:4] == [*kinds, *kinds])


def test_a_request_that_has_waited_long_enough_fails(engine: Engine) -> None:
    stream = engine.begin(deadline_ms=1)
    while stream.failure is None:
        engine.table.look_after()
    sentence = "costeer: edge worker 'laptop', token 0: no delta came within 1 ms"
    assert stream.failure == sentence
    assert (engine.row(stream)["state"], bytes(engine.row(stream)["sentence"]).decode()) == (State.FAILED, sentence)
    engine.table.collect([stream])
    assert stream.taken_back, "its token shall not be seen"
    engine.tickets.withdraw(stream.request.ticket or 0)
    engine.table.leave(stream, 1)
    assert engine.hub.next(End) == End(stream.id, "failed", "", 0, 0)


def test_what_the_worker_said_last_stands_in_the_sentence(engine: Engine) -> None:
    stream = engine.begin(deadline_ms=2000)
    engine.hear(End(stream.id, "detached", "the edge worker's connection is gone"))
    while stream.failure is None:
        engine.table.look_after()
    assert stream.failure.endswith("no delta came within 2000 ms: the edge worker's connection is gone")


def test_a_worker_that_fails_again_and_again_is_not_asked_for_ever(engine: Engine) -> None:
    stream = engine.begin()
    for _ in range(MAX_FAILURES):
        engine.hear(End(stream.id, "failed", "the small model fails"))
        assert stream.failure is None
    engine.hear(End(stream.id, "failed", "the small model fails"))
    assert stream.failure == "costeer: edge worker 'laptop', token 0: the small model fails"


def test_a_refusal_is_final(engine: Engine) -> None:
    stream = engine.begin()
    engine.hear(End(stream.id, "refused", "the steering key does not fit"))
    assert stream.failure == "costeer: edge worker 'laptop', token 0: the steering key does not fit"


@pytest.mark.parametrize("message", ["reattached", "join"])
def test_a_stream_that_we_gave_up_is_not_begun_again(engine: Engine, message: str) -> None:
    """It is not certain any more which tokens it has."""
    stream = engine.begin("continue")
    engine.table.give_up()
    engine.table._handle(Reattached(stream.id) if message == "reattached" else Refused("join", "who are you?"))
    engine.table.collect([stream])
    assert not stream.taken_back
    assert stream.answer is None
    assert stream.closed_by is not None


def test_a_hub_that_restarted_is_told_of_held_streams(engine: Engine) -> None:
    stream = engine.begin()
    engine.table.leave(stream, 0)
    since = stream.waits_since
    engine.hear(Refused("join", "who are you?"))
    assert len([m for m in engine.hub.messages(Begin) if m.stream == stream.id]) == 2
    assert stream.waits_since == since


# fail, continue, and answers of no use


@pytest.mark.parametrize("reason", ["detached", "overloaded", "failed", "refused"])
def test_fail_means_at_once(engine: Engine, reason: Any) -> None:
    stream = engine.begin("fail")
    engine.hear(End(stream.id, reason, "no more"))
    assert stream.failure == "costeer: edge worker 'laptop', token 0: no more"


@pytest.mark.parametrize("on_missing", ["wait", "fail"])
def test_garbage_fails_a_request(engine: Engine, on_missing: str) -> None:
    stream = engine.begin(on_missing)
    engine.hear(Delta(stream.id, 0, stream.protocol.prefix_hash, b"garbage"))
    assert stream.failure is not None
    assert stream.failure.startswith("costeer: edge worker 'laptop', token 0: it sent a delta")


@pytest.mark.parametrize("message", ["end", "garbage"])
def test_continue_goes_on_unsteered_and_counts(engine: Engine, message: str) -> None:
    stream = engine.begin("continue")
    garbage = Delta(stream.id, 0, stream.protocol.prefix_hash, b"garbage")
    engine.hear(End(stream.id, "detached", "gone") if message == "end" else garbage)
    assert engine.row(stream)["state"] == State.SETTLED, "not worth a wait"
    engine.table.collect([stream], in_company=True)
    assert not stream.taken_back
    engine.table.advance(stream, [5])
    assert (stream.steered, stream.missed, stream.failure) == (0, 1, None)


def test_continue_is_held_until_its_deadline(engine: Engine) -> None:
    stream = engine.begin("continue", deadline_ms=2000)
    engine.table.collect([stream], in_company=True)
    assert stream.taken_back
    while engine.row(stream)["state"] != State.SETTLED:
        engine.table.look_after()
    assert time.monotonic() >= stream.deadline
    engine.table.collect([stream], in_company=True)
    assert (stream.taken_back, stream.undecided) == (False, False)


def test_continue_is_steered_again_when_the_worker_is_back(engine: Engine) -> None:
    stream = engine.begin("continue")
    engine.hear(End(stream.id, "detached", "gone"))
    engine.table.collect([stream])
    engine.table.advance(stream, [5])
    engine.hear(Reattached(stream.id))
    engine.hear(answer_to(stream))
    engine.table.collect([stream])
    engine.table.advance(stream, [6])
    assert (stream.steered, stream.missed) == (1, 1)
