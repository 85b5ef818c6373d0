"""The stream's state machine: its table row by row, and that nothing but the asked prefix is ever accepted."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from costeer_vllm.errors import LocalProtocolError, ProtocolError
from costeer_vllm.protocol.messages import Advance, Begin, Choice, Delta, End, Query
from costeer_vllm.protocol.stream import TRANSITIONS, Event, State, Stream, extend_hash

QUERY = Query(prompt="Hello?")
FIRST = [3, 1]  # generated before the stream began


def begin(tokens: list[int] | None = None) -> Begin:
    return Begin("s", "r", "laptop", QUERY, 1.0, tokens or [])


def delta(position: int, prefix_hash: int) -> Delta:
    return Delta("s", position, prefix_hash, b"")


def choice(stream: Stream) -> Choice:
    return Choice("s", stream.position, stream.prefix_hash, 7)


def wanted(stream: Stream) -> Delta:
    return delta(stream.position, stream.prefix_hash)


END = End("s", "finished")


def stream_in(state: State) -> Stream:
    """A stream that came to ``state`` over the shortest way."""
    stream = Stream()
    if state is State.CLOSED:
        assert stream.feed(END)
    if state in (State.ASKED, State.ANSWERED):
        assert stream.feed(begin(FIRST))
    if state is State.ANSWERED:
        assert stream.feed(wanted(stream))
    assert stream.state is state
    return stream


def event_for(stream: Stream, kind: type[Event]) -> Event:
    if kind is Begin:
        return begin(FIRST)
    if kind is Advance:
        return stream.advance("s", [5])
    if kind is Choice:
        return choice(stream)
    return wanted(stream) if kind is Delta else END


# As read aloud in the module's docstring; None: a bug on our side, False: late, dropped.
TABLE = {
    (State.IDLE, Begin): State.ASKED,
    (State.IDLE, Advance): None,
    (State.IDLE, Delta): False,
    (State.IDLE, Choice): False,
    (State.IDLE, End): State.CLOSED,
    (State.ASKED, Begin): State.ASKED,
    (State.ASKED, Advance): State.ASKED,
    (State.ASKED, Delta): State.ANSWERED,
    (State.ASKED, Choice): State.ANSWERED,
    (State.ASKED, End): State.CLOSED,
    (State.ANSWERED, Begin): State.ASKED,
    (State.ANSWERED, Advance): State.ASKED,
    (State.ANSWERED, Delta): False,
    (State.ANSWERED, Choice): False,
    (State.ANSWERED, End): State.CLOSED,
    (State.CLOSED, Begin): False,
    (State.CLOSED, Advance): False,
    (State.CLOSED, Delta): False,
    (State.CLOSED, Choice): False,
    (State.CLOSED, End): State.CLOSED,
}


@pytest.mark.parametrize(("state", "kind"), TABLE, ids=lambda value: getattr(value, "name", None) or value.__name__)
def test_the_table(state: State, kind: type[Event]) -> None:
    stream = stream_in(state)
    event = event_for(stream, kind)
    before = (stream.position, stream.prefix_hash)
    expected = TABLE[state, kind]
    if expected is None:
        with pytest.raises(LocalProtocolError, match=f"{kind.__name__} in state {state.name} of stream s"):
            stream.feed(event)
    else:
        assert stream.feed(event) is bool(expected)
    assert stream.state is (expected or state)
    if not expected:
        assert (stream.position, stream.prefix_hash) == before


def test_the_table_here_is_the_table_there() -> None:
    assert {(state, kind): following for (state, kind), following in TABLE.items() if following} == {
        (state, kind): following for state, row in TRANSITIONS.items() for kind, following in row.items()
    }


def test_a_breach_of_ours_is_told_apart_from_one_of_theirs() -> None:
    assert issubclass(LocalProtocolError, ProtocolError)
    with pytest.raises(LocalProtocolError):
        Stream().feed(Advance("s", 1, 1, [1]))


def test_position_and_hash_follow_the_tokens() -> None:
    stream = Stream()
    stream.feed(begin(FIRST))
    assert (stream.position, stream.prefix_hash) == (2, extend_hash(0, FIRST))
    message = stream.advance("s", [5, 9])
    assert message == Advance("s", 4, extend_hash(0, [3, 1, 5, 9]), [5, 9])
    assert stream.position == 2  # not fed yet
    stream.feed(message)
    assert (stream.position, stream.prefix_hash) == (4, extend_hash(0, [3, 1, 5, 9]))


@pytest.mark.parametrize("tokens", [[], FIRST])
def test_a_begin_asks_for_the_delta_of_its_own_position(tokens: list[int]) -> None:
    stream = Stream()
    stream.feed(begin(tokens))
    assert stream.wants(delta(len(tokens), extend_hash(0, tokens)))
    assert not stream.wants(delta(len(tokens) + 1, extend_hash(0, tokens)))
    assert not stream.wants(delta(len(tokens), extend_hash(0, [*tokens, 1])))


PREFIXES = st.lists(st.integers(0, 3), max_size=6)


@settings(max_examples=400)
@given(st.lists(st.one_of(PREFIXES, st.sampled_from(["next", "end"])), max_size=40), st.randoms(use_true_random=False))
def test_only_the_delta_of_the_asked_prefix_is_ever_accepted(happenings: list[list[int] | str], rng: random.Random) -> None:
    """Deltas of any prefixes come late, twice, early, out of order, of guessed tokens; tokens are chosen in between."""
    stream, prefix, answered = Stream(), [], False
    stream.feed(begin())
    for happening in happenings:
        if happening == "end":
            stream.feed(END)
            prefix = None
        elif happening == "next":
            if prefix is not None:
                chosen = [rng.randrange(4) for _ in range(rng.choice([1, 1, 1, 2]))]
                assert stream.feed(stream.advance("s", chosen))
                prefix, answered = prefix + chosen, False
        else:
            expected = prefix == happening and not answered
            arriving = delta(len(happening), extend_hash(0, happening))
            assert stream.wants(arriving) is expected
            assert stream.feed(arriving) is expected
            answered |= expected


@settings(max_examples=400)
@given(st.integers(0, 2**31), st.integers(0, 2**64 - 1), st.lists(st.integers(0, 10), max_size=3))
def test_position_and_hash_must_both_fit(position: int, prefix_hash: int, tokens: list[int]) -> None:
    stream = Stream()
    stream.feed(begin(tokens))
    fits = (position, prefix_hash) == (stream.position, stream.prefix_hash)
    assert stream.wants(delta(position, prefix_hash)) is fits
    assert not stream.wants(delta(position + len(tokens) + 1, stream.prefix_hash))


# The rolling hash

TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=30)


def test_the_empty_prefix_hashes_to_zero_and_the_hash_fits_the_message() -> None:
    assert extend_hash(0, []) == 0
    assert 0 < extend_hash(0, [0]) < 2**64


def test_the_hash_is_the_same_on_every_machine() -> None:
    """Both ends compute it, in versions of their own."""
    assert extend_hash(0, [1, 2, 3]) == 0x876393AA222F47BD
    assert extend_hash(0, [0] * 5) == 0xEEF5AB7798374D4D


@given(TOKENS, TOKENS)
def test_a_prefix_may_be_extended_in_pieces(head: list[int], tail: list[int]) -> None:
    assert extend_hash(extend_hash(0, head), tail) == extend_hash(0, head + tail)
    assert extend_hash(0, iter(head)) == extend_hash(0, tuple(head))


@given(TOKENS, st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1), TOKENS)
def test_one_changed_token_always_shows(head: list[int], one: int, other: int, tail: list[int]) -> None:
    equal = extend_hash(0, [*head, one, *tail]) == extend_hash(0, [*head, other, *tail])
    assert equal == (one == other)


@given(st.lists(st.integers(0, 5), min_size=2, max_size=8), st.randoms(use_true_random=False))
def test_the_order_of_tokens_shows(tokens: list[int], rng: random.Random) -> None:
    shuffled = list(tokens)
    rng.shuffle(shuffled)
    assert (extend_hash(0, tokens) == extend_hash(0, shuffled)) == (tokens == shuffled)


@given(TOKENS)
def test_length_shows(tokens: list[int]) -> None:
    hashes = [extend_hash(0, tokens[:length]) for length in range(len(tokens) + 1)]
    hashes += [extend_hash(0, [*tokens, 0]), extend_hash(0, [*tokens, 0, 0])]
    assert len(set(hashes)) == len(hashes)


def test_short_prefixes_do_not_collide() -> None:
    hashes = {extend_hash(0, [a, b, c]) for a in range(30) for b in range(30) for c in range(30)}
    assert len(hashes) == 30**3
