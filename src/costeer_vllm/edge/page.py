"""The device's own page: what is attached, what each token owed to the context, what was told and what left. For its owner only.

GET  /                          the page itself: static, the same for everybody
GET  /costeer/state             all but the tokens, as JSON
GET  /costeer/answers/STREAM    the tokens of one of the last streams; with ?from=N those from the N-th on
POST /costeer/strength          {"strength": number or null}: of requests that say none
"""

import base64
import hashlib
import importlib.resources
import re
from collections.abc import Sequence
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from starlette.requests import ClientDisconnect

from costeer_vllm import __version__
from costeer_vllm.edge.answers import UNREADABLE, GatewayError
from costeer_vllm.edge.books import Books
from costeer_vllm.edge.completions import Device, read_body
from costeer_vllm.edge.ledger import Entry, entry_of
from costeer_vllm.edge.settings import EdgeSettings
from costeer_vllm.edge.traces import Trace
from costeer_vllm.errors import InvalidParameter
from costeer_vllm.steering import SteeringParams, check_strength

MAX_PLOTTED = 200  # entries of the ledger, the newest
MAX_BODY_BYTES = 1024
DIGITS = 4  # of a probability

_HEADERS = {
    "cache-control": "no-store",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class Page:
    """The routes of the page."""

    def __init__(self, device: Device, settings: EdgeSettings, books: Books) -> None:
        self._device, self._settings, self._books = device, settings, books
        self._entries: list[Entry] = []  # those that were summed last
        self._sums = sums([])

    def add_to(self, app: FastAPI) -> None:
        """Serve it from ``app``."""
        page = importlib.resources.files("costeer_vllm.edge").joinpath("page.html").read_text(encoding="utf-8")
        policies = {"content-security-policy": content_security_policy(page), "cross-origin-opener-policy": "same-origin"}
        headers = {**_HEADERS, **policies}

        @app.get("/")
        async def root() -> Response:
            return Response(page, headers=headers, media_type="text/html")

        @app.get("/costeer/state")
        async def state() -> Response:
            return _json(self.state())

        @app.get("/costeer/answers/{stream:path}")
        async def answer(stream: str, request: Request) -> Response:
            trace = self._books.traces.find(stream)
            if trace is None:
                raise GatewayError(404, "unknown_stream", "the stream is not among the last ones")
            return _json({**_head(trace), "tokens": _tokens(trace, _first(request))})

        @app.post("/costeer/strength")
        async def strength(request: Request) -> Response:
            try:
                body = await read_body(request, self._device.patience.client_s, MAX_BODY_BYTES)
            except ClientDisconnect:
                return Response()  # to nobody
            self._device.strength = _strength(body)
            return _json({"strength": self._device.strength})

    def state(self) -> dict[str, Any]:
        """Everything that the page shows but tokens."""
        settings, traces = self._settings, self._books.traces
        assert settings.gateway is not None
        return {
            "version": __version__,
            "worker": settings.name,
            "model": settings.model,
            "attached": self._device.steerable() is not None,
            "hub": settings.hub,
            "server": settings.gateway.server,
            "tokens_only": settings.tokens_only,
            "max_bits": settings.max_bits,
            "strength": self._device.strength,
            "default_strength": SteeringParams().strength,
            "live": traces.num_open,
            "answers": [_head(trace) for trace in traces],
            "ledger": self._ledger(),
        }

    def _ledger(self) -> dict[str, Any]:
        """Without a ledger: of the last streams, as far as they are over."""
        ledger = self._books.ledger
        if ledger is None:
            ended = [trace for trace in self._books.traces if trace.ended is not None]
            return {"kept": False, **sums([entry_of(trace, self._settings.name) for trace in reversed(ended)])}
        if ledger.entries is not self._entries:
            self._entries, self._sums = ledger.entries, sums(ledger.entries)
        return {"kept": True, **self._sums}


def content_security_policy(page: str) -> str:
    """Only the page's own style and script, no text turned into markup, nothing from or to elsewhere, and no frame around it."""
    style, script = (_digest(page, element) for element in ("style", "script"))
    return (
        f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; img-src data:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )


def sums(entries: Sequence[Entry]) -> dict[str, Any]:
    """What the page shows of a ledger."""
    edge = [entry for entry in entries if entry.fusion == "edge"]
    cloud = [entry for entry in entries if entry.fusion == "cloud"]
    bits = sum(entry.bits or 0.0 for entry in edge)
    return {
        "since": entries[0].time if entries else None,
        "edge": {"answers": len(edge), "bytes_up": sum(entry.bytes_up for entry in edge), "bits": round(bits, 3)},
        "cloud": {"answers": len(cloud), "bytes_up": sum(entry.bytes_up for entry in cloud)},
        "bytes_down": sum(entry.bytes_down for entry in entries),
        "told": [[round(entry.time, 1), round(entry.bits or 0.0, 3)] for entry in edge[-MAX_PLOTTED:]],
    }


def _head(trace: Trace) -> dict[str, Any]:
    fields = {field: getattr(trace, field) for field in Trace.__slots__ if field != "tokens"}
    return {**fields, "num_shown": len(trace.tokens), "bits": None if trace.bits is None else round(trace.bits, 3)}


def _tokens(trace: Trace, first: int) -> list[dict[str, Any]]:
    return [
        {"token": moved.token, "text": moved.text, "plain": _rounded(moved.plain), "personal": _rounded(moved.personal)}
        for moved in trace.tokens[first:]
    ]


def _rounded(probability: float) -> float:
    return float(f"{probability:.{DIGITS}g}")


def _first(request: Request) -> int:
    value = request.query_params.get("from", "0")
    if not re.fullmatch(r"[0-9]{1,9}", value):
        raise GatewayError(400, "bad_parameter", "from must be the number of a token, 0 or more", "from")
    return int(value)


def _strength(body: bytes) -> float | None:
    try:
        value = msgspec.json.decode(body, type=dict[str, Any])["strength"]
    except (KeyError, *UNREADABLE):
        raise GatewayError(400, "bad_json", 'the body must be {"strength": number or null}', "strength") from None
    try:
        return None if value is None else check_strength("strength", value)
    except InvalidParameter as error:
        raise GatewayError(400, "bad_parameter", str(error), "strength") from None


def _digest(page: str, element: str) -> str:
    (content,) = re.findall(rf"<{element}>(.*?)</{element}>", page, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def _json(content: Any) -> Response:
    return Response(msgspec.json.encode(content), headers=_HEADERS, media_type="application/json")
