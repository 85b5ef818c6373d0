"""What a client may say, in which words it is told otherwise, and that nothing which admission did not make gets through."""

import copy
import math
from collections import UserDict
from types import MappingProxyType
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from costeer_vllm.errors import InvalidParameter
from costeer_vllm.protocol.messages import (
    MAX_CANDIDATES,
    MAX_FRAME_BYTES,
    MAX_QUERY_BYTES,
    MAX_ROUNDING,
    MAX_TOKENS,
    MIN_ROUNDING,
    Begin,
    Query,
    Turn,
    encode,
)
from costeer_vllm.request import (
    DEFAULT_CANDIDATES,
    FIELDS,
    LEASE_MS,
    MAX_DEADLINE_MS,
    MAX_REQUEST_ID,
    Options,
    SteeringRequest,
    parse_admitted,
    parse_options,
    to_extra_args,
)
from costeer_vllm.steering import SteeringParams

SECRET = "open-sesame-4711"

REQUEST = SteeringRequest("chatcmpl-1", "laptop", Query(messages=[Turn("user", "Hello?")]), 1.5)
PLAIN: dict[str, Any] = {
    "request": "chatcmpl-1",
    "worker": "laptop",
    "query": {"messages": [{"role": "user", "content": "Hello?"}]},
    "strength": 1.5,
}


def refusal(body: object) -> str:
    with pytest.raises(InvalidParameter) as caught:
        parse_options(body)
    return str(caught.value)


# Options


@pytest.mark.parametrize("body", [None, {}, dict.fromkeys(FIELDS)])
def test_nothing_given_means_the_papers_defaults(body: object) -> None:
    assert parse_options(body) == Options(None, None, SteeringParams().strength, "wait", LEASE_MS)


@pytest.mark.parametrize(("on_missing", "deadline_ms"), [("wait", LEASE_MS), ("continue", 5_000.0), ("fail", 5_000.0)])
def test_a_request_that_is_held_is_patient(on_missing: str, deadline_ms: float) -> None:
    options = parse_options({"on_missing": on_missing})
    assert (options.on_missing, options.deadline_ms) == (on_missing, deadline_ms)
    assert parse_options({"on_missing": on_missing, "deadline_ms": 7}).deadline_ms == 7.0


def test_every_field() -> None:
    paper = {"T": 5, "alpha": 1, "beta": 0.5, "lambda": 3.0, "eta": 2}
    options = parse_options(
        {**paper, "worker": "laptop", "key": SECRET, "on_missing": "continue", "deadline_ms": 250, "confidence": 0.9,
         "context_ref": "row/7"}
    )  # fmt: skip
    strength = SteeringParams(T=5, alpha=1, beta=0.5, player_lambda=3.0, eta=2).strength
    assert options == Options("laptop", SECRET, strength, "continue", 250.0, 0.9, "row/7")
    assert parse_options({"strength": -2}).strength == -2.0
    edge = parse_options({"fusion": "edge", "candidates": 128, "rounding": 0.5, "max_bits": 20})
    assert (edge.fusion, edge.candidates, edge.rounding, edge.max_bits) == ("edge", 128, 0.5, 20.0)


def test_edge_fusion_has_defaults_of_its_own() -> None:
    options = parse_options({"fusion": "edge", **dict.fromkeys(("candidates", "rounding", "max_bits"))})
    assert options == parse_options({"fusion": "edge"})
    assert (options.candidates, options.rounding, options.max_bits) == (DEFAULT_CANDIDATES, 0.0, None)
    assert parse_options({}).fusion == parse_options({"fusion": None}).fusion == "cloud"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("candidates", 1),
        ("candidates", MAX_CANDIDATES),
        ("rounding", 0),
        ("rounding", 0.001),
        ("rounding", 1),
        ("max_bits", 0),
        ("max_bits", 1e9),
    ],
)
def test_the_ends_of_the_ranges_of_edge_fusion_are_allowed(field: str, value: Any) -> None:
    assert getattr(parse_options({"fusion": "edge", field: value}), field) == value
    assert getattr(parse_admitted({**PLAIN, "fusion": "edge", field: value}), field) == value


