"""Every message there and back, in its own directions only; old and new ends understand each other; sizes are bounded."""

import string
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from costeer_vllm.protocol.messages import (
    MAX_FRAME_BYTES,
    MAX_QUERY_BYTES,
    MAX_TOKENS,
    PROTOCOL_VERSION,
    Admit,
    Admitted,
    Advance,
    Attach,
    Attached,
    Begin,
    Candidates,
    Choice,
    Delta,
    End,
    Join,
    Joined,
    Message,
    Query,
    Reattached,
    Refused,
    Sampling,
    Turn,
    Vocabulary,
    decode_edge_to_hub,
    decode_engine_to_hub,
    decode_hub_to_edge,
    decode_hub_to_engine,
    encode,
)

VOCABULARY = Vocabulary("0123456789abcdef" * 4, 151_936)
DIGEST = "f" * 64
CHAT = Query(messages=[Turn("system", "Be brief."), Turn("user", "Schön?")], continue_final_message=True)

Decoder = Callable[[bytes], Message]
DECODERS: dict[str, Decoder] = {
    "edge to hub": decode_edge_to_hub,
    "hub to edge": decode_hub_to_edge,
    "engine to hub": decode_engine_to_hub,
    "hub to engine": decode_hub_to_engine,
}

# The table of the module's docstring.
DIRECTIONS: dict[type[Message], set[str]] = {
    Attach: {"edge to hub"},
    Candidates: {"hub to edge", "engine to hub"},
    Delta: {"edge to hub", "hub to engine"},
    Choice: {"edge to hub", "hub to engine"},
    End: {"edge to hub", "hub to edge", "engine to hub", "hub to engine"},
    Attached: {"hub to edge"},
    Refused: {"hub to edge", "hub to engine"},
    Begin: {"hub to edge", "engine to hub"},
    Advance: {"hub to edge", "engine to hub"},
    Join: {"engine to hub"},
    Admit: {"engine to hub"},
    Joined: {"hub to engine"},
    Admitted: {"hub to engine"},
    Reattached: {"hub to engine"},
}

EXAMPLES: list[Message] = [
    Attach(PROTOCOL_VERSION, "laptop", "instance", "Qwen2.5-1.5B", VOCABULARY),
    Attach(7, "a@b.c:d-e_f", "i", "", VOCABULARY, "attach", DIGEST, 4096),
    Attach(PROTOCOL_VERSION, "laptop", "instance", "", VOCABULARY, fusions=("edge",)),
    Attached("laptop", 10.0),
    Refused("worker", "no edge worker is attached"),
    Refused("join", "", 2**53 - 1),
    Reattached("chatcmpl-1.0"),
    Join(PROTOCOL_VERSION),
    Joined("costeer hub 0.1.0"),
    Admit(PROTOCOL_VERSION, 0, VOCABULARY),
    Admit(PROTOCOL_VERSION, 3, VOCABULARY, "laptop", "martin", DIGEST),
    Admit(PROTOCOL_VERSION, 3, VOCABULARY, fusion="edge"),
    Admitted(3, "laptop", True),
    Begin("s", "r", "laptop", Query(prompt="Hello?"), 1.783),
    Begin("s" * 192, "r", "laptop", CHAT, -1000.0, [0, 5, 2**31 - 1], DIGEST),
    Begin("s", "r", "laptop", CHAT, 1.0, sampling=Sampling(0.0, 0.9, 20, 0.1, -3, 0.5, 20.0)),
    Advance("s", 1, 2**64 - 1, [7]),
    Advance("s", 2**31 - 1, 0, []),
    Delta("s", 0, 0, b""),
    Delta("s", 3, 2**64 - 1, bytes(range(256))),
    Candidates("s", 0, 0, b""),
    Candidates("s", 3, 2**64 - 1, bytes(range(256))),
    Choice("s", 0, 0, 0),
    Choice("s", 3, 2**64 - 1, 2**31 - 1),
    End("s", "finished"),
    End("s", "detached", "the edge worker's connection is gone", 2**53 - 1, 12),
]


def test_the_examples_and_the_table_know_every_message() -> None:
    assert {type(message) for message in EXAMPLES} == set(DIRECTIONS) == set(Message.__subclasses__())


@pytest.mark.parametrize("direction", list(DECODERS))
@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_a_message_arrives_as_it_was_sent_in_its_directions_and_is_refused_in_others(message: Message, direction: str) -> None:
    if direction in DIRECTIONS[type(message)]:
        received = DECODERS[direction](encode(message))
        assert received == message
        assert type(received) is type(message)
    else:
        with pytest.raises(msgspec.ValidationError, match=type(message).__name__):
            DECODERS[direction](encode(message))


