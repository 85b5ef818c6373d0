"""Deltas that come unasked: kept for exactly their prefix, bounded, and gone once they cannot come true."""

import random
from collections.abc import Iterator

import numpy as np
import pytest

from costeer_vllm.delta import DenseDelta, encode_lossless
from costeer_vllm.engine.guesses import Guesses
from costeer_vllm.engine.link import HubLink
from costeer_vllm.engine.streams import SteeredStream, StreamTable
from costeer_vllm.protocol.messages import (
    MAX_GUESS_BYTES,
    MAX_GUESSES,
    Advance,
    Begin,
    Delta,
    End,
    Join,
    Query,
    Refused,
    Sampling,
    Turn,
)
from costeer_vllm.protocol.stream import extend_hash
from costeer_vllm.request import SteeringRequest

from .fake_hub import TIMEOUT_S, FakeHub, delta_of

VOCAB = 16

pytestmark = pytest.mark.timeout(TIMEOUT_S * 2)


def delta(tokens: list[int], payload: bytes = b"delta", stream: str = "s") -> Delta:
    return Delta(stream, len(tokens), extend_hash(0, tokens), payload)


# The store


def test_a_guess_is_taken_for_exactly_its_prefix() -> None:
    guesses = Guesses()
    for tokens in ([1], [2], [1, 3], [2, 3]):
        guesses.keep(delta(tokens), 0)
    assert guesses.take(1, extend_hash(0, [9])) is None
    assert len(guesses) == 2, "those of position 1 cannot come true any more"
    assert guesses.take(2, extend_hash(0, [1, 3])) == delta([1, 3])
    assert (len(guesses), guesses.num_bytes) == (0, 0)


def test_what_does_not_lie_ahead_is_not_kept() -> None:
    guesses = Guesses()
    guesses.keep(delta([1, 2]), 2)
    guesses.keep(delta([1]), 2)
    assert len(guesses) == 0
    guesses.keep(delta([1, 2, 3]), 2)
    guesses.clear()
    assert guesses.take(3, extend_hash(0, [1, 2, 3])) is None


