"""The device's own page: what is attached, what each token owed to the context, what was told and what left. For its owner only.

GET  /                          the page itself: static, the same for everybody
GET  /costeer/state             all but the tokens, as JSON
GET  /costeer/answers/STREAM    the tokens of one of the last streams
POST /costeer/strength          {"strength": number or null}: of requests that say none
"""

import importlib.resources
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response

from costeer_vllm import __version__
from costeer_vllm.edge.answers import UNREADABLE, GatewayError
from costeer_vllm.edge.books import Books
from costeer_vllm.edge.completions import Device
from costeer_vllm.edge.ledger import Entry
from costeer_vllm.edge.settings import EdgeSettings
from costeer_vllm.edge.traces import Trace
from costeer_vllm.errors import InvalidParameter
from costeer_vllm.steering import SteeringParams, check_strength

MAX_ENTRIES = 200  # of the ledger, the newest
MAX_BODY_BYTES = 1024
# Nothing from elsewhere, nothing to elsewhere, and no frame of another page around it.
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cache-control": "no-store",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class Page:
    """The routes of the page."""

    def __init__(self, device: Device, settings: EdgeSettings, books: Books) -> None:
        self._device, self._settings, self._books = device, settings, books

    def add_to(self, app: FastAPI) -> None:
        """Serve it from ``app``."""
        page = importlib.resources.files("costeer_vllm.edge").joinpath("page.html").read_bytes()

        @app.get("/")
        async def root() -> Response:
            return Response(page, headers=_HEADERS, media_type="text/html")

        @app.get("/costeer/state")
        async def state() -> Response:
            return _json(self.state())

        @app.get("/costeer/answers/{stream:path}")
        async def answer(stream: str) -> Response:
            trace = self._books.traces.find(stream)
            if trace is None:
                raise GatewayError(404, "unknown_stream", "the stream is not among the last ones")
            return _json(trace)

        @app.post("/costeer/strength")
        async def strength(request: Request) -> Response:
            self._device.strength = _strength(request, await request.body())
            return _json({"strength": self._device.strength})

    def state(self) -> dict[str, Any]:
        """Everything that the page shows but tokens."""
        settings, ledger = self._settings, self._books.ledger
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
            "answers": [_without_tokens(trace) for trace in self._books.traces],
            "ledger": None if ledger is None else _sums(ledger.entries),
        }


def _without_tokens(trace: Trace) -> dict[str, Any]:
    return {field: getattr(trace, field) for field in Trace.__slots__ if field != "tokens"}


def _sums(entries: list[Entry]) -> dict[str, Any]:
    told = [entry.bits for entry in entries if entry.bits is not None]
    return {
        "answers": len(entries),
        "bits": sum(told),
        "edge_answers": len(told),
        "delta_bytes": sum(entry.bytes_up for entry in entries if entry.fusion == "cloud"),
        "bytes_up": sum(entry.bytes_up for entry in entries),
        "bytes_down": sum(entry.bytes_down for entry in entries),
        "entries": entries[-MAX_ENTRIES:],
    }


def _strength(request: Request, body: bytes) -> float | None:
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise GatewayError(415, "bad_content_type", "the content-type must be application/json")
    try:
        value = msgspec.json.decode(body[:MAX_BODY_BYTES], type=dict[str, Any])["strength"]
    except (KeyError, *UNREADABLE):
        raise GatewayError(400, "bad_json", 'the body must be {"strength": number or null}', "strength") from None
    try:
        return None if value is None else check_strength("strength", value)
    except InvalidParameter as error:
        raise GatewayError(400, "bad_parameter", str(error), "strength") from None


def _json(content: Any) -> Response:
    return Response(msgspec.json.encode(content), headers={"cache-control": "no-store"}, media_type="application/json")