@pytest.mark.parametrize(("field", "value"), [("candidates", 64), ("rounding", 0.0), ("max_bits", 5)])
@pytest.mark.parametrize("fusion", [{}, {"fusion": "cloud"}])
def test_what_is_of_edge_fusion_only_is_refused_in_the_cloud(field: str, value: Any, fusion: dict[str, Any]) -> None:
    assert refusal({field: value, **fusion}) == f"costeer: {field} is {value}; it must be left out unless fusion is 'edge'"


@pytest.mark.parametrize("field", ["T", "alpha", "beta", "lambda", "eta"])
def test_each_hyperparameter_reaches_the_strength(field: str) -> None:
    name = {"lambda": "player_lambda"}.get(field, field)
    assert parse_options({field: 7}).strength == SteeringParams(**{name: 7}).strength != SteeringParams().strength


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (5, "costeer is 5; it must be an object with any of worker, key"),
        (True, "costeer is True"),
        ([], "costeer is 'of type list'"),
        ("laptop", "costeer is 'of type str'"),
        ({"T": -1}, "T is -1; it must be an integer from 0 to 10000"),
        ({"T": 2.0}, "T is 2.0; it must be an integer"),
        ({"T": True}, "T is True"),
        ({"alpha": "high"}, "alpha is 'high'; it must be a finite number"),
        ({"beta": math.nan}, "beta is nan; it must be a finite number"),
        ({"lambda": -1}, "lambda is -1; it must be a finite number, 0 or more"),
        ({"eta": 0}, "eta is 0; it must be a finite number above 0"),
        ({"alpha": 500, "T": 5000}, "strength (from T, alpha, beta, lambda and eta) is inf"),
        ({"strength": 1e9}, "strength is 1000000000.0; it must be a finite number from -1000 to 1000"),
        ({"strength": True}, "strength is True"),
        ({"strength": 1, "T": 3, "eta": 1}, "strength is 1; it must be given alone, not together with T, eta"),
        ({"deadline_ms": -0.5}, "deadline_ms is -0.5; it must be a number of milliseconds from 0 to 60000"),
        ({"deadline_ms": MAX_DEADLINE_MS + 1}, "deadline_ms is 60001.0"),
        ({"deadline_ms": math.inf}, "deadline_ms is inf"),
        ({"deadline_ms": "100"}, "deadline_ms is '100'"),
        ({"on_missing": "panic"}, "on_missing is 'panic'; it must be 'wait'"),
        ({"confidence": 1.01}, "confidence is 1.01; it must be a probability from 0"),
        ({"confidence": -1e-9}, "confidence is -1e-09"),
        ({"confidence": "high"}, "confidence is 'high'"),
        ({"confidence": math.nan}, "confidence is nan"),
        ({"context_ref": ""}, "context_ref is ''; it must be a string of 1 to 128 printable"),
        ({"context_ref": "a b"}, "context_ref is 'a b'"),
        ({"context_ref": "x" * 129}, "context_ref is 'xxx"),
        ({"context_ref": 7}, "context_ref is 7"),
        ({"fusion": "device"}, "fusion is 'device'; it must be 'cloud' (deltas leave the device) or 'edge' (tokens only)"),
        ({"fusion": "Edge"}, "fusion is 'Edge'"),
        ({"fusion": 1}, "fusion is 1"),
        ({"fusion": ["edge"]}, "fusion is 'of type list'; it must be a string"),
        ({"fusion": "edge", "candidates": 0}, "candidates is 0; it must be an integer from 1 to 1024"),
        ({"fusion": "edge", "candidates": 1025}, "candidates is 1025"),
        ({"fusion": "edge", "candidates": 64.0}, "candidates is 64.0"),
        ({"fusion": "edge", "candidates": True}, "candidates is True"),
        ({"fusion": "edge", "candidates": "64"}, "candidates is '64'"),
        ({"fusion": "edge", "rounding": -0.1}, "rounding is -0.1; it must be 0 (none) or a number of nats from 0.001 to 1"),
        ({"fusion": "edge", "rounding": 1.01}, "rounding is 1.01; it must be 0 (none)"),
        ({"fusion": "edge", "rounding": 0.0009}, "rounding is 0.0009; it must be 0 (none)"),
        ({"fusion": "edge", "rounding": math.nan}, "rounding is nan; it must be a finite number"),
        ({"fusion": "edge", "rounding": True}, "rounding is True"),
        ({"fusion": "edge", "max_bits": -0.5}, "max_bits is -0.5; it must be a number of bits, 0 or more"),
        ({"fusion": "edge", "max_bits": math.inf}, "max_bits is inf; it must be a finite number"),
        ({"fusion": "edge", "max_bits": math.nan}, "max_bits is nan"),
        ({"fusion": "edge", "max_bits": "20"}, "max_bits is '20'"),
        ({"fusion": "edge", "max_bits": {"bits": 3}}, "max_bits is 'of type dict'; it must be a number"),
        ({"worker": ""}, "worker is ''; it must be a string of 1 to 128 letters"),
        ({"worker": "my laptop"}, "worker is 'my laptop'"),
        ({"worker": "-laptop"}, "begins with a letter or digit"),
        ({"worker": "laptop\n"}, r"worker is 'laptop\n'"),
        ({"worker": "x" * 129}, "worker is 'xxx"),
        ({"worker": 3}, "worker is 3; it must be a string"),
        ({"worker": ["laptop"]}, "worker is 'of type list'; it must be a string"),
        ({"T": {"value": 3}}, "T is 'of type dict'; it must be a number"),
    ],
)
def test_a_mistake_is_told_with_field_value_and_what_is_allowed(body: object, words: str) -> None:
    message = refusal(body)
    assert message.startswith("costeer: ")
    assert words in message
    assert len(message) < 250


