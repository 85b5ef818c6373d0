"""The gateway's two POST routes: from an app's request to the last byte of its answer.

Everything happens in one coroutine, so that all it takes (places, a ref, an account, a connection to the server) is given back at
its end, also when the app hangs up: then the server is hung up on as well, and aborts the request.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import httpx
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from costeer_vllm.edge.accounts import Account, Accounts
from costeer_vllm.edge.answers import Events, GatewayError, costeer_event, costeer_object, event_data, is_done, with_costeer
from costeer_vllm.edge.asks import Ask, parse_ask
from costeer_vllm.edge.context import ContextRefused, PrivateContexts
from costeer_vllm.edge.tasks import first_of
from costeer_vllm.edge.upstream import Patience, Upstream, passed_down
from costeer_vllm.errors import InvalidParameter
from costeer_vllm.request import FIELDS

MAX_BODY_BYTES = 16 * 2**20

Costeer: TypeAlias = Callable[[], Awaitable[dict[str, Any]]]  # the answer's costeer object, once its counts are known


@dataclass(slots=True)
class Device:
    """What both routes share."""

    worker: str
    steering_key: str | None
    max_streams: int
    steerable: Callable[[], PrivateContexts | None]  # the contexts while the edge worker is attached to its hub
    accounts: Accounts
    upstream: Upstream
    patience: Patience
    num_taken: int = 0  # places: one for a request that is being read, then one for every stream of it

    @contextlib.contextmanager
    def places(self, count: int) -> Iterator[None]:
        """Hold ``count`` of the places while the block runs; raises GatewayError if there are not so many left."""
        if self.num_taken + count > self.max_streams:
            sentence = f"this device answers at most {self.max_streams} requests at a time (n counts n times): try again later"
            raise GatewayError(429, "busy", sentence)
        self.num_taken += count
        try:
            yield
        finally:
            self.num_taken -= count


class Completions:
    """One of the routes, as an ASGI application."""

    def __init__(self, device: Device, path: str) -> None:
        """``path``: of the same route below the server's base URL."""
        self._device, self._path = device, path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; raises nothing that an app could cause."""
        reply, request = Reply(send, self._device.patience.client_s), Request(scope, receive)
        try:
            with self._device.places(1):
                body = await _read_body(request, self._device.patience.client_s)
                await first_of(self._answer(request.headers, body, reply), _gone(receive))
        except ClientDisconnect:
            return
        except GatewayError as error:
            with contextlib.suppress(ClientDisconnect):
                await reply.fail(error)

    async def _answer(self, headers: Mapping[str, str], body: bytes, reply: "Reply") -> None:
        ask, device = _parse(body), self._device
        if ask.steering is None:
            return await self._relay(headers, ask.plain(), reply, None)
        contexts = device.steerable()
        if contexts is None:
            sentence = "the edge worker is not attached to its hub (see its log), so it cannot steer: try again, or ask with "
            raise GatewayError(503, "not_attached", f'{sentence}"costeer": false for the plain answer')
        more = device.places(ask.num_streams - 1)
        with more, _ref(contexts, ask.context) as ref, device.accounts.account(ref, ask.num_streams) as account:
            body = ask.steered(device.worker, device.steering_key, ref)
            return await self._relay(headers, body, reply, lambda: self._costeer(account, ask))

    async def _costeer(self, account: Account, ask: Ask) -> dict[str, Any]:
        await account.settle(self._device.patience.counts_s)
        return costeer_object(account, self._device.worker, ask.strength)

    async def _relay(self, headers: Mapping[str, str], body: bytes, reply: "Reply", costeer: Costeer | None) -> None:
        upstream = self._device.upstream
        async with upstream.asked("POST", self._path, headers, body) as response:
            if _is_event_stream(response) and response.is_success:
                await self._relay_events(response, reply, costeer)
                return
            whole = await upstream.read(response)
        if costeer is not None and response.is_success:
            whole = with_costeer(whole, await costeer())
        await reply.start(response.status_code, passed_down(response), len(whole))
        await reply.send(whole)
        await reply.end()

    async def _relay_events(self, response: httpx.Response, reply: "Reply", costeer: Costeer | None) -> None:
        """Every event as soon as it is whole, and one more before [DONE]. A stream without [DONE] was broken off."""
        await reply.start(response.status_code, passed_down(response))
        upstream, events, first, is_whole = self._device.upstream, Events(), b"", False
        try:
            with upstream.failures_told():
                async for chunk in response.aiter_bytes():
                    for event in events.feed(chunk):
                        first = first or event_data(event)
                        is_whole |= await _send_event(event, first, reply, costeer)
        except GatewayError:
            if not is_whole:  # else there is nothing that the app could miss
                raise
        rest = events.end()
        if not (is_whole or is_done(rest)):  # half an event is none
            raise GatewayError(502, "server_broke_off", "the server ended its stream in the middle")
        await _send_event(rest, first, reply, costeer)
        await reply.end()


class Reply:
    """The way back to an app. It waits for an app that reads nothing, but not for ever."""

    def __init__(self, send: Send, patience_s: float) -> None:
        self._send, self._patience_s = send, patience_s
        self._is_started = False

    async def start(self, status: int, headers: Mapping[str, str], num_bytes: int | None = None) -> None:
        """The head; ``num_bytes`` of the body, None of a stream of events."""
        length = {} if num_bytes is None else {"content-length": str(num_bytes)}
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in {**headers, **length}.items()]
        self._is_started = True
        await self._pass({"type": "http.response.start", "status": status, "headers": raw})

    async def send(self, part: bytes) -> None:
        """A part of the body."""
        await self._pass({"type": "http.response.body", "body": part, "more_body": True})

    async def end(self) -> None:
        """The answer is whole."""
        await self._pass({"type": "http.response.body", "body": b"", "more_body": False})

    async def fail(self, error: GatewayError) -> None:
        """The error is the answer; in the middle of a stream of events it is the last of them."""
        body = error.event() if self._is_started else error.body()
        if not self._is_started:
            await self.start(error.status, {"content-type": "application/json"}, len(body))
        await self.send(body)
        await self.end()

    async def _pass(self, message: dict[str, Any]) -> None:
        try:
            await asyncio.wait_for(self._send(message), self._patience_s)
        except asyncio.TimeoutError:
            raise ClientDisconnect from None


async def _send_event(event: bytes, first: bytes, reply: Reply, costeer: Costeer | None) -> bool:
    """Pass an event on, and the costeer object before the last; returns whether it is the last."""
    is_last = is_done(event)
    if is_last and costeer is not None:
        await reply.send(costeer_event(first, await costeer()))
    if event:
        await reply.send(event)
    return is_last


def _parse(body: bytes) -> Ask:
    try:
        return parse_ask(body)
    except InvalidParameter as error:
        is_inside = error.field in (*FIELDS, "context")
        field = f"costeer.{error.field}" if is_inside else "model" if error.field == "model" else "costeer"
        raise GatewayError(400, "bad_parameter", str(error), field) from None


@contextlib.contextmanager
def _ref(contexts: PrivateContexts, context: str | None) -> Iterator[str]:
    """A ref for one request: of its own private text, or of the worker's."""
    try:
        ref = contexts.alias() if context is None else contexts.register(context)
    except ContextRefused as error:
        raise GatewayError(400, "bad_parameter", str(error), "costeer.context") from None
    try:
        yield ref
    finally:
        contexts.forget(ref)


async def _read_body(request: Request, patience_s: float) -> bytes:
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise GatewayError(415, "bad_content_type", "the content-type must be application/json")
    too_long = GatewayError(413, "too_long", f"the request is longer than {MAX_BODY_BYTES} bytes")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > MAX_BODY_BYTES:
        raise too_long

    async def read() -> bytes:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > MAX_BODY_BYTES:
                raise too_long
        return bytes(body)

    try:
        return await asyncio.wait_for(read(), patience_s)
    except asyncio.TimeoutError:
        raise GatewayError(408, "too_slow", f"the request did not arrive within {patience_s:g} s") from None


async def _gone(receive: Receive) -> None:
    """Returns when the app has hung up; the body has been read before."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _is_event_stream(response: httpx.Response) -> bool:
    return bool(response.headers.get("content-type", "").partition(";")[0].strip().lower() == "text/event-stream")
