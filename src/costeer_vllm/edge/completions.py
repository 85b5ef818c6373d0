"""The gateway's routes to the server: from an app's request to the last byte of its answer.

Everything happens in one coroutine, so that all it takes (places, a ref, an account, a connection to the server) is given back at
its end, also when the app hangs up: then the server is hung up on as well, and aborts the request.
"""

import asyncio
import contextlib
import functools
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import anyio
import httpx
import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from costeer_vllm.edge.accounts import Account, Accounts
from costeer_vllm.edge.answers import (
    UNREADABLE,
    Events,
    GatewayError,
    costeer_event,
    costeer_object,
    event_data,
    is_broken_off,
    is_done,
    with_costeer,
)
from costeer_vllm.edge.asks import ALIAS_SUFFIX, Ask, parse_ask
from costeer_vllm.edge.context import ContextRefused, PrivateContexts
from costeer_vllm.edge.disclosure import Disclosure, Disclosures, Promise
from costeer_vllm.edge.tasks import first_of
from costeer_vllm.edge.upstream import Patience, Upstream, passed_down
from costeer_vllm.errors import InvalidParameter
from costeer_vllm.protocol.messages import Fusion
from costeer_vllm.request import FIELDS, Options

MAX_BODY_BYTES = 16 * 2**20
MAX_BODIES_BYTES = 64 * 2**20  # of all requests that are being read or answered
MAX_BYTES_PARSED_HERE = 2**20  # longer ones are parsed in a thread, so that other answers go on
PART_BYTES = 64 * 2**10  # of an answer, which an app must take in time
NUM_PROBES = 2  # in a row: a network that is gone for a moment leaves a connection as it is
GAVE_UP = "the server gave this request up before its answer was whole: is it ending or paused?"

Costeer: TypeAlias = Callable[[], Awaitable[dict[str, Any]]]  # the answer's costeer object, once its counts are known


@dataclass(slots=True)
class Device:
    """What all routes share."""

    worker: str
    steering_key: str | None
    max_streams: int
    fusions: tuple[Fusion, ...]  # that the device consents to
    steerable: Callable[[], PrivateContexts | None]  # the contexts while the edge worker is attached to its hub
    accounts: Accounts
    disclosures: Disclosures
    upstream: Upstream
    patience: Patience
    strength: float | None = None  # of requests that say none; None: the paper's
    num_taken: int = 0  # places: one for a request that is being read, then one for every stream of it
    num_bytes: int = 0  # of the bodies of these requests

    @property
    def preset(self) -> dict[str, Any]:
        """What a costeer object says where the app does not."""
        fusion = {} if "cloud" in self.fusions else {"fusion": "edge"}
        return fusion | ({} if self.strength is None else {"strength": self.strength})

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

    @contextlib.contextmanager
    def room(self) -> Iterator[Callable[[int], None]]:
        """Gives a function that takes room for so many bytes more, to be held while the block runs; it raises GatewayError."""
        held = 0

        def take(num_bytes: int) -> None:
            nonlocal held
            if self.num_bytes + num_bytes > MAX_BODIES_BYTES:
                sentence = f"the requests on this device are longer than {MAX_BODIES_BYTES} bytes together: try again later"
                raise GatewayError(429, "busy", sentence)
            self.num_bytes += num_bytes
            held += num_bytes

        try:
            yield take
        finally:
            self.num_bytes -= held