@pytest.mark.parametrize(
    ("field", "meant"),
    [("strenght", "strength"), ("wroker", "worker"), ("Beta", "beta"), ("t", "T"),
     ("player_lambda", "lambda"), ("deadline", "deadline_ms"), ("onmissing", "on_missing"),
     ("fussion", "fusion"), ("Candidate", "candidates"), ("round", "rounding"), ("maxbits", "max_bits"), ("bits", "max_bits")],
)  # fmt: skip
def test_an_unknown_field_is_refused_with_a_suggestion(field: str, meant: str) -> None:
    message = refusal({field: 1})
    assert f"{field!r}" in message
    assert f"did you mean {meant!r}?" in message
    assert all(known in message for known in FIELDS)


def test_an_unknown_field_like_none_of_ours_gets_no_suggestion() -> None:
    assert "did you mean" not in refusal({"zzz": 1})
    assert "did you mean" not in refusal({7: 1})
    assert len(refusal({"z" * 10_000: 1})) < 250


@pytest.mark.parametrize("key", ["%", "x" * 512, "pässword", SECRET])
def test_a_key_is_printable_and_of_at_most_512_characters(key: str) -> None:
    options = parse_options({"key": key})
    assert options.key == key
    assert key not in repr(options)


@pytest.mark.parametrize(
    "body",
    [
        {"key": SECRET + "\n"},
        {"key": SECRET + "\ud800"},
        {"key": SECRET * 40},
        {"key": [SECRET]},
        {"key": {"value": SECRET}},
        {"key": SECRET.encode()},
        {"key": SECRET, "T": -1},
        {"key": SECRET, "wroker": 1},
        {"key": SECRET, "deadline_ms": "x"},
        {"key": SECRET, "strength": 1, "T": 2},
        {"worker": {"name": "laptop", "key": SECRET}},
        {"worker": ["laptop", SECRET]},
        {"alpha": {"key": SECRET}},
        {"on_missing": {"key": SECRET}},
        {"strength": [SECRET]},
        {"T": 1, "strength": {"key": SECRET}},
        [SECRET],
        ["key", SECRET],
        SECRET,
        SECRET.encode(),
        (("key", SECRET),),
    ],
)
def test_a_key_is_shown_in_no_message_wherever_it_was_put(body: object) -> None:
    with pytest.raises(InvalidParameter) as caught:
        parse_options(body)
    error = caught.value
    shown = [str(error), repr(error), error.field, repr(error.value), error.allowed, repr(error.args)]
    assert not [text for text in shown if SECRET in text]
    assert error.__cause__ is None
    assert error.__suppress_context__ or error.__context__ is None


