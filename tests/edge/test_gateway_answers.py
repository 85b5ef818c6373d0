"""Streams of events cut anywhere, and what is put into them; objects with one more field."""

import itertools
import json
import re
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from costeer_vllm.edge import answers
from costeer_vllm.edge.accounts import Account
from costeer_vllm.edge.answers import Events, GatewayError, costeer_event, costeer_object, is_done, with_costeer
from costeer_vllm.edge.disclosure import Disclosure
from costeer_vllm.request import parse_options

LINES = st.sampled_from([b"", b"data: {}", b"data: [DONE]", b"data:x", b": hm", b"event: error", b"id", b"data", b"\xff\xfe"])
STREAMS = st.lists(st.tuples(LINES, st.sampled_from([b"\n", b"\r", b"\r\n"])), max_size=20).map(
    lambda lines: b"".join(part for line in lines for part in line)
)


def pieces(stream: bytes, cuts: list[int]) -> list[bytes]:
    bounds = [0, *sorted(cut % (len(stream) + 1) for cut in cuts), len(stream)]
    return [stream[a:b] for a, b in itertools.pairwise(bounds)]


def cut(chunks: list[bytes]) -> list[bytes]:
    events = Events()
    return [event for chunk in chunks for event in events.feed(chunk)] + [events.end()]


@given(STREAMS, st.lists(st.integers(0, 1000), max_size=10))
def test_events_are_the_same_wherever_the_stream_is_cut_and_joined_are_the_stream(stream: bytes, cuts: list[int]) -> None:
    found = cut(pieces(stream, cuts))
    assert b"".join(found) == stream
    assert found == cut([stream])
    assert found == cut([stream[i : i + 1] for i in range(len(stream))])


@given(STREAMS)
def test_every_event_ends_with_a_blank_line_and_has_none_within(stream: bytes) -> None:
    *events, rest = cut([stream])
    for event in events:
        assert re.search(rb"(?:\r\n|\n|\r){2}\Z|\A(?:\r\n|\n|\r)\Z", event)
        lines = re.split(rb"\r\n|\n|\r", event)
        assert b"" not in lines[1:-2]
    assert not re.search(rb"\n\n|\r\n\r\n", rest)


@pytest.mark.parametrize(
    ("event", "done"),
    [
        (b"data: [DONE]\n\n", True),
        (b"data:[DONE]\r\n\r\n", True),
        (b"data: [DONE]\r\r", True),
        (b"data: [DONE]", True),
        (b"\xef\xbb\xbfdata: [DONE]\n\n", True),
        (b": the end\nid: 7\ndata: [DONE]\n\n", True),
        (b'data: {"content": "[DONE]"}\n\n', False),
        (b"data: [DONE]\ndata: [DONE]\n\n", False),
        (b": [DONE]\n\n", False),
        (b"event: [DONE]\ndata: x\n\n", False),
        (b"database: [DONE]\n\n", False),
        (b"", False),
    ],
)
def test_the_last_event(event: bytes, done: bool) -> None:
    assert is_done(event) is done


def test_an_event_that_does_not_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "MAX_EVENT_BYTES", 100)
    events = Events()
    assert list(events.feed(b"x" * 100)) == []
    with pytest.raises(GatewayError, match="more than 100 bytes"):
        list(events.feed(b"x"))


def test_a_long_event_in_small_pieces_takes_no_longer_than_its_length() -> None:
    events, event = Events(), b"data: " + b"x" * (8 * 2**20) + b"\n\n"
    start = time.process_time()
    found = [whole for i in range(0, len(event), 128) for whole in events.feed(event[i : i + 128])]
    assert time.process_time() - start < 2
    assert found == [event]


def test_many_events_in_one_piece_take_no_longer_than_their_length() -> None:
    start = time.process_time()
    assert cut([b"data: x\n\n" * 10**6]) == [b"data: x\n\n"] * 10**6 + [b""]
    assert time.process_time() - start < 10


