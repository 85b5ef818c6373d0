"""The engine's streams against a hub over real sockets: which delta a token gets, and how each token is counted."""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from costeer_vllm.candidates import BasePolicy, encode_candidates
from costeer_vllm.delta import DenseDelta, SparseDelta, encode_lossless, encode_sparse
from costeer_vllm.engine.board import State
from costeer_vllm.engine.link import _MAX_QUEUED_FRAMES, HubLink
from costeer_vllm.engine.steered import SteeredStream
from costeer_vllm.engine.streams import StreamTable
from costeer_vllm.protocol.messages import (
    MAX_GUESS_BYTES,
    Advance,
    Begin,
    Candidates,
    Choice,
    Delta,
    End,
    Join,
    Joined,
    Query,
    Refused,
    Sampling,
    Turn,
)
from costeer_vllm.protocol.stream import extend_hash
from costeer_vllm.request import SteeringRequest

from .fake_hub import TIMEOUT_S, FakeHub
from .test_link import unused_endpoint

VOCAB = 8
LONG_MS = 60_000.0  # a wait of this length fails the test
STOP = 7
GRANT = "d" * 64
QUERY = Query(messages=[Turn("user", "Hello?")])
VALUES = np.arange(VOCAB, dtype=np.float32)

pytestmark = pytest.mark.timeout(TIMEOUT_S * 2)


def request(deadline_ms: float = LONG_MS) -> SteeringRequest:
    return SteeringRequest("chatcmpl-1", "laptop", QUERY, 1.5, deadline_ms, "continue", GRANT)


def delta_for(stream: SteeredStream, values: np.ndarray = VALUES) -> Delta:
    return Delta(stream.id, stream.protocol.position, stream.protocol.prefix_hash, encode_lossless(values))


def left_s(stream: SteeredStream, now: float) -> float:
    """How long the current position's token may still wait for its answer, in seconds."""
    return max(0.0, stream.deadline - now) if stream.state(now) is State.ASKED else 0.0


@dataclass
class Engine:
    """One engine worker's streams and the hub that they talk to."""

    hub: FakeHub
    table: StreamTable

    def begin(
        self, tokens: list[int] | None = None, deadline_ms: float = LONG_MS, sampling: Sampling | None = None
    ) -> SteeredStream:
        stream = self.table.begin(request(deadline_ms), tokens or [], frozenset({STOP}), sampling)
        assert self.hub.next(Begin).stream == stream.id
        return stream

    def advance(self, stream: SteeredStream, *tokens: int) -> Advance:
        self.table.advance(stream, list(tokens))
        return self.hub.next(Advance)

    def answer(self, *streams: SteeredStream) -> None:
        self.hub.send(*(delta_for(stream) for stream in streams))
        self.table.collect(streams)

    def hear(self, *messages: Delta | Choice | End | Refused | Joined | bytes) -> None:
        """Let the table hear these before anything else: they come in order, so a last one that is awaited ends the wait."""
        marker = self.begin()
        self.hub.send(*messages, delta_for(marker))
        self.table.collect([marker])
        assert marker.answer is not None
        self.end(marker, 0)

    def end(self, stream: SteeredStream, num_chosen: int = 1) -> tuple[int, int]:
        """(steered, missed) as the hub is told."""
        self.table.end(stream, "finished", num_chosen)
        end = self.hub.next(End)
        assert end == End(stream.id, "finished", "", stream.steered, stream.missed)
        return end.tokens_steered, end.tokens_missed


@pytest.fixture
def engine(hub: FakeHub) -> Iterator[Engine]:
    link = HubLink(hub.endpoint, None)
    hub.next(Join)
    yield Engine(hub, StreamTable(link, VOCAB))
    link.close()


# The life of a stream


def test_a_begin_carries_what_the_edge_worker_needs(engine: Engine) -> None:
    stream = engine.table.begin(request(), [5, 6], frozenset())
    begin = engine.hub.next(Begin)
    assert begin == Begin(stream.id, "chatcmpl-1", "laptop", QUERY, 1.5, [5, 6], GRANT, guess_bytes=MAX_GUESS_BYTES)
    assert stream.id.startswith("chatcmpl-1.")
    assert stream.position == 2
    assert len(engine.table) == 1


