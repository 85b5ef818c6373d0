"""What the gateway gives back to apps: the server's bytes as they are, the ``costeer`` object, errors in OpenAI's format."""

import re
from collections.abc import Iterator
from typing import Any

import msgspec

from costeer_vllm.edge.accounts import Account
from costeer_vllm.edge.disclosure import Disclosure
from costeer_vllm.errors import CoSteerError
from costeer_vllm.request import Options

NO_ROOM = "the private context did not fit into the small model's positions, or not to the end: what follows is plain"
MAX_EVENT_BYTES = 16 * 2**20
UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)  # what msgspec raises for bytes that are no JSON

# Two ends of line in a row. A CR counts once it is known what follows: no CRLF is ever torn.
_END_OF_EVENT = re.compile(rb"(?:\r\n|\n|\r(?=[^\n])){2}")
_END_OF_LINE = re.compile(rb"\r\n|\n|\r")


class GatewayError(CoSteerError):
    """An answer with an HTTP status, a code for programs and a sentence for people, which holds nothing private."""

    def __init__(self, status: int, code: str, sentence: str, param: str | None = None) -> None:
        super().__init__(sentence)
        self.status = status
        self.code = code
        self.param = param  # the field that is wrong

    def body(self) -> bytes:
        """In OpenAI's format."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})

    def event(self) -> bytes:
        """In the middle of a stream of events, and its end."""
        return b"data: " + self.body() + b"\n\n"


# --- the costeer object ---


def costeer_object(account: Account, worker: str, options: Options, disclosure: Disclosure) -> dict[str, Any]:
    """What an answer says of its own steering; counts that nobody told are null."""
    found = {
        "worker": worker,
        "fusion": options.fusion,
        "strength": options.strength,
        "tokens_steered": account.tokens_steered if account.is_complete else None,
        "tokens_missed": account.tokens_missed if account.is_complete else None,
        "bytes_up": account.bytes_up,
        "bytes_down": account.bytes_down,
        "disclosed_bits": round(disclosure.bits, 3) if options.fusion == "edge" else None,
    }
    if disclosure.max_bits is not None:
        found["max_bits"] = disclosure.max_bits
    if account.num_answers == 0:  # then it is certain, whoever tells
        found["tokens_steered"] = 0
    note = _note(account) or (NO_ROOM if disclosure.has_no_room else None)
    return {**found, "note": note} if note else found


def _note(account: Account) -> str | None:
    why = f" ({account.why})" if account.why else ""
    if account.num_answers == 0 and not account.is_complete:
        why = why or " (the server's hub asked it for nothing: is it the hub of this server?)"
        return f"no token was steered: the edge worker gave no answer{why}"
    if not account.is_complete:
        return f"the counts are not known here{why}: the hub of the server may have them"
    if account.tokens_missed and not account.tokens_steered:
        return "no token was steered: no answer of the edge worker came in time"
    return None


def with_costeer(answer: bytes, costeer: dict[str, Any]) -> bytes:
    """A JSON object with one more field, its other bytes as they are; what is no object stays as it is."""
    text = answer.strip()
    if not (text.startswith(b"{") and text.endswith(b"}")):
        return answer
    comma = b"," if text[1:-1].strip() else b""
    return text[:-1] + comma + b'"costeer":' + msgspec.json.encode(costeer) + b"}"


# --- streams of events (text/event-stream) ---


class Events:
    """Cuts a stream of bytes into events, which joined are again the stream."""

    def __init__(self) -> None:
        self._rest = bytearray()
        self._searched = 0  # how much of it has been searched

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """The events that ``chunk`` completes. Raises GatewayError if one is longer than 16 MiB."""
        self._rest += chunk
        while found := _END_OF_EVENT.search(self._rest, self._searched):
            yield self._take(found.end())
        self._searched = max(0, len(self._rest) - 4)  # an end of event has up to 4 bytes
        if len(self._rest) > MAX_EVENT_BYTES:
            raise GatewayError(502, "bad_answer", f"the server sent an event of more than {MAX_EVENT_BYTES} bytes")

    def end(self) -> bytes:
        """What is left at the end of the stream: mostly nothing."""
        return self._take(len(self._rest))

    def _take(self, num_bytes: int) -> bytes:
        taken = bytes(self._rest[:num_bytes])
        del self._rest[:num_bytes]
        self._searched = 0
        return taken


class _Choice(msgspec.Struct):
    finish_reason: Any = None


class _Answer(msgspec.Struct):
    choices: list[_Choice] = []


def is_broken_off(answer: bytes) -> bool:
    """Whether a choice of this answer, or event of one, ends with "abort": vLLM's word for what it gave up, as on SIGTERM.

    No client of OpenAI's knows the word, so that a short answer would look finished.
    """
    if b'"abort"' not in answer:
        return False
    try:
        found = msgspec.json.decode(event_data(answer) or answer, type=_Answer)
        return any(choice.finish_reason == "abort" for choice in found.choices)
    except UNREADABLE:
        return False


def is_done(event: bytes) -> bool:
    """Whether this is the event that ends OpenAI's streams."""
    return b"[DONE]" in event and event_data(event).strip() == b"[DONE]"


def costeer_event(first: bytes, costeer: dict[str, Any]) -> bytes:
    """A chunk without choices, as OpenAI sends one for the usage; ``first``: the first chunk, whose id it takes over."""
    chunk: dict[str, Any] = {"choices": [], "costeer": costeer}
    try:
        former = msgspec.json.decode(first, type=dict[str, msgspec.Raw])
    except UNREADABLE:
        former = {}
    kept = {field: former[field] for field in ("id", "object", "created", "model") if field in former}
    return b"data: " + msgspec.json.encode({**kept, **chunk}) + b"\n\n"


def event_data(event: bytes) -> bytes:
    """The values of the event's ``data`` fields, joined as the HTML standard says (9.2.6)."""
    lines = _END_OF_LINE.split(event.removeprefix(b"\xef\xbb\xbf"))
    values = [line.removeprefix(b"data").removeprefix(b":") for line in lines if line == b"data" or line.startswith(b"data:")]
    return b"\n".join(value.removeprefix(b" ") for value in values)