class Models:
    """The route of the server's models, as an ASGI application."""

    def __init__(self, device: Device) -> None:
        self._device = device

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; raises nothing that an app could cause."""
        reply, request = Reply(send, self._device.patience.client_s), Request(scope, receive)
        async with _failures_told(reply):
            with self._device.places(1):
                await first_of(self._answer(request.headers, reply), _gone(receive))

    async def _answer(self, headers: Mapping[str, str], reply: "Reply") -> None:
        upstream = self._device.upstream
        async with upstream.asked("GET", "/models", headers) as response:
            whole = await upstream.read(response)
        await reply.whole(response.status_code, passed_down(response), _without_aliases(whole))


class Completions:
    """One of the routes with a body, as an ASGI application."""

    def __init__(self, device: Device, path: str) -> None:
        """``path``: of the same route below the server's base URL."""
        self._device, self._path = device, path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; raises nothing that an app could cause."""
        reply, request = Reply(send, self._device.patience.client_s), Request(scope, receive)
        async with _failures_told(reply):
            with self._device.places(1), self._device.room() as take:
                body = await read_body(request, self._device.patience.client_s, MAX_BODY_BYTES, take)
                await first_of(self._answer(request.headers, body, reply), _gone(receive))

    async def _answer(self, headers: Mapping[str, str], body: bytes, reply: "Reply") -> None:
        device, is_short = self._device, len(body) <= MAX_BYTES_PARSED_HERE
        ask = _parse(body, device.preset) if is_short else await asyncio.to_thread(_parse, body, device.preset)
        if ask.options is None:
            return await self._relay(headers, ask.plain(), reply)
        contexts = device.steerable()
        if contexts is None:
            sentence = "the edge worker is not attached to its hub (see its log), so it cannot steer: try again, or ask with "
            raise GatewayError(503, "not_attached", f'{sentence}"costeer": false for the plain answer')
        if ask.num_streams > device.max_streams:
            sentence = f"n for every prompt makes {ask.num_streams} answers; this device gives at most {device.max_streams}"
            raise GatewayError(400, "bad_parameter", sentence, "n")
        options = ask.options
        if options.fusion not in device.fusions:
            sentence = (
                "costeer: fusion is 'cloud'; it must be 'edge' or left out: only tokens may leave this device (--tokens-only)"
            )
            raise GatewayError(400, "bad_parameter", sentence, "costeer.fusion")
        scope = None if ask.context is None else hashlib.sha256(ask.context.encode(errors="replace")).hexdigest()
        promise = Promise(options.fusion, options.max_bits, scope)
        with contextlib.ExitStack() as stack:
            stack.enter_context(device.places(ask.num_streams - 1))
            ref = stack.enter_context(_ref(contexts, ask.context))
            disclosure = stack.enter_context(device.disclosures.promise(ref, promise))
            account = stack.enter_context(device.accounts.account(ref, ask.num_streams))
            body = ask.steered(device.worker, device.steering_key, ref)
            costeer = functools.partial(self._costeer, account, disclosure, options)
            return await first_of(self._relay(headers, body, reply, costeer), self._abandoned(account, reply))

    async def _costeer(self, account: Account, disclosure: Disclosure, options: Options) -> dict[str, Any]:
        await account.settle(self._device.patience.counts_s)
        return costeer_object(account, self._device.worker, options, disclosure)

    async def _abandoned(self, account: Account, reply: "Reply") -> None:
        """Raises GatewayError if nobody is left to go on with the answer, never returns.

        A server that is ending (vLLM on SIGTERM) may keep its connections open without a word for ever: also of a request that
        its engine had not begun, or had ended in good order.
        """
        upstream, num_failed = self._device.upstream, 0
        while num_failed < NUM_PROBES:
            num_sent = reply.num_sent
            await asyncio.sleep(self._device.patience.silence_s)
            is_silent = account.num_open == 0 and reply.num_sent == num_sent and not reply.is_sending
            num_failed = num_failed + 1 if is_silent and not await upstream.listens() else 0
        sentence = f"the server at {upstream.server} is ending and broke off its answer"
        raise GatewayError(502, "server_broke_off", sentence)

    async def _relay(self, headers: Mapping[str, str], body: bytes, reply: "Reply", costeer: Costeer | None = None) -> None:
        upstream = self._device.upstream
        async with upstream.asked("POST", self._path, headers, body) as response:
            if _is_event_stream(response) and response.is_success:
                await self._relay_events(response, reply, costeer)
                return
            whole = await upstream.read(response)
        if response.is_success and is_broken_off(whole):
            raise GatewayError(502, "server_broke_off", GAVE_UP)
        if costeer is not None and response.is_success:
            whole = with_costeer(whole, await costeer())
        await reply.whole(response.status_code, passed_down(response), whole)

    async def _relay_events(self, response: httpx.Response, reply: "Reply", costeer: Costeer | None) -> None:
        """Every event as soon as it is whole, and one more before [DONE]. A stream without [DONE] was broken off."""
        await reply.start(response.status_code, passed_down(response))
        events, first = Events(), b""
        whole_ones = _whole_events(self._device.upstream.parts(response), events)
        async for event in whole_ones:
            first = first or event_data(event)
            if is_done(event):
                break
            if is_broken_off(event):
                raise GatewayError(502, "server_broke_off", GAVE_UP)
            await reply.send(event)
        else:
            event = events.end()
            if not is_done(event):  # half an event is none
                raise GatewayError(502, "server_broke_off", "the server ended its stream in the middle")
        if costeer is not None:
            await reply.send(costeer_event(first, await costeer()))
        await reply.send(event)
        reply.is_whole = True
        with contextlib.suppress(GatewayError), anyio.move_on_after(self._device.patience.end_s):
            async for more in whole_ones:  # the app would miss nothing without them
                await reply.send(more)
        await reply.send(events.end())
        await reply.end()


class Reply:
    """The way back to an app. It waits for an app that reads nothing, but not for ever."""

    def __init__(self, send: Send, patience_s: float) -> None:
        self._send, self._patience_s = send, patience_s
        self._is_started = False
        self.num_sent = 0  # messages
        self.is_sending = False  # it waits for the app
        self.is_whole = False  # the app has the last of what it asked for

    async def start(self, status: int, headers: Mapping[str, str], num_bytes: int | None = None) -> None:
        """The head; ``num_bytes`` of the body, None of a stream of events."""
        length = {} if num_bytes is None else {"content-length": str(num_bytes)}
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in {**headers, **length}.items()]
        self._is_started = True
        await self._pass({"type": "http.response.start", "status": status, "headers": raw})

    async def send(self, piece: bytes) -> None:
        """A piece of the body; there is patience for each of its parts."""
        for start in range(0, len(piece), PART_BYTES):
            part = piece[start : start + PART_BYTES]
            await self._pass({"type": "http.response.body", "body": part, "more_body": True})

    async def end(self) -> None:
        """The answer is whole."""
        await self._pass({"type": "http.response.body", "body": b"", "more_body": False})

    async def whole(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        """All of an answer that is not streamed."""
        await self.start(status, headers, len(body))
        await self.send(body)
        await self.end()

    async def fail(self, error: GatewayError) -> None:
        """The error is the answer; in the middle of a stream of events it is the last of them, behind its end it is nobody's."""
        if not self._is_started:
            return await self.whole(error.status, {"content-type": "application/json"}, error.body())
        if not self.is_whole:
            await self.send(error.event())
        return await self.end()

    async def _pass(self, message: dict[str, Any]) -> None:
        self.is_sending = True
        try:
            with anyio.fail_after(self._patience_s):  # asyncio.wait_for can lose a cancellation before Python 3.12
                await self._send(message)
            self.num_sent += 1
        except TimeoutError:
            raise ClientDisconnect from None
        finally:
            self.is_sending = False