def test_the_children_of_one_request_are_streams_of_their_own(engine: Engine) -> None:
    streams = [engine.begin() for _ in range(20)]
    assert len({stream.id for stream in streams}) == 20
    assert len(engine.table) == 20


def test_tokens_are_steered_one_by_one_and_counted(engine: Engine) -> None:
    stream = engine.begin()
    prefix: list[int] = []
    for token in (3, 1, 4):
        engine.answer(stream)
        assert isinstance(stream.answer, DenseDelta)
        assert stream.answer.values.tolist() == VALUES.tolist()
        assert stream.undecided is True
        prefix.append(token)
        advance = engine.advance(stream, token)
        assert advance == Advance(stream.id, len(prefix), extend_hash(0, prefix), [token])
        assert stream.answer is stream.payload is None  # of the former prefix
    assert engine.end(stream, 0) == (3, 0)
    assert len(engine.table) == 0


def test_the_token_of_the_last_step_counts_when_it_was_kept(engine: Engine) -> None:
    for num_chosen, expected in ((1, (1, 0)), (0, (0, 0)), (2, (1, 1))):
        stream = engine.begin()
        engine.answer(stream)
        assert engine.end(stream, num_chosen) == expected


def test_a_stream_that_resumes_asks_for_where_it_stands(engine: Engine) -> None:
    stream = engine.begin([5, 6, 5])
    engine.hear(Delta(stream.id, 0, 0, encode_lossless(VALUES)))
    assert stream.answer is None
    engine.answer(stream)
    assert stream.answer is not None
    assert engine.end(stream) == (1, 0)


def test_the_step_past_a_stop_token_does_not_count(engine: Engine) -> None:
    """Async scheduling chooses one more token before it sees the stop token, and throws it away."""
    stream = engine.begin()
    engine.answer(stream)
    engine.advance(stream, STOP)
    engine.answer(stream)
    assert engine.end(stream, 1) == (1, 0)
    # Without async scheduling the stop token itself is the last choice, and counts.
    stream = engine.begin()
    engine.answer(stream)
    engine.advance(stream, 2)
    engine.answer(stream)
    assert engine.end(stream, 1) == (2, 0)


def test_tokens_chosen_without_asking_are_missed(engine: Engine) -> None:
    stream = engine.begin()
    engine.answer(stream)
    engine.advance(stream, 1, 2, 3)  # one was decided on here, two were not
    assert (stream.steered, stream.missed) == (1, 2)
    engine.advance(stream, 4)  # none was
    assert (stream.steered, stream.missed) == (1, 3)
    assert engine.end(stream, 1) == (1, 4)


def test_a_stream_ends_once_and_does_not_go_on_afterwards(engine: Engine) -> None:
    stream = engine.begin()
    engine.answer(stream)
    engine.end(stream)
    engine.table.end(stream, "finished", 1)
    engine.table.advance(stream, [1])
    assert (stream.steered, stream.missed) == (1, 0)
    marker = engine.begin()  # the next message that the hub gets
    engine.hear(delta_for(stream))
    assert len(engine.table) == 1
    engine.end(marker, 0)


def test_streams_wait_for_their_deltas_together(engine: Engine) -> None:
    streams = [engine.begin() for _ in range(5)]
    engine.hub.send(*(delta_for(stream, VALUES + i) for i, stream in reversed(list(enumerate(streams)))))
    engine.table.collect(streams)
    for i, stream in enumerate(streams):
        assert isinstance(stream.answer, DenseDelta)
        assert stream.answer.values.tolist() == (VALUES + i).tolist()


# Deltas that do not fit


@pytest.mark.parametrize(
    ("position", "tokens"),
    [
        (0, []),
        (1, [3]),
        (2, [3, 5]),
        (2, [4, 3]),
        (3, [3, 4]),
        (3, [3, 4, 0]),
        (2, []),
    ],
)
def test_a_delta_of_any_other_prefix_is_dropped(engine: Engine, position: int, tokens: list[int]) -> None:
    stream = engine.begin([3])
    engine.advance(stream, 4)
    wrong = Delta(stream.id, position, extend_hash(0, tokens), encode_lossless(VALUES))
    engine.hear(wrong)
    assert stream.answer is None
    engine.hub.send(wrong, delta_for(stream, VALUES + 1), wrong)
    engine.table.collect([stream])
    assert isinstance(stream.answer, DenseDelta)
    assert stream.answer.values.tolist() == (VALUES + 1).tolist()