def test_a_key_is_in_no_representation() -> None:
    options = parse_options({"key": SECRET, "worker": "laptop"})
    for text in (repr(options), str(options), f"{options}", repr([options]), repr({"a": options})):
        assert SECRET not in text
        assert "***" in text
    assert "key=None" in repr(parse_options({}))


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10) | st.sampled_from(FIELDS), inner, max_size=6)
    ),
    max_leaves=12,
)


@settings(max_examples=400)
@given(st.one_of(json_like, st.dictionaries(st.sampled_from(FIELDS), json_like, max_size=4)))
def test_whatever_a_client_sends_options_are_sound_or_it_is_told(body: object) -> None:
    try:
        options = parse_options(body)
    except InvalidParameter:
        return
    assert math.isfinite(options.strength)
    assert 0 <= options.deadline_ms <= MAX_DEADLINE_MS
    assert options.on_missing in ("wait", "continue", "fail")
    assert 1 <= options.candidates <= MAX_CANDIDATES
    assert options.rounding == 0 or MIN_ROUNDING <= options.rounding <= MAX_ROUNDING
    assert options.max_bits is None or 0 <= options.max_bits < math.inf
    of_the_edge = (options.candidates, options.rounding, options.max_bits)
    assert options.fusion == "edge" or (options.fusion, of_the_edge) == ("cloud", (DEFAULT_CANDIDATES, 0.0, None))


# Admitted


def test_an_admitted_request_survives_the_way_to_the_engine() -> None:
    requests = [
        REQUEST,
        SteeringRequest("r", "w", Query(prompt=""), -1000.0, 0.0, "continue", "0123456789abcdef" * 4),
        SteeringRequest("r" * MAX_REQUEST_ID, "w" * 128, Query(prompt_ids=[0, 2**31 - 1]), 0.0, MAX_DEADLINE_MS),
        SteeringRequest("cmpl-1", "a@b.c:d-e_f", Query(messages=[Turn("assistant", "So")], continue_final_message=True), 1.0),
    ]
    for request in requests:
        plain = to_extra_args(request)
        assert parse_admitted(plain) == request
        # vLLM sends it to the engine as msgpack.
        assert parse_admitted(msgspec.msgpack.decode(msgspec.msgpack.encode(plain))) == request
    assert to_extra_args(REQUEST) == {**PLAIN, "query": {"messages": [{"role": "user", "content": "Hello?"}]}}


def test_what_goes_to_the_engine_shows_neither_query_nor_grant() -> None:
    """vLLM can be told to log the sampling parameters of every request."""
    request = SteeringRequest("chatcmpl-1", "laptop", Query(prompt="a secret question"), 1.5, grant="0123456789abcdef" * 4)
    plain = to_extra_args(request)
    shown = [repr({"costeer": plain}), str(plain), f"{plain}", repr(copy.deepcopy(plain))]
    assert all("secret" not in text and "abcdef" not in text and "chatcmpl-1" in text for text in shown), shown