def test_the_newest_stay_within_number_and_bytes() -> None:
    guesses = Guesses()
    rng = random.Random(0)
    sent: list[Delta] = []
    for i in range(500):
        sent.append(delta([i], bytes(rng.choice((0, 10, 1000, MAX_GUESS_BYTES // 3)))))
        guesses.keep(sent[-1], 0)
        assert len(guesses) <= MAX_GUESSES
        assert guesses.num_bytes <= MAX_GUESS_BYTES
        if rng.random() < 0.02:
            guesses.take(1, 0)
            assert (len(guesses), guesses.num_bytes) == (0, 0)
    guesses.clear()
    for i in range(100):
        guesses.keep(delta([i], b"abc"), 0)
    assert (len(guesses), guesses.num_bytes) == (MAX_GUESSES, 3 * MAX_GUESSES)
    assert guesses.take(1, extend_hash(0, [100 - MAX_GUESSES])) is not None
    guesses.keep(delta([1, 2], bytes(MAX_GUESS_BYTES + 1)), 0)
    assert len(guesses) == 0, "larger than all that may be kept"


def test_the_same_guess_twice_counts_once() -> None:
    guesses = Guesses()
    guesses.keep(delta([1], b"long ago"), 0)
    guesses.keep(delta([1], b"new"), 0)
    assert (len(guesses), guesses.num_bytes) == (1, 3)


# In the stream table, over a real link


class Engine:
    def __init__(self, hub: FakeHub, link: HubLink) -> None:
        self.hub, self.table = hub, StreamTable(link, VOCAB)

    def begin(self, sampling: Sampling | None = None, deadline_ms: float = 60_000.0) -> SteeredStream:
        asks = SteeringRequest("r", "laptop", Query(messages=[Turn("user", "Hi")]), 1.0, deadline_ms, "continue", None)
        stream = self.table.begin(asks, [], frozenset(), sampling)
        self.begun = self.hub.next(Begin)
        return stream

    def tell(self, stream: SteeredStream, *prefixes: list[int]) -> None:
        """The edge worker tells the deltas of these prefixes; what comes last is waited for."""
        self.hub.send(*(Delta(stream.id, len(p), extend_hash(0, p), encode_lossless(delta_of(p, VOCAB))) for p in prefixes))
        marker = self.begin()
        self.hub.send(Delta(marker.id, 0, 0, encode_lossless(delta_of([], VOCAB))))
        self.table.collect([marker])
        assert marker.answer is not None
        self.table.end(marker, "finished", 0)
        self.hub.next(End)

    def advance(self, stream: SteeredStream, *tokens: int) -> Advance:
        self.table.advance(stream, list(tokens))
        return self.hub.next(Advance)


@pytest.fixture
def engine(hub: FakeHub) -> Iterator[Engine]:
    link = HubLink(hub.endpoint, None)
    hub.next(Join)
    yield Engine(hub, link)
    link.close()


def has(stream: SteeredStream, tokens: list[int]) -> bool:
    return isinstance(stream.answer, DenseDelta) and np.array_equal(stream.answer.values, delta_of(tokens, VOCAB))


def test_a_guess_that_comes_true_answers_at_once(engine: Engine) -> None:
    stream = engine.begin()
    assert engine.begun.guess_bytes == MAX_GUESS_BYTES
    engine.tell(stream, [], [4], [4, 5], [4, 6], [4, 5, 1])
    assert has(stream, [])
    engine.table.collect([stream])
    for tokens in ([4], [4, 5], [4, 5, 1]):
        assert engine.advance(stream, tokens[-1]).position == len(tokens), "the edge worker is told all the same"
        assert has(stream, tokens)
        engine.table.collect([stream])
    engine.advance(stream, 3)
    assert stream.answer is None, "nobody guessed that"
    engine.tell(stream, [4, 5, 1, 3])
    engine.table.collect([stream])
    engine.table.end(stream, "finished", 1)
    assert engine.hub.next(End) == End(stream.id, "finished", "", 5, 0)


def test_a_guess_of_another_history_is_never_used(engine: Engine) -> None:
    stream = engine.begin()
    engine.tell(stream, [], [4], [4, 5])
    engine.advance(stream, 3)
    assert stream.answer is None
    engine.advance(stream, 5)
    assert stream.answer is None
    assert len(stream.guesses) == 0


def test_a_guess_that_arrives_when_it_is_asked_for_is_an_answer(engine: Engine) -> None:
    stream = engine.begin()
    engine.tell(stream, [])
    engine.advance(stream, 4, 5)
    engine.tell(stream, [4], [4, 5], [4, 5, 6])
    assert has(stream, [4, 5])
    engine.advance(stream, 6)
    assert has(stream, [4, 5, 6])


def test_a_guess_that_cannot_be_used_costs_its_token_only(engine: Engine) -> None:
    stream = engine.begin()
    engine.tell(stream, [])
    engine.hub.send(Delta(stream.id, 1, extend_hash(0, [4]), b"nonsense"))
    engine.tell(stream, [4, 5])
    engine.advance(stream, 4)
    assert (stream.answer, stream.invalid) == (None, 1)
    engine.advance(stream, 5)
    assert has(stream, [4, 5])


def test_no_guess_is_used_once_the_table_gave_up(engine: Engine) -> None:
    stream = engine.begin()
    engine.tell(stream, [], [4])
    engine.table.give_up()
    engine.table.advance(stream, [4])
    assert stream.answer is None


def test_guesses_of_an_edge_fused_stream_are_not_kept(engine: Engine) -> None:
    stream = engine.begin(Sampling())
    assert engine.begun.guess_bytes == 0
    engine.tell(stream, [4])
    assert len(stream.guesses) == 0


def test_a_stream_that_begins_again_forgets_what_was_guessed(engine: Engine) -> None:
    """After a restart of the hub the edge worker tells everything anew."""
    stream = engine.begin()
    engine.tell(stream, [], [9, 4])
    engine.advance(stream, 9)
    answer = Delta(stream.id, 1, extend_hash(0, [9]), encode_lossless(delta_of([9], VOCAB)))
    engine.hub.send(Refused("join", "who are you?"), answer)
    engine.table.collect([stream])
    assert has(stream, [9])
    assert isinstance(engine.hub.next(Join), Join)
    assert engine.hub.next(Begin).tokens == [9]
    engine.advance(stream, 4)
    assert stream.answer is None
