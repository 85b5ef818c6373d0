"""An app's request taken apart: what is forwarded, byte for byte, and what is refused before anything leaves."""

import json
import tracemalloc
import unicodedata
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from costeer_vllm.edge.answers import GatewayError
from costeer_vllm.edge.asks import ALIAS_SUFFIX, parse_ask
from costeer_vllm.engine import hooks
from costeer_vllm.errors import InvalidParameter

from .test_gateway_answers import JSON

OURS = ("costeer", "extra_body", "n", "prompt")
FIELDS = st.dictionaries(st.text().filter(lambda name: name not in OURS and not is_meant_for_us(name)), JSON, max_size=5)


def is_meant_for_us(name: str) -> bool:
    """A misspelt ``costeer``, which is refused."""
    return "".join(filter(str.isalpha, unicodedata.normalize("NFKC", name).casefold())) == "costeer"


def members(body: bytes) -> dict[str, str]:
    """Every field of an object with the very characters of its value."""
    raw = json.JSONDecoder(parse_float=str, parse_int=str).decode(body.decode())
    return {name: json.dumps(value) for name, value in raw.items()}


@given(FIELDS, st.booleans(), st.sampled_from([None, 1]))
def test_fields_that_are_not_ours_are_forwarded_as_they_came(fields: dict[str, Any], is_ascii: bool, indent: int | None) -> None:
    private = {"costeer": {"context": "Wilhelmina", "beta": 1.5}}
    body = json.dumps({**fields, **private}, ensure_ascii=is_ascii, indent=indent).encode()
    ask = parse_ask(body)
    assert members(ask.plain()) == members(json.dumps(fields).encode())
    forwarded = ask.steered("laptop", None, "ref")
    assert json.loads(forwarded)["costeer"] == {"beta": 1.5, "worker": "laptop", "context_ref": "ref"}
    if "Wilhelmina" not in str(fields):
        assert b"Wilhelmina" not in forwarded + ask.plain()
    assert ask.context == "Wilhelmina"


def test_numbers_and_escapes_keep_their_very_bytes() -> None:
    values = rb'{"a":1.000000000000000000000000001,"b":123456789012345678901234567890,"c":"\u00e9\/","d":[1,  2e400 ]}'
    assert parse_ask(values).plain() == values
    forwarded = parse_ask(values).steered("laptop", "sesame", "ref")
    assert forwarded == values[:-1] + b',"costeer":{"worker":"laptop","context_ref":"ref","key":"sesame"}}'


def test_of_a_field_that_is_given_twice_the_last_one_counts_and_the_other_is_gone() -> None:
    ask = parse_ask(b'{"costeer": {"context": "Wilhelmina"}, "costeer": {"T": 1}, "costeer": {"context": "Clara", "T": 2}}')
    assert ask.context == "Clara"
    assert json.loads(ask.steered("laptop", None, "r")) == {"costeer": {"T": 2, "worker": "laptop", "context_ref": "r"}}


@pytest.mark.parametrize("body", [b"{}", b'{"costeer": null}', b'{"costeer": {}}', b'{"costeer": {"context": null, "T": null}}'])
def test_without_options_a_request_is_steered_by_the_defaults(body: bytes) -> None:
    ask = parse_ask(body)
    assert ask.steering is not None
    assert ask.context is None
    assert ask.options is not None
    assert ask.options.strength == pytest.approx(1.783, abs=1e-3)


@pytest.mark.parametrize(
    ("costeer", "expected"),
    [
        (None, {"fusion": "edge", "strength": 0.5}),
        ({}, {"fusion": "edge", "strength": 0.5}),
        ({"fusion": "cloud"}, {"fusion": "cloud", "strength": 0.5}),
        ({"fusion": None, "T": 2}, {"fusion": "edge", "T": 2}),
        ({"strength": 2}, {"fusion": "edge", "strength": 2}),
        ({"max_bits": 7}, {"fusion": "edge", "strength": 0.5, "max_bits": 7}),
    ],
)
def test_what_an_app_does_not_say_is_preset(costeer: Any, expected: dict[str, Any]) -> None:
    ask = parse_ask(json.dumps({"costeer": costeer}).encode(), {"fusion": "edge", "strength": 0.5})
    assert ask.steering == expected


def test_false_asks_for_the_plain_answer() -> None:
    ask = parse_ask(b'{"model": "m", "costeer": false}')
    assert ask.steering is None
    assert ask.plain() == b'{"model":"m"}'


