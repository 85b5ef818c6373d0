"""The ``costeer`` object of a request: what a client may say, and what the engine is told after admission."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias, get_args

import msgspec

from costeer_vllm.errors import InvalidParameter
from costeer_vllm.protocol.messages import (
    MAX_CANDIDATES,
    MAX_QUERY_BYTES,
    MAX_ROUNDING,
    MIN_ROUNDING,
    ContextRef,
    Count,
    Digest,
    Fusion,
    Name,
    Query,
    encode,
)
from costeer_vllm.steering import SteeringParams, check_finite, check_strength

OnMissing: TypeAlias = Literal["wait", "continue", "fail"]  # a delta is not there: hold the request, go on without it, or fail

LEASE_MS = 30_000.0  # how long a request is held by default
DEFAULT_DEADLINE_MS = 5_000.0  # for the others
MAX_DEADLINE_MS = 60_000.0  # a held request keeps its place in the engine
DEFAULT_CANDIDATES = 64
MAX_REQUEST_ID = 160  # characters; a stream's id is the request's and a suffix
_STEERING_FIELDS = ("T", "alpha", "beta", "lambda", "eta")
_EDGE_FIELDS = ("candidates", "rounding", "max_bits")  # of edge fusion only
STRENGTH_FIELDS = (*_STEERING_FIELDS, "strength")
NUMBERS = (*STRENGTH_FIELDS, "confidence", *_EDGE_FIELDS, "deadline_ms")
FIELDS = (
    *("worker", "key", "context_ref", "fusion"),
    *(*STRENGTH_FIELDS, "confidence"),
    *_EDGE_FIELDS,
    *("on_missing", "deadline_ms"),
)


@dataclass(frozen=True, slots=True)
class Options:
    """A client's ``costeer`` object, checked. ``key`` is secret and shown nowhere."""

    worker: str | None
    key: str | None
    strength: float  # c_T, unitless
    on_missing: OnMissing = "wait"
    deadline_ms: float = LEASE_MS  # how long a token may wait for its delta
    confidence: float = 1.0  # steer only where the base policy's largest probability is below it; 1: everywhere
    context_ref: str | None = None  # which of the edge worker's contexts
    fusion: Fusion = "cloud"
    candidates: int = DEFAULT_CANDIDATES  # k: tokens of the base policy that an edge worker chooses from
    rounding: float = 0.0  # step of their log-probabilities, nats; 0: none
    max_bits: float | None = None  # what the answer may tell about the context

    def __repr__(self) -> str:
        key = None if self.key is None else "***"
        return f"Options(worker={self.worker!r}, key={key}, strength={self.strength}, deadline_ms={self.deadline_ms})"


class SteeringRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What an admitted request carries to the engine in ``SamplingParams.extra_args["costeer"]``: no key, no context."""

    request: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_REQUEST_ID, pattern=r"^[\x21-\x7e]+\Z")]
    worker: Name
    query: Query
    strength: float
    deadline_ms: Annotated[float, msgspec.Meta(ge=0, le=MAX_DEADLINE_MS)] = LEASE_MS
    on_missing: OnMissing = "wait"
    grant: Digest | None = None
    confidence: Annotated[float, msgspec.Meta(ge=0, le=1)] = 1.0
    fusion: Fusion = "cloud"
    candidates: Annotated[int, msgspec.Meta(ge=1, le=MAX_CANDIDATES)] = DEFAULT_CANDIDATES
    rounding: Annotated[float, msgspec.Meta(ge=0, le=MAX_ROUNDING)] = 0.0
    max_bits: Annotated[float, msgspec.Meta(ge=0)] | None = None
    vocabulary: Digest | None = None  # the server's fingerprint
    ticket: Count | None = None  # the scheduler gives it, see engine/board.py


def parse_options(body: object) -> Options:
    """The client's ``costeer`` object -> Options. ``None`` (a model alias without an object) means all defaults.

    Raises:
        InvalidParameter: naming the field, its value and what is allowed.
    """
    if body is None:
        body = {}
    if not isinstance(body, Mapping):
        raise InvalidParameter("costeer", _harmless(body), f"an object with any of {', '.join(FIELDS)}")
    for field, value in body.items():
        if field not in FIELDS:
            raise InvalidParameter(f"the field {str(field)[:40]!r} of costeer", "unknown", _suggestion(str(field)))
        if value is not None and not isinstance(value, (str, int, float)):
            raise InvalidParameter(field, _harmless(value), "a number" if field in NUMBERS else "a string")
    given = {field: value for field, value in body.items() if value is not None}
    on_missing = _on_missing(given.get("on_missing", "wait"))
    deadline_ms = given.get("deadline_ms", LEASE_MS if on_missing == "wait" else DEFAULT_DEADLINE_MS)
    return Options(
        worker=_worker(given.get("worker")),
        key=_key(given.get("key")),
        strength=_strength(given),
        on_missing=on_missing,
        deadline_ms=_within("deadline_ms", deadline_ms, 0, MAX_DEADLINE_MS, "a number of milliseconds"),
        confidence=_confidence(given.get("confidence", 1.0)),
        context_ref=_context_ref(given.get("context_ref")),
        fusion=_fusion(given),
        candidates=_candidates(given.get("candidates", DEFAULT_CANDIDATES)),
        rounding=_rounding(given.get("rounding", 0.0)),
        max_bits=_max_bits(given.get("max_bits")),
    )


def parse_admitted(value: object) -> SteeringRequest:
    """``extra_args["costeer"]`` -> SteeringRequest; trusts nothing, since some routes let clients fill ``extra_args``.

    Raises:
        InvalidParameter: if it is not exactly what admission produces.
    """
    if not isinstance(value, dict):  # msgspec takes other mappings, too, and the scheduler no other
        raise InvalidParameter("extra_args.costeer", type(value).__name__, "what to_extra_args makes")
    try:
        admitted = msgspec.convert(value, SteeringRequest)
        query_bytes = len(encode(admitted.query))
    except UnicodeEncodeError:
        raise InvalidParameter("extra_args.costeer.query", "not Unicode", "text without lone surrogates") from None
    except Exception as error:
        # msgspec's sentence names the path and the expected type; of values it shows only an unknown word for on_missing.
        raise InvalidParameter("extra_args.costeer", type(value).__name__, f"an admitted steering request ({error})") from None
    if query_bytes > MAX_QUERY_BYTES:
        raise InvalidParameter("the query", f"{query_bytes} bytes long", f"at most {MAX_QUERY_BYTES} bytes long to be steered")
    check_strength("strength", admitted.strength)
    check_finite("deadline_ms", admitted.deadline_ms)
    _rounding(admitted.rounding)
    for field in ("confidence", "max_bits"):
        if (value := getattr(admitted, field)) is not None:
            check_finite(field, value)
    forms = (admitted.query.messages, admitted.query.prompt, admitted.query.prompt_ids)
    if sum(form is not None for form in forms) != 1:
        raise InvalidParameter("extra_args.costeer.query", "ambiguous", "exactly one of messages, prompt and prompt_ids")
    return admitted


class _Quiet(dict[str, Any]):
    """Shown without query and grant: vLLM logs the sampling parameters, at a level at which it logs no prompts."""

    def __repr__(self) -> str:
        return f"{{'request': {self.get('request')!r}, 'worker': {self.get('worker')!r}, ...}}"


def to_extra_args(request: SteeringRequest) -> dict[str, Any]:
    """SteeringRequest -> plain dictionaries, as ``extra_args`` must hold."""
    return _Quiet(msgspec.to_builtins(request))


def with_ticket(asked: Mapping[str, Any], ticket: int) -> dict[str, Any]:
    """What ``to_extra_args`` made, as a mapping, with the scheduler's ticket."""
    return _Quiet({**asked, "ticket": ticket})