queries = st.one_of(
    st.builds(lambda text: Query(prompt=text), st.text()),
    st.builds(lambda ids: Query(prompt_ids=ids), st.lists(st.integers(0, 2**31 - 1), max_size=20)),
    st.builds(
        lambda turns, more: Query(messages=turns, continue_final_message=more),
        st.lists(st.builds(Turn, st.text(min_size=1, max_size=10), st.text()), max_size=5),
        st.booleans(),
    ),
)


@settings(max_examples=200)
@given(
    request=st.from_regex(r"[\x21-\x7e]{1,160}", fullmatch=True),
    worker=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._@:-]{0,127}", fullmatch=True),
    query=queries,
    strength=st.floats(-1000, 1000),
    deadline_ms=st.floats(0, MAX_DEADLINE_MS),
    grant=st.none() | st.from_regex(r"[0-9a-f]{64}", fullmatch=True),
    confidence=st.floats(0, 1),
    fusion=st.sampled_from(["cloud", "edge"]),
    candidates=st.integers(1, MAX_CANDIDATES),
    rounding=st.just(0.0) | st.floats(0.001, 1),
    max_bits=st.none() | st.floats(0, 1e6),
)
def test_round_trip(**fields: Any) -> None:
    request = SteeringRequest(**fields)
    assert parse_admitted(to_extra_args(request)) == request