def test_the_first_delta_of_a_prefix_is_the_one(engine: Engine) -> None:
    stream = engine.begin()
    engine.hear(delta_for(stream), delta_for(stream, VALUES + 1))
    assert isinstance(stream.answer, DenseDelta)
    assert stream.answer.values.tolist() == VALUES.tolist()


def test_a_delta_of_an_unknown_stream_is_dropped(engine: Engine) -> None:
    stream = engine.begin()
    engine.hear(msgspec.structs.replace(delta_for(stream), stream="chatcmpl-1.other"))
    assert stream.answer is None


def nan_delta() -> bytes:
    payload = bytearray(encode_lossless(VALUES))
    payload[9:13] = np.array([math.nan], "<f4").tobytes()
    return bytes(payload)


GARBAGE = [b"", b"\x09" + bytes(30), encode_lossless(VALUES)[:-1], nan_delta()]


@pytest.mark.parametrize("payload", GARBAGE)
def test_an_unusable_delta_is_counted_and_not_waited_for_again(
    engine: Engine, log: pytest.LogCaptureFixture, payload: bytes
) -> None:
    stream = engine.begin()
    for token in (1, 2, 3):
        engine.hear(msgspec.structs.replace(delta_for(stream), payload=payload))
        engine.table.collect([stream])  # returns at once: no other delta will come
        assert stream.answer is None
        engine.advance(stream, token)
    assert stream.invalid == 3
    assert engine.end(stream, 0) == (0, 3)
    warnings = [record.getMessage() for record in log.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2, warnings  # one for all bad deltas, one at the end
    assert "0 tokens steered, 3 missed, 3 unusable answers" in warnings[1]


def test_a_good_delta_after_a_bad_one_is_taken(engine: Engine) -> None:
    stream = engine.begin()
    engine.hub.send(msgspec.structs.replace(delta_for(stream), payload=b"bad"), delta_for(stream))
    engine.hear()
    engine.table.collect([stream])
    assert stream.answer is not None
    assert stream.undecided is True


def test_ids_beyond_the_large_models_vocabulary_are_unusable(engine: Engine) -> None:
    stream = engine.begin()
    row = np.full(VOCAB + 1, -20, np.float32)
    row[VOCAB] = 0
    payload = encode_sparse(row, np.full(VOCAB + 1, -20, np.float32), 1.0)
    engine.hear(msgspec.structs.replace(delta_for(stream), payload=payload))
    assert stream.answer is None
    assert stream.invalid == 1


# Waiting


def test_without_an_answer_the_token_is_missed_when_the_deadline_has_passed(engine: Engine) -> None:
    stream = engine.begin(deadline_ms=5)
    engine.table.collect([stream])
    assert stream.answer is None
    assert stream.undecided is False
    assert left_s(stream, stream.waits_since) == 0  # silent
    assert engine.end(stream) == (0, 1)


def test_a_deadline_of_zero_takes_what_is_there(engine: Engine) -> None:
    stream = engine.begin(deadline_ms=0)
    engine.hear(delta_for(stream))
    engine.table.collect([stream])
    assert engine.end(stream) == (1, 0)


def test_the_wait_counts_from_the_question_and_ends_with_the_answer(engine: Engine) -> None:
    stream = engine.begin(deadline_ms=500)
    assert left_s(stream, stream.waits_since) == pytest.approx(0.5)
    assert left_s(stream, stream.waits_since + 0.4) == pytest.approx(0.1)
    assert left_s(stream, stream.waits_since + 0.6) == 0
    engine.hear(delta_for(stream))
    assert left_s(stream, stream.waits_since) == 0
    engine.advance(stream, 1)
    assert left_s(stream, stream.waits_since) == pytest.approx(0.5)


def test_after_a_miss_no_further_wait_until_something_arrives(engine: Engine) -> None:
    stream = engine.begin(deadline_ms=5)
    late = delta_for(stream)
    engine.table.collect([stream])
    engine.advance(stream, 1)
    assert left_s(stream, stream.waits_since) == 0
    engine.table.collect([stream])
    engine.advance(stream, 2)
    assert left_s(stream, stream.waits_since) == 0
    engine.hear(late)  # of no use, and no reason to wait for the next: it will be late as well
    assert stream.answer is None
    assert left_s(stream, stream.waits_since) == 0
    engine.hear(delta_for(stream))
    engine.table.collect([stream])
    engine.advance(stream, 3)
    assert left_s(stream, stream.waits_since) == pytest.approx(0.005)  # that one came in time: the edge worker has caught up
    assert engine.end(stream, 0) == (1, 2)


def test_one_silent_stream_does_not_shorten_the_wait_of_another(engine: Engine) -> None:
    silent = engine.begin(deadline_ms=1)
    engine.table.collect([silent])
    other = engine.begin()
    engine.hub.send(delta_for(other))
    engine.table.collect([silent, other])
    assert (silent.undecided, other.undecided) == (False, True)


# Edge fusion

GREEDY = Sampling(temperature=0.0)
OFFER = encode_candidates(BasePolicy(np.array([1, 4, 6]), np.log([0.5, 0.3, 0.1]), 0.1))


def offered(engine: Engine, stream: SteeredStream, payload: bytes = OFFER) -> None:
    engine.table.offer(stream, payload)
    assert engine.hub.next(Candidates) == Candidates(stream.id, stream.position, stream.protocol.prefix_hash, payload)


def choice_for(stream: SteeredStream, token: int = 4) -> Choice:
    return Choice(stream.id, stream.position, stream.protocol.prefix_hash, token)


def choose(engine: Engine, stream: SteeredStream, token: int) -> None:
    engine.hub.send(choice_for(stream, token))
    engine.table.collect([stream])


def test_an_edge_fused_stream_tells_how_to_draw(engine: Engine) -> None:
    sampling = Sampling(0.7, 0.9, 20, 0.1, 5, 0.8, 12.0)
    stream = engine.table.begin(request(), [5, 6], frozenset(), sampling)
    assert engine.hub.next(Begin) == Begin(stream.id, "chatcmpl-1", "laptop", QUERY, 1.5, [5, 6], GRANT, sampling)


def test_chosen_tokens_are_taken_one_by_one_and_counted(engine: Engine) -> None:
    stream = engine.begin(sampling=GREEDY)
    for token in (4, 1, 6):
        offered(engine, stream)
        choose(engine, stream, token)
        assert (stream.answer, stream.payload, stream.undecided) == (token, bytes([token, 0, 0, 0]), True)
        engine.advance(stream, token)
        assert stream.answer is stream.payload is stream.offer is None  # of the former prefix
    assert engine.end(stream, 0) == (3, 0)


def test_candidates_are_offered_once_per_position(engine: Engine) -> None:
    stream = engine.begin(sampling=GREEDY)
    offered(engine, stream)
    for _ in range(3):
        engine.table.offer(stream, OFFER)
    choose(engine, stream, 4)
    engine.table.offer(stream, OFFER)
    engine.advance(stream, 4)  # the next message that the hub gets
    offered(engine, stream)
    assert len(engine.hub.messages(Candidates)) == 2


@pytest.mark.parametrize("token", [0, 5, 7, VOCAB, 2**31 - 1])
def test_a_token_that_was_not_among_the_candidates_is_unusable(engine: Engine, log: pytest.LogCaptureFixture, token: int) -> None:
    stream = engine.begin(sampling=GREEDY)
    for _ in range(2):
        offered(engine, stream)
        engine.hear(choice_for(stream, token))
        engine.table.collect([stream])  # returns at once: no other answer will come
        assert stream.answer is None
        engine.advance(stream, 4)
    assert stream.invalid == 2
    assert engine.end(stream, 0) == (0, 2)
    assert "a choice of a token that was not among the candidates" in log.text
    assert "2 missed, 2 unusable answers" in log.text


def test_a_choice_before_anything_was_offered_is_unusable(engine: Engine) -> None:
    stream = engine.begin(sampling=GREEDY)
    engine.hear(choice_for(stream))
    assert (stream.answer, stream.invalid) == (None, 1)
    offered(engine, stream)
    engine.hear(choice_for(stream))
    assert stream.answer == 4


def test_an_answer_of_the_other_fusion_is_unusable(engine: Engine) -> None:
    edge, cloud = engine.begin(sampling=GREEDY), engine.begin()
    offered(engine, edge)
    engine.hear(delta_for(edge), choice_for(cloud))
    for stream in (edge, cloud):
        assert stream.answer is stream.payload is None
        assert stream.invalid == 1
    engine.table.collect([edge, cloud])  # returns at once
    assert engine.end(edge) == engine.end(cloud) == (0, 1)


@pytest.mark.parametrize(("position", "tokens"), [(0, []), (2, [3, 5]), (3, [3, 4, 0]), (2, [])])
def test_a_choice_of_any_other_prefix_is_dropped(engine: Engine, position: int, tokens: list[int]) -> None:
    stream = engine.begin([3], sampling=GREEDY)
    engine.advance(stream, 4)
    offered(engine, stream)
    wrong = Choice(stream.id, position, extend_hash(0, tokens), 4)
    engine.hear(wrong)
    assert (stream.answer, stream.invalid) == (None, 0)
    engine.hear(choice_for(stream, 6), wrong, choice_for(stream, 1))
    assert stream.answer == 6


def test_a_choice_that_would_have_been_in_time_ends_the_silence_and_a_late_one_does_not(engine: Engine) -> None:
    """Nobody waits for a silent stream: were only choices in time heard, it would be silent for ever."""
    stream = engine.begin(deadline_ms=2000, sampling=GREEDY)
    late = []
    for token in (1, 2):
        offered(engine, stream)
        late.append(choice_for(stream))
        engine.table.collect([stream])  # waits for the first only
        engine.advance(stream, token)
    offered(engine, stream)
    engine.hear(late[0])
    assert left_s(stream, stream.waits_since) == 0
    engine.hear(late[1])
    assert stream.answer is None
    assert left_s(stream, stream.waits_since) == pytest.approx(2.0)
    engine.hear(choice_for(stream))
    engine.table.collect([stream])
    engine.advance(stream, 4)
    assert engine.end(stream, 0) == (1, 2)


def test_of_a_long_answer_only_the_last_offers_are_kept(engine: Engine) -> None:
    stream = engine.begin(deadline_ms=0, sampling=GREEDY)
    for _ in range(100):
        offered(engine, stream)
        engine.table.collect([stream])
        engine.advance(stream, 1)
    assert list(stream.offered_at) == list(range(36, 100))


@pytest.mark.parametrize(("sampling", "of_edge"), [(GREEDY, False), (None, False), (None, True)])
def test_no_other_late_answer_ends_it(engine: Engine, sampling: Sampling | None, of_edge: bool) -> None:
    stream = engine.begin(deadline_ms=5, sampling=sampling)
    late = choice_for(stream) if of_edge else delta_for(stream)
    engine.table.collect([stream])
    engine.advance(stream, 1)
    if sampling is not None:
        offered(engine, stream)
    engine.hear(late)
    assert left_s(stream, stream.waits_since) == 0


def test_the_wait_for_a_choice_counts_from_the_offer(engine: Engine) -> None:
    stream = engine.begin(deadline_ms=500, sampling=GREEDY)
    begun_at = stream.waits_since
    offered(engine, stream)
    assert stream.waits_since > begun_at
    assert left_s(stream, stream.waits_since) == pytest.approx(0.5)
    engine.hear(choice_for(stream))
    assert left_s(stream, stream.waits_since) == 0


def test_a_stream_that_was_offered_nothing_is_not_waited_for(engine: Engine) -> None:
    stream = engine.begin(sampling=GREEDY)  # waiting would fail the test
    engine.table.collect([stream])
    assert engine.end(stream) == (0, 1)


def test_a_stream_that_the_edge_ended_is_offered_nothing(engine: Engine) -> None:
    stream = engine.begin(sampling=GREEDY)
    engine.hear(End(stream.id, "refused", "no consent"))
    engine.table.offer(stream, OFFER)
    engine.table.collect([stream])
    assert engine.end(stream) == (0, 1)  # and the next message is the End
    assert engine.hub.messages(Candidates) == []


def test_a_hub_that_restarted_is_told_of_the_candidates_too(engine: Engine) -> None:
    waiting, resting = engine.begin(sampling=GREEDY), engine.begin(sampling=GREEDY)
    offered(engine, waiting)
    choose(engine, waiting, 6)
    engine.advance(waiting, 6)
    offered(engine, waiting)
    since = waiting.waits_since
    engine.hub.send(*[Refused("join", "who are you?")] * 3, choice_for(waiting, 1))
    engine.table.collect([waiting])
    assert engine.hub.next(Join)
    again = engine.hub.next(Begin)
    assert (again.stream, again.tokens, again.sampling) == (waiting.id, [6], GREEDY)
    assert engine.hub.next(Candidates) == waiting.offer
    assert engine.hub.next(Begin).stream == resting.id
    assert waiting.waits_since == since  # its token has waited since then
    assert waiting.answer == 1
    assert engine.end(waiting) == (2, 0)  # and the next message is the End: nothing was offered for ``resting``


def test_with_a_full_queue_an_offer_is_not_waited_for() -> None:
    link = HubLink(unused_endpoint(), None)
    table = StreamTable(link, VOCAB)
    stream = table.begin(request(), [], frozenset(), GREEDY)
    while not link.num_dropped:
        link.send(End("x", "finished"))
    table.offer(stream, OFFER)
    table.collect([stream])
    assert stream.undecided is False
    link.close()


# The hub


def test_the_end_of_a_stream_from_the_edge_is_final(engine: Engine, log: pytest.LogCaptureFixture) -> None:
    stream = engine.begin()
    engine.answer(stream)
    engine.advance(stream, 1)
    engine.hear(End(stream.id, "detached", "gone"), delta_for(stream))
    assert stream.answer is None  # what comes after the end is not used
    engine.table.collect([stream])
    engine.table.advance(stream, [2])  # nobody is asked any more
    engine.table.collect([stream])
    assert engine.end(stream) == (1, 2)
    assert "1 tokens steered, 2 missed (edge: detached)" in log.text


def test_a_delta_that_came_before_the_end_is_used(engine: Engine) -> None:
    stream = engine.begin()
    engine.hear(delta_for(stream), End(stream.id, "detached"))
    engine.table.collect([stream])
    assert engine.end(stream) == (1, 0)


def test_a_hub_that_restarted_is_joined_again_and_told_of_the_streams(engine: Engine) -> None:
    stream = engine.begin()
    engine.answer(stream)
    engine.advance(stream, 3)
    refused = [Refused("join", "who are you?")] * 3  # one for every frame that was on the way
    engine.hub.send(*refused, delta_for(stream))
    engine.table.collect([stream])
    assert engine.hub.next(Join)
    again = engine.hub.next(Begin)
    assert (again.stream, again.tokens, again.query) == (stream.id, [3], stream.request.query)
    assert engine.end(stream) == (2, 0)  # and the next message is the End: the hub was joined once


def test_other_refusals_are_told(engine: Engine, log: pytest.LogCaptureFixture) -> None:
    engine.hear(Refused("version", "the hub speaks version 2: install a newer costeer-vllm"), Joined("x"))
    assert "install a newer costeer-vllm" in log.text


def test_frames_that_are_no_messages_change_nothing(engine: Engine) -> None:
    stream = engine.begin()
    engine.hear(b"\xc1", b"\x82\xa4type\xa5Delta\xa1x" + b"\x91" * 100_000)
    engine.answer(stream)
    assert engine.end(stream) == (1, 0)


def test_with_no_hub_and_a_full_queue_nothing_waits(log: pytest.LogCaptureFixture) -> None:
    link = HubLink(unused_endpoint(), None)
    table = StreamTable(link, VOCAB)
    stream = table.begin(request(deadline_ms=1), [], frozenset())
    table.collect([stream])
    while not link.num_dropped:
        table.advance(stream, [1])
    fresh = table.begin(request(LONG_MS), [], frozenset())
    table.collect([fresh])  # its Begin was dropped: no delta will come
    assert fresh.undecided is False
    table.end(stream, "finished", 1)
    assert (stream.steered, stream.missed) == (0, stream.position + 1)
    assert stream.position <= _MAX_QUEUED_FRAMES + 1
    link.close()


# Other ranks, and failures


def test_a_mute_table_decides_as_it_is_told() -> None:
    table = StreamTable(None, VOCAB)
    stream = table.begin(request(), [1], frozenset())
    table.collect([stream])
    table.adopt(stream, encode_lossless(VALUES))
    assert isinstance(stream.answer, DenseDelta)
    table.advance(stream, [2])
    assert stream.answer is stream.payload is None
    assert stream.position == 2
    table.adopt(stream, None)
    assert stream.answer is None
    row = np.log(np.full(VOCAB, 1 / VOCAB, np.float32))
    table.adopt(stream, encode_sparse(row, row, 1.0))
    assert isinstance(stream.answer, SparseDelta)
    table.end(stream, "finished", 1)
    assert len(table) == 0


def test_a_mute_table_takes_over_chosen_tokens() -> None:
    table = StreamTable(None, VOCAB)
    stream = table.begin(request(), [1], frozenset(), GREEDY)
    table.offer(stream, OFFER)
    assert stream.offer is None
    table.collect([stream])
    for token in (0, 6, 2**31 - 1):
        table.adopt(stream, token.to_bytes(4, "little"))
        assert stream.answer == token
        table.advance(stream, [2])
        assert stream.answer is stream.payload is None
    table.adopt(stream, None)
    assert stream.answer is None


def test_giving_up_uses_no_choice_from_there_on(engine: Engine) -> None:
    stream = engine.begin(sampling=GREEDY)
    offered(engine, stream)
    choose(engine, stream, 4)
    engine.table.give_up()
    assert stream.answer is None
    engine.hear(choice_for(stream))
    engine.table.collect([stream])
    assert engine.end(stream) == (0, 1)


def test_giving_up_uses_no_delta_from_there_on(engine: Engine) -> None:
    decided, waiting = engine.begin(), engine.begin()
    engine.answer(decided)
    engine.table.give_up()
    assert decided.answer is None
    assert decided.undecided is False
    engine.hear(delta_for(decided), delta_for(waiting))
    engine.table.collect([decided, waiting])
    assert decided.answer is waiting.answer is None
    engine.table.advance(decided, [1])
    assert engine.end(decided) == (0, 2)
    assert engine.end(waiting) == (0, 1)


def test_no_log_line_shows_the_query_or_the_grant(engine: Engine, log: pytest.LogCaptureFixture) -> None:
    stream = engine.begin()
    engine.hear(msgspec.structs.replace(delta_for(stream), payload=b"bad"), Refused("full", "the hub is full"))
    engine.table.collect([stream])
    engine.hear(End(stream.id, "refused", "Hello? is private"))
    engine.end(stream)
    assert log.records
    assert "Hello" not in log.text
    assert GRANT not in log.text


# At random

Step = Callable[[], None]


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.sampled_from(["right", "stale", "guess", "bad", "twice", "nothing"]), st.integers(0, 6)), max_size=12)
)
def test_every_token_is_steered_by_its_own_delta_or_missed(steps: list[tuple[str, int]]) -> None:
    hub = FakeHub()
    link = HubLink(hub.endpoint, None)
    hub.next(Join)
    engine = Engine(hub, StreamTable(link, VOCAB))
    stream, prefix, steered, is_told = engine.begin(deadline_ms=0), [], 0, False
    former = delta_for(stream)
    for what, token in steps:
        own = delta_for(stream, VALUES + len(prefix))
        after = encode_lossless(VALUES + len(prefix) + 1)
        guess = Delta(stream.id, stream.position + 1, extend_hash(stream.protocol.prefix_hash, [token]), after)
        bad = msgspec.structs.replace(own, payload=b"bad")
        stale = [former] if prefix else [guess]
        sent = {"right": [own], "stale": stale, "guess": [guess], "bad": [bad], "twice": [own, own, former], "nothing": []}[what]
        engine.hear(*sent)
        engine.table.collect([stream])
        if is_told or what in ("right", "twice"):
            steered += 1
            assert isinstance(stream.answer, DenseDelta)
            assert stream.answer.values.tolist() == (VALUES + len(prefix)).tolist()
        else:
            assert stream.answer is None
        former, is_told = own, guess in sent
        prefix.append(token)
        engine.advance(stream, token)
    assert engine.end(stream, 0) == (steered, len(steps) - steered)
    link.close()
    hub.close()