@contextlib.asynccontextmanager
async def _failures_told(reply: Reply) -> AsyncIterator[None]:
    """Why the block fails is told to the app, if it is still there."""
    try:
        yield
    except ClientDisconnect:
        return
    except GatewayError as error:
        with contextlib.suppress(ClientDisconnect):
            await reply.fail(error)
    except asyncio.CancelledError:  # the worker ends, and the time for answers under way is over
        with contextlib.suppress(ClientDisconnect):
            await reply.fail(GatewayError(503, "worker_stops", "the edge worker ends, and this device's gateway with it"))
        raise


async def _whole_events(parts: AsyncIterator[bytes], events: Events) -> AsyncIterator[bytes]:
    async for part in parts:
        for event in events.feed(part):
            yield event


def _without_aliases(body: bytes) -> bytes:
    """The server's list of models, which here need no other name to be steered."""
    try:
        answer = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        models = msgspec.json.decode(answer["data"], type=list[msgspec.Raw])
        names = [str(msgspec.json.decode(model, type=dict[str, Any]).get("id")) for model in models]
    except (KeyError, *UNREADABLE):
        return body
    kept = [model for model, name in zip(models, names, strict=True) if not name.endswith(ALIAS_SUFFIX)]
    return msgspec.json.encode({**answer, "data": kept})


def _parse(body: bytes, preset: Mapping[str, Any]) -> Ask:
    try:
        return parse_ask(body, preset)
    except InvalidParameter as error:
        is_inside = error.field in (*FIELDS, "context")
        field = f"costeer.{error.field}" if is_inside else error.field if error.field in ("model", "n") else "costeer"
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


async def read_body(
    request: Request, patience_s: float, most: int, take: Callable[[int], None] = lambda num_bytes: None
) -> bytes:
    """The JSON of a request, for each part of which ``take`` takes room; raises GatewayError if there are over ``most`` bytes."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise GatewayError(415, "bad_content_type", "the content-type must be application/json")
    too_long = GatewayError(413, "too_long", f"the request is longer than {most} bytes")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > most:
        raise too_long

    async def read() -> bytes:
        body = bytearray()
        async for part in request.stream():
            if len(body) + len(part) > most:
                raise too_long
            take(len(part))
            body += part
        return bytes(body)

    try:
        with anyio.fail_after(patience_s):
            return await read()
    except TimeoutError:
        raise GatewayError(408, "too_slow", f"the request did not arrive within {patience_s:g} s") from None


async def _gone(receive: Receive) -> None:
    """Returns when the app has hung up; the body has been read before."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _is_event_stream(response: httpx.Response) -> bool:
    return bool(response.headers.get("content-type", "").partition(";")[0].strip().lower() == "text/event-stream")