@pytest.mark.parametrize(
    ("costeer", "words"),
    [
        ({"context": 5}, ["context is 'of type int'", "a string", "--context"]),
        ({"context": ["Wilhelmina"]}, ["context is 'of type list'"]),
        ({"context": {"text": "Wilhelmina"}}, ["context is 'of type dict'"]),
        ({"context": True}, ["context is 'of type bool'"]),
        ({"context": " \n"}, ["context is 'blank'"]),
        ({"contexts": "Wilhelmina"}, ["'contexts'", "unknown"]),
        ({"worker": "desk"}, ["worker is 'given'", "left out"]),
        ({"key": "sesame"}, ["key is 'given'", "left out"]),
        ({"context_ref": "r"}, ["context_ref is 'given'", "left out"]),
        ({"T": -1}, ["T is -1", "from 0"]),
        ({"strenght": 1}, ["strenght", "did you mean 'strength'"]),
        ({"deadline_ms": -5}, ["deadline_ms is -5"]),
        ({"on_missing": "panic"}, ["on_missing is 'panic'"]),
        (True, ["costeer is True", "an object"]),
        (0, ["costeer is 0", "an object"]),
        ("Wilhelmina", ["costeer is 'of type str'"]),
        (["Wilhelmina"], ["costeer is 'of type list'"]),
    ],
)
def test_what_cannot_be_used_is_told(costeer: Any, words: list[str]) -> None:
    with pytest.raises(InvalidParameter) as caught:
        parse_ask(json.dumps({"costeer": costeer}).encode())
    assert all(word in str(caught.value) for word in words), caught.value
    assert "Wilhelmina" not in str(caught.value)
    assert "sesame" not in str(caught.value)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'"x"', b"{} {}", b'{"a": NaN}', b'{"a": "\\ud800"}', b"\xef\xbb\xbf{}", b'{"a": 01}',
     b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", b'{"costeer": {"T": 1e999}}', b'{"costeer": {"context": "\xff"}}',
     b'{"n": 1e999}', b'{"\xff": 1}'],
)  # fmt: skip
def test_a_body_that_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(GatewayError) as caught:
        parse_ask(body)
    assert caught.value.status == 400
    assert caught.value.__context__ is None, "an error of the decoder could quote the body"


def test_a_model_that_the_server_would_steer_is_not_asked_plainly() -> None:
    assert ALIAS_SUFFIX == hooks.ALIAS_SUFFIX
    with pytest.raises(InvalidParameter, match="model is"):
        parse_ask(json.dumps({"model": "m" + ALIAS_SUFFIX, "costeer": False}).encode())
    assert parse_ask(json.dumps({"model": "m" + ALIAS_SUFFIX}).encode()).steering is not None


@pytest.mark.parametrize(
    ("fields", "num_streams"),
    [
        ({}, 1),
        ({"n": 3}, 3),
        ({"n": None}, 1),
        ({"n": -2}, 1),
        ({"prompt": "x"}, 1),
        ({"prompt": ["x", "y"], "n": 2}, 4),
        ({"prompt": [1, 2, 3]}, 1),
        ({"prompt": [[1, 2], [3]]}, 2),
        ({"prompt": [[], [1], []], "n": 2}, 6),
        ({"prompt": ["[1]"]}, 1),
        ({"prompt": '["x", "y"]'}, 1),
        ({"prompt": [-1, 2]}, 1),
        ({"prompt": []}, 1),
        ({"prompt": None}, 1),
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_streams_are_counted_as_the_server_makes_them(fields: dict[str, Any], num_streams: int, indent: int | None) -> None:
    assert parse_ask(json.dumps(fields, indent=indent).encode()).num_streams == num_streams


@pytest.mark.parametrize("prompt", [[*range(10**6)], [[*range(10**6)]]])
def test_token_ids_are_not_decoded(prompt: list[Any]) -> None:
    body = json.dumps({"prompt": prompt}).encode()
    tracemalloc.start()
    try:
        assert parse_ask(body).num_streams == 1
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()


def test_nothing_shows_what_an_ask_holds() -> None:
    ask = parse_ask(b'{"costeer": {"context": "Wilhelmina"}}')
    assert "Wilhelmina" not in f"{ask} {ask!r}"


@pytest.mark.parametrize("name", ["extra_body", "Costeer", "costeer ", "COSTEER", "co-steer", "\uff43osteer", "costeer\u200b"])
def test_what_was_meant_for_the_gateway_does_not_pass_under_another_name(name: str) -> None:
    body = msgspec.json.encode({"messages": [], name: {"context": "a secret"}})
    with pytest.raises(InvalidParameter) as caught:
        parse_ask(body)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("n", ["2", 2.0, True, [2]])
def test_a_number_of_choices_that_is_no_whole_number(n: object) -> None:
    for costeer in (None, False, {}):
        with pytest.raises(InvalidParameter, match="n is"):
            parse_ask(msgspec.json.encode({"messages": [], "n": n, "costeer": costeer}))


def test_plain_requests_count_their_choices_too() -> None:
    assert parse_ask(b'{"n": 3, "costeer": false}').num_streams == 3