def decoded(message: object, kind: type[Message]) -> Message:
    return DECODERS[min(DIRECTIONS[kind])](msgspec.msgpack.encode(message))


def fields_of(message: Message) -> dict[str, Any]:
    fields: dict[str, Any] = msgspec.to_builtins(message, builtin_types=(bytes,))
    return fields


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_fields_of_a_later_version_are_ignored(message: Message) -> None:
    later = {**fields_of(message), "added_later": {"nested": [1, None, b"x"]}, "version_two": True}
    assert decoded(later, type(message)) == message


def test_fields_of_a_later_version_are_ignored_inside_too() -> None:
    begin = Begin("s", "r", "laptop", CHAT, 1.0)
    later = fields_of(begin)
    later["query"]["images"] = []
    for turn in later["query"]["messages"]:
        turn["name"] = "x"
    assert decoded(later, Begin) == begin


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_fields_with_a_default_may_be_left_out_and_others_may_not(message: Message) -> None:
    kind = type(message)
    required = {field.encode_name for field in msgspec.structs.fields(kind) if field.required}
    fields = fields_of(message)
    short = {name: value for name, value in fields.items() if name in required or name == "type"}
    decoded(short, kind)
    for name in required:
        with pytest.raises(msgspec.ValidationError, match=name):
            decoded({field: value for field, value in fields.items() if field != name}, kind)


def test_what_the_first_version_requires_stays_all_that_is_required() -> None:
    """A required field added later would cut off every edge worker in the field; a removed one breaks those that rely on it."""
    required = {kind.__name__: [field.name for field in msgspec.structs.fields(kind) if field.required] for kind in DIRECTIONS}
    assert required == {
        "Attach": ["version", "worker", "instance", "model", "vocabulary"],
        "Candidates": ["stream", "position", "prefix_hash", "payload"],
        "Delta": ["stream", "position", "prefix_hash", "payload"],
        "Choice": ["stream", "position", "prefix_hash", "token"],
        "End": ["stream", "reason"],
        "Attached": ["worker", "heartbeat_s"],
        "Refused": ["code", "sentence"],
        "Begin": ["stream", "request", "worker", "query", "strength"],
        "Advance": ["stream", "position", "prefix_hash", "tokens"],
        "Join": ["version"],
        "Admit": ["version", "ticket", "vocabulary"],
        "Joined": ["hub"],
        "Admitted": ["ticket", "worker", "keyed"],
        "Reattached": ["stream"],
    }


def test_a_frame_that_an_old_end_sent_is_still_understood() -> None:
    """Bytes as the first version put them on the wire."""
    frame = bytes.fromhex(
        "85a474797065a544656c7461a673747265616da173a8706f736974696f6e03ab7072656669785f6861736807a77061796c6f6164c40178"
    )
    assert decode_hub_to_engine(frame) == Delta("s", 3, 7, b"x")
    assert encode(Delta("s", 3, 7, b"x")) == frame


def test_no_message_has_a_place_for_private_context() -> None:
    names = {field.name for kind in [*DIRECTIONS, Query, Turn] for field in msgspec.structs.fields(kind)}
    assert not [name for name in names if "context" in name or "private" in name or "profile" in name]