@pytest.mark.parametrize(
    ("first", "kept"),
    [
        (b'{"id": "a", "object": "b", "created": 1, "model": "m", "choices": [1], "x": 2}',
         {"id": "a", "object": "b", "created": 1, "model": "m"}),
        (b'{"id": "a",\n"created": 1}', {"id": "a", "created": 1}),
        (b"", {}),
        (b"[1]", {}),
        (b"\xff", {}),
        (b'{"\xff": 1}', {}),
        (b"[" * 100_000, {}),
    ],
)  # fmt: skip
def test_the_event_with_the_costeer_object_looks_like_its_stream(first: bytes, kept: dict[str, Any]) -> None:
    event = costeer_event(first, {"worker": "laptop"})
    assert event.startswith(b"data: ")
    assert event.endswith(b"\n\n")
    assert json.loads(event[6:]) == {**kept, "choices": [], "costeer": {"worker": "laptop"}}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text().filter(lambda name: name != "costeer"), JSON, max_size=4), st.sampled_from([None, 2]))
def test_an_object_gets_one_more_field_and_keeps_its_bytes(answer: dict[str, Any], indent: int | None) -> None:
    text = (json.dumps(answer, indent=indent) + "\n").encode()
    found = with_costeer(text, {"worker": "laptop"})
    assert found.startswith(text.strip()[:-1])
    assert json.loads(found) == {**answer, "costeer": {"worker": "laptop"}}


@pytest.mark.parametrize("answer", [b"", b"[]", b"null", b"oh", b"\xff"])
def test_what_is_no_object_stays_as_it_is(answer: bytes) -> None:
    assert with_costeer(answer, {"worker": "laptop"}) == answer


@pytest.mark.parametrize(
    ("account", "counts", "note"),
    [
        (Account(1, num_over=1, tokens_steered=5, num_answers=5), (5, 0), None),
        (Account(1, num_over=1, tokens_steered=5, tokens_missed=2, num_answers=5), (5, 2), None),
        (Account(1, num_over=1, tokens_missed=2, num_answers=1), (0, 2), "no answer of the edge worker came in time"),
        (Account(1, num_over=1, tokens_missed=2), (0, 2), "no answer of the edge worker came in time"),
        (Account(1), (0, None), "the server's hub asked it for nothing"),
        (Account(1, num_lost=1, why="too many"), (0, None), "gave no answer (too many)"),
        (Account(1, num_lost=1, why="gone", num_answers=3), (None, None), "not known here (gone)"),
        (Account(2, num_over=1, tokens_steered=5, num_answers=3), (None, None), "not known here:"),
    ],
)
def test_counts_are_those_of_all_tokens_or_null_with_a_note(account: Account, counts: tuple[Any, Any], note: str | None) -> None:
    found = costeer_object(account, "laptop", parse_options({"strength": 1.5}), Disclosure())
    assert (found["tokens_steered"], found["tokens_missed"]) == counts
    assert (found["worker"], found["fusion"], found["strength"]) == ("laptop", "cloud", 1.5)
    assert (note in found["note"]) if note else ("note" not in found)
    assert found["disclosed_bits"] is None
    assert "max_bits" not in found


def test_what_an_edge_fused_answer_told_is_told() -> None:
    account = Account(1, num_over=1, tokens_steered=5, num_answers=5)
    disclosure = Disclosure(max_bits=4.0, bits=3.14159)  # the device's own budget is less than what the app asked for
    found = costeer_object(account, "laptop", parse_options({"fusion": "edge", "max_bits": 20}), disclosure)
    assert (found["fusion"], found["disclosed_bits"], found["max_bits"]) == ("edge", 3.142, 4.0)
    assert "note" not in found
    disclosure.has_no_room = True
    assert "did not fit" in costeer_object(account, "laptop", parse_options({"fusion": "edge"}), disclosure)["note"]