@pytest.mark.parametrize(
    "change",
    [
        {"strength": math.nan},
        {"strength": math.inf},
        {"strength": 1000.5},
        {"strength": True},
        {"strength": "1"},
        {"strength": None},
        {"strength": 10**400},
        {"confidence": 1.5},
        {"confidence": math.nan},
        {"fusion": "device"},
        {"fusion": None},
        {"candidates": 0},
        {"candidates": MAX_CANDIDATES + 1},
        {"candidates": 64.5},
        {"candidates": True},
        {"rounding": -0.1},
        {"rounding": 1.5},
        {"rounding": 1e-6},
        {"rounding": math.nan},
        {"rounding": None},
        {"max_bits": -1},
        {"max_bits": math.nan},
        {"max_bits": math.inf},
        {"max_bits": "20"},
        {"deadline_ms": -1},
        {"deadline_ms": math.nan},
        {"deadline_ms": MAX_DEADLINE_MS + 1},
        {"deadline_ms": True},
        {"on_missing": "panic"},
        {"ticket": -1},
        {"ticket": "1"},
        {"worker": ""},
        {"worker": "a b"},
        {"worker": "a\n"},
        {"worker": "x" * 129},
        {"worker": None},
        {"request": ""},
        {"request": "has space"},
        {"request": "new\nline"},
        {"request": "tr\u00e8s"},
        {"request": "x" * (MAX_REQUEST_ID + 1)},
        {"grant": "00"},
        {"grant": "F" * 64},
        {"grant": "0" * 64 + "\n"},
        {"key": SECRET},
        {"context": "private"},
        {1: 2},
        {"query": None},
        {"query": {}},
        {"query": "Hello?"},
        {"query": {"prompt": "a", "prompt_ids": [1]}},
        {"query": {"prompt": "a", "messages": []}},
        {"query": {"prompt_ids": [-1]}},
        {"query": {"prompt_ids": [2**31]}},
        {"query": {"prompt_ids": [2**80]}},
        {"query": {"prompt_ids": [1.5]}},
        {"query": {"prompt_ids": [True]}},
        {"query": {"prompt_ids": [0] * (MAX_TOKENS + 1)}},
        {"query": {"messages": [{"role": "", "content": "x"}]}},
        {"query": {"messages": [{"role": "user"}]}},
        {"query": {"messages": [{"role": "user", "content": ["x"]}]}},
        {"query": {"messages": [{"role": "user", "content": "x"}] * 4097}},
        {"query": {"prompt": "x" * (MAX_QUERY_BYTES + 1)}},
        {"query": {"prompt": "\u20ac" * (MAX_QUERY_BYTES // 3 + 1)}},
        {"query": {"messages": [{"role": "user", "content": "x" * (MAX_QUERY_BYTES // 2)}] * 3}},
    ],
)
def test_what_admission_cannot_have_made_is_refused(change: dict[Any, Any]) -> None:
    parse_admitted(PLAIN)
    for other in (UserDict(PLAIN), MappingProxyType(PLAIN), parse_admitted(PLAIN)):
        with pytest.raises(InvalidParameter, match="what to_extra_args makes"):
            parse_admitted(other)
    with pytest.raises(InvalidParameter) as caught:
        parse_admitted({**PLAIN, **change})
    assert len(str(caught.value)) < 400
    assert SECRET not in str(caught.value)


def test_text_that_is_no_unicode_is_refused_in_words() -> None:
    with pytest.raises(InvalidParameter, match="text without lone surrogates"):
        parse_admitted({**PLAIN, "query": {"prompt": "\ud800"}})


@pytest.mark.parametrize("missing", list(PLAIN))
def test_every_field_without_a_default_is_needed(missing: str) -> None:
    with pytest.raises(InvalidParameter, match=missing):
        parse_admitted({name: value for name, value in PLAIN.items() if name != missing})


def test_the_longest_request_that_is_admitted_fits_one_frame() -> None:
    """Its stream's Begin must reach the hub, also after a preemption with as many tokens as a message may hold."""
    query = Query(messages=[Turn("user", "\u20ac" * 349_000)])
    request = parse_admitted(to_extra_args(SteeringRequest("r" * MAX_REQUEST_ID, "w" * 128, query, 1.0, grant="0" * 64)))
    begin = Begin("s" * 192, request.request, request.worker, query, 1.0, [2**31 - 1] * MAX_TOKENS, request.grant)
    assert len(encode(query)) > MAX_QUERY_BYTES * 0.99
    assert len(encode(begin)) <= MAX_FRAME_BYTES


class Awkward:
    """An object that is none of JSON's, as an offline caller may pass."""

    def __repr__(self) -> str:
        return SECRET


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()) | st.binary() | st.builds(Awkward),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text(max_size=10) | st.sampled_from([*PLAIN, "deadline_ms", "grant", "prompt"]) | st.integers(), inner
        )
        | st.tuples(inner, inner)
    ),
    max_leaves=15,
)


@settings(max_examples=500)
@given(st.one_of(anything, st.dictionaries(st.sampled_from([*PLAIN, "deadline_ms", "on_missing", "grant"]), anything)))
@example({**PLAIN, "query": {"prompt_ids": [2**70]}})
def test_nothing_else_than_invalid_parameter_is_raised(value: object) -> None:
    told = None
    try:
        assert isinstance(parse_admitted(value), SteeringRequest)
    except InvalidParameter as error:
        told = str(error)
    assert told is None or (told.startswith("costeer: ") and SECRET not in told)


@settings(max_examples=500)
@given(st.sampled_from([*PLAIN, "deadline_ms", "on_missing", "grant", "more"]), anything)
def test_one_field_of_a_good_request_replaced_by_anything(field: str, value: object) -> None:
    try:
        admitted = parse_admitted({**PLAIN, field: value})
    except InvalidParameter:
        return
    assert math.isfinite(admitted.strength)
    assert 0 <= admitted.deadline_ms <= MAX_DEADLINE_MS
    encode(Begin("s", admitted.request, admitted.worker, admitted.query, admitted.strength, [], admitted.grant))


def test_lists_in_lists_in_lists() -> None:
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    for value in (nested, {**PLAIN, "query": nested}, {**PLAIN, "more": nested}):
        with pytest.raises(InvalidParameter):
            parse_admitted(value)
    with pytest.raises(InvalidParameter, match="worker"):
        parse_options({"worker": nested})
    while nested:  # freed one by one: the interpreter's own way down is recursive
        nested = nested[0]