WRONG: list[tuple[type[Message], dict[str, Any]]] = [
    (Attach, {"worker": ""}),
    (Attach, {"worker": "a b"}),
    (Attach, {"worker": "laptop\n"}),
    (Attach, {"worker": ".hidden"}),
    (Attach, {"worker": "x" * 129}),
    (Attach, {"worker": "lapt\u00f6p"}),
    (Attach, {"instance": ""}),
    (Attach, {"instance": "x" * 513}),
    (Attach, {"model": "x" * 513}),
    (Attach, {"attach_key": ""}),
    (Attach, {"attach_key": "x" * 513}),
    (Attach, {"key_digest": "F" * 64}),
    (Attach, {"key_digest": "f" * 63}),
    (Attach, {"key_digest": "f" * 64 + "\n"}),
    (Attach, {"max_streams": 0}),
    (Attach, {"max_streams": 4097}),
    (Attach, {"version": "1"}),
    (Attach, {"vocabulary": {"fingerprint": "f" * 64, "size": 0}}),
    (Attach, {"vocabulary": {"fingerprint": "x", "size": 1}}),
    (Refused, {"code": "x" * 65}),
    (Choice, {"token": -1}),
    (Choice, {"token": 2**31}),
    (Candidates, {"payload": bytes(MAX_FRAME_BYTES + 1)}),
    (Attach, {"fusions": []}),
    (Attach, {"fusions": ["moon"]}),
    (Admit, {"fusion": "moon"}),
    (Refused, {"sentence": "x" * 1025}),
    (Admit, {"ticket": -1}),
    (Admit, {"ticket": 2**53}),
    (Admit, {"user": "x" * 513}),
    (Begin, {"stream": ""}),
    (Begin, {"stream": "x" * 193}),
    (Begin, {"stream": "a b"}),
    (Begin, {"stream": "a\n"}),
    (Begin, {"request": "\u00e9"}),
    (Begin, {"strength": "1"}),
    (Begin, {"tokens": [-1]}),
    (Begin, {"tokens": [2**31]}),
    (Begin, {"tokens": [1.0]}),
    (Begin, {"tokens": [True]}),
    (Begin, {"tokens": [0] * (MAX_TOKENS + 1)}),
    (Begin, {"grant": "no digest"}),
    (Begin, {"query": {"prompt": "x" * (MAX_QUERY_BYTES + 1)}}),
    (Begin, {"query": {"messages": [{"role": "user", "content": "x" * (MAX_QUERY_BYTES + 1)}]}}),
    (Begin, {"query": {"messages": [{"role": "", "content": "x"}]}}),
    (Begin, {"query": {"messages": [{"role": "x" * 65, "content": "x"}]}}),
    (Begin, {"query": {"messages": [{"role": "user", "content": "x"}] * 4097}}),
    (Begin, {"query": {"prompt_ids": [0] * (MAX_TOKENS + 1)}}),
    (Begin, {"query": {"prompt_ids": [-1]}}),
    (Advance, {"position": -1}),
    (Advance, {"position": 2**31}),
    (Advance, {"prefix_hash": -1}),
    (Advance, {"prefix_hash": 0.5}),
    (Advance, {"tokens": [0] * (MAX_TOKENS + 1)}),
    (Delta, {"position": "0"}),
    (Delta, {"payload": "text"}),
    (Delta, {"payload": bytes(MAX_FRAME_BYTES + 1)}),
    (End, {"reason": "bored"}),
    (End, {"sentence": "x" * 1025}),
    (End, {"tokens_steered": -1}),
    (End, {"tokens_missed": 2**53}),
]


@pytest.mark.parametrize(("kind", "change"), WRONG, ids=lambda value: getattr(value, "__name__", None) or next(iter(value)))
def test_values_out_of_bounds_are_refused(kind: type[Message], change: dict[str, Any]) -> None:
    good = fields_of(next(message for message in EXAMPLES if type(message) is kind))
    decoded(good, kind)
    with pytest.raises(msgspec.ValidationError, match=next(iter(change))):
        decoded({**good, **change}, kind)


def test_the_largest_delta_of_a_large_vocabulary_fits_one_frame() -> None:
    assert len(encode(Delta("s" * 192, 2**31 - 1, 2**64 - 1, bytes(5 + 4 * 152_064)))) < MAX_FRAME_BYTES / 6


@pytest.mark.parametrize("frame", [b"", b"\xc0", b"\x80", b"\x93\x01\x02\x03", b"\xa4text", b"{}", encode(EXAMPLES[0])[:-1]])
@pytest.mark.parametrize("decode", DECODERS.values())
def test_what_is_no_message_is_refused(decode: Decoder, frame: bytes) -> None:
    with pytest.raises(msgspec.MsgspecError):
        decode(frame)


def test_several_messages_in_one_frame_are_refused() -> None:
    with pytest.raises(msgspec.MsgspecError):
        decode_hub_to_engine(encode(End("s", "finished")) + encode(End("s", "finished")))


names = st.text(string.ascii_letters + string.digits, min_size=1, max_size=20)
tokens = st.lists(st.integers(0, 2**31 - 1), max_size=20)
hashes = st.integers(0, 2**64 - 1)


@settings(max_examples=200)
@given(
    st.one_of(
        st.builds(Delta, names, st.integers(0, 2**31 - 1), hashes, st.binary(max_size=100)),
        st.builds(Advance, names, st.integers(0, 2**31 - 1), hashes, tokens),
        st.builds(Begin, names, names, names, st.builds(Query, prompt=st.text()), st.floats(allow_nan=False), tokens),
        st.builds(End, names, st.sampled_from(["finished", "failed"]), st.text(max_size=100), st.integers(0, 2**53 - 1)),
    )
)
def test_any_message_of_a_stream_arrives_as_it_was_sent(message: Message) -> None:
    for direction in DIRECTIONS[type(message)]:
        assert DECODERS[direction](encode(message)) == message