def _strength(given: Mapping[str, Any]) -> float:
    by_paper = [field for field in _STEERING_FIELDS if field in given]
    if "strength" in given:
        if by_paper:
            raise InvalidParameter("strength", given["strength"], f"given alone, not together with {', '.join(by_paper)}")
        return check_strength("strength", given["strength"])
    names = {"lambda": "player_lambda"}
    return SteeringParams(**{names.get(field, field): given[field] for field in by_paper}).strength


def _worker(value: object) -> str | None:
    try:
        return msgspec.convert(value, Name | None)
    except msgspec.ValidationError:
        allowed = "a string of 1 to 128 letters, digits and ._@:- that begins with a letter or digit"
        raise InvalidParameter("worker", value, allowed) from None


def _context_ref(value: object) -> str | None:
    try:
        return msgspec.convert(value, ContextRef | None)
    except msgspec.ValidationError:
        raise InvalidParameter("context_ref", value, "a string of 1 to 128 printable ASCII characters without spaces") from None


def _key(value: object) -> str | None:
    if value is None or (isinstance(value, str) and 0 < len(value) <= 512 and value.isprintable()):
        return value
    raise InvalidParameter("key", "***", "a printable string of 1 to 512 characters")


def _harmless(value: object) -> object:
    """What may be shown of a value of the wrong type: text and containers may hold a key that was put in the wrong place."""
    return value if isinstance(value, (bool, int, float)) else f"of type {type(value).__name__}"


def _on_missing(value: object) -> OnMissing:
    if value not in get_args(OnMissing):
        allowed = "'wait' (the request is held for its delta), 'continue' (the token is chosen unsteered, and counted) or 'fail'"
        raise InvalidParameter("on_missing", value, allowed)
    return value  # type: ignore[return-value]


def _within(field: str, value: object, least: float, most: float, what: str) -> float:
    number = check_finite(field, value)
    if not least <= number <= most:
        raise InvalidParameter(field, value, f"{what} from {least:g} to {most:g}")
    return number


def _confidence(value: object) -> float:
    confidence = check_finite("confidence", value)
    if not 0 <= confidence <= 1:
        raise InvalidParameter("confidence", value, "a probability from 0 (no token is steered) to 1 (every token is)")
    return confidence


def _fusion(given: Mapping[str, Any]) -> Fusion:
    value = given.get("fusion", "cloud")
    if value not in get_args(Fusion):
        raise InvalidParameter("fusion", value, "'cloud' (deltas leave the device) or 'edge' (tokens only)")
    for field in _EDGE_FIELDS:
        if field in given and value != "edge":
            raise InvalidParameter(field, given[field], "left out unless fusion is 'edge'")
    return value  # type: ignore[no-any-return]


def _candidates(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_CANDIDATES:
        raise InvalidParameter("candidates", value, f"an integer from 1 to {MAX_CANDIDATES}")
    return value


def _rounding(value: object) -> float:
    rounding = check_finite("rounding", value)
    if rounding != 0 and not MIN_ROUNDING <= rounding <= MAX_ROUNDING:
        raise InvalidParameter("rounding", value, f"0 (none) or a number of nats from {MIN_ROUNDING:g} to {MAX_ROUNDING:g}")
    return rounding


def _max_bits(value: object) -> float | None:
    if value is None:
        return None
    if (bits := check_finite("max_bits", value)) < 0:
        raise InvalidParameter("max_bits", value, "a number of bits, 0 or more")
    return bits


def _suggestion(field: str) -> str:
    lower = {known.lower(): known for known in FIELDS}
    close = difflib.get_close_matches(field.lower(), lower, 1, 0.5)
    hint = f"; did you mean {lower[close[0]]!r}?" if close else ""
    return f"one of {', '.join(FIELDS)}{hint}"
