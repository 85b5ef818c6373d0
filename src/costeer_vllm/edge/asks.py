"""What an app asks of the gateway: the body of its request taken apart, and put together again without what is private."""

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from costeer_vllm.edge.answers import UNREADABLE, GatewayError
from costeer_vllm.errors import InvalidParameter
from costeer_vllm.request import STRENGTH_FIELDS, Options, parse_options

ALIAS_SUFFIX = "+costeer"  # of the model names with which a server steers requests that have no costeer object
OURS = ("worker", "key", "context_ref")  # fields of costeer that the gateway fills in

_decode_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_list = msgspec.json.Decoder(list[msgspec.Raw]).decode
_IS_LIST_OF_PROMPTS = re.compile(rb"\s*\[\s*[\"\[{]").match  # each a text, a list of token ids or an object


@dataclass(frozen=True, slots=True, repr=False)
class Ask:
    """A request that may be forwarded. Holds private text: neither ``repr`` nor ``str`` show it."""

    fields: dict[str, msgspec.Raw]  # as they came, without costeer
    steering: dict[str, Any] | None  # the costeer object without its context; None: the plain answer is wanted
    context: str | None  # None: the worker's own
    options: Options | None  # the same, checked
    num_streams: int  # n, for every prompt

    def plain(self) -> bytes:
        """The body for the server, without a word of costeer."""
        return msgspec.json.encode(self.fields)

    def steered(self, worker: str, key: str | None, context_ref: str) -> bytes:
        """The body for the server; every field but costeer has the bytes that it came with."""
        filled_in = {"worker": worker, "context_ref": context_ref} | ({} if key is None else {"key": key})
        return msgspec.json.encode({**self.fields, "costeer": {**(self.steering or {}), **filled_in}})


def parse_ask(body: bytes, preset: Mapping[str, Any] | None = None) -> Ask:
    """The body of a request -> Ask; ``preset`` is what its costeer object says where the app does not.

    Raises:
        GatewayError: if it is no JSON object.
        InvalidParameter: if its costeer object cannot be used, as the server would say.
    """
    fields = _fields(body)
    _check_names(fields)
    raw = fields.pop("costeer", None)
    costeer = None if raw is None else _decode(raw)
    if costeer is False:
        return Ask(_without_alias(fields), None, None, None, _num_streams(fields))
    context = None
    if costeer is None:
        costeer = dict(preset or {})
    elif isinstance(costeer, dict):
        costeer = _completed(costeer, preset or {})
        context = _context(costeer.pop("context", None))
        for name in OURS:
            if costeer.get(name) is not None:
                raise InvalidParameter(name, "given", "left out: the gateway of the device fills it in")
    options = parse_options(costeer)
    return Ask(fields, costeer, context, options, _num_streams(fields))


def _completed(costeer: dict[str, Any], preset: Mapping[str, Any]) -> dict[str, Any]:
    says_strength = any(costeer.get(field) is not None for field in STRENGTH_FIELDS)
    missing = {field: value for field, value in preset.items() if not (field == "strength" and says_strength)}
    return {**missing, **{field: value for field, value in costeer.items() if value is not None}}


def _fields(body: bytes) -> dict[str, msgspec.Raw]:
    try:
        return _decode_object(body)
    except UNREADABLE:  # which can hold the body
        pass
    raise GatewayError(400, "bad_json", "the body must be a JSON object in UTF-8, without NaN and without half surrogate pairs")


def _check_names(fields: dict[str, msgspec.Raw]) -> None:
    """Servers ignore fields that they do not know, so what was meant for us must not pass under another name."""
    if "extra_body" in fields:
        raise InvalidParameter("extra_body", "a field of the body", "left out: what is in it belongs into the body itself")
    for name in fields:
        letters = "".join(filter(str.isalpha, unicodedata.normalize("NFKC", name).casefold()))
        if letters == "costeer" and name != "costeer":
            raise InvalidParameter("a field of the body", name, "named costeer")


def _decode(raw: msgspec.Raw) -> Any:
    try:
        return msgspec.json.decode(raw)
    except UNREADABLE:
        pass
    raise GatewayError(400, "bad_json", "the field costeer must be JSON with numbers that fit 64 bits", "costeer")


def _context(value: object) -> str | None:
    if value is None or (isinstance(value, str) and value.strip()):
        return value
    shown = "blank" if isinstance(value, str) else f"of type {type(value).__name__}"
    raise InvalidParameter("context", shown, "a string, the private text for this request (left out: the worker's own --context)")


def _without_alias(fields: dict[str, msgspec.Raw]) -> dict[str, msgspec.Raw]:
    model = _decode(fields["model"]) if "model" in fields else None
    if isinstance(model, str) and model.endswith(ALIAS_SUFFIX):
        allowed = f"without {ALIAS_SUFFIX} where costeer is false: the server would steer it"
        raise InvalidParameter("model", model, allowed)
    return fields


def _num_streams(fields: dict[str, msgspec.Raw]) -> int:
    """How many streams the server will make of it; of values that the server refuses it does not matter."""
    n = _decode(fields["n"]) if "n" in fields else None
    if n is not None and (isinstance(n, bool) or not isinstance(n, int)):  # servers take "2" and 2.0 for a number, too
        raise InvalidParameter("n", n, "a whole number")
    prompt = fields.get("prompt")
    num_prompts = len(_decode_list(prompt)) if prompt is not None and _IS_LIST_OF_PROMPTS(prompt) else 1
    return (n if n is not None and n > 0 else 1) * num_prompts
