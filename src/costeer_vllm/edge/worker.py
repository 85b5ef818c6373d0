"""The edge worker: attaches to the hub, keeps attached, and answers the engine with deltas or, in edge fusion, with tokens.

The event loop reads frames into ``Streams`` and writes frames. The model thread evaluates one window at a time
(``Evaluator.turn``), so that the socket stays responsive. Between the two go, per window, one list of orders and one of results.
"""

import asyncio
import contextlib
import functools
import logging
import os
import random
import secrets
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import anyio
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, WebSocketException

from costeer_vllm.edge.books import Books
from costeer_vllm.edge.context import PrivateContexts
from costeer_vllm.edge.disclosure import Disclosures
from costeer_vllm.edge.ledger import Ledger
from costeer_vllm.edge.loading import load
from costeer_vllm.edge.prompts import where
from costeer_vllm.edge.settings import EdgeSettings, attach_url
from costeer_vllm.edge.streams import Answer, Failure, NoRoom, Read, Result, Streams
from costeer_vllm.edge.tasks import first_of
from costeer_vllm.errors import CoSteerError, HubUnavailable, RemoteProtocolError
from costeer_vllm.protocol import keys
from costeer_vllm.protocol.messages import (
    MAX_FRAME_BYTES,
    PROTOCOL_VERSION,
    Advance,
    Attach,
    Attached,
    Begin,
    Candidates,
    Choice,
    Delta,
    End,
    HubToEdge,
    Refused,
    Vocabulary,
    decode_hub_to_edge,
    encode,
)

if TYPE_CHECKING:
    from costeer_vllm.edge.evaluator import Evaluator
    from costeer_vllm.edge.gateway import Gateway

EXIT_STOPPED, EXIT_FAILED, EXIT_INVALID, EXIT_REFUSED = 0, 1, 2, 3

MAX_MALFORMED = 100  # frames per connection that are skipped, for a newer hub may say more than we know, before it is dropped
IDLE_S = 600.0  # without a frame a stream is closed
ATTACH_TIMEOUT_S = 10.0
PING_INTERVAL_S, PING_TIMEOUT_S = 10.0, 20.0
GATHER_SHARE, MAX_GATHER_S = 0.2, 0.01  # of a window's time: how long the first asked stream waits for the others
NUM_PINGS = 4  # of which the quickest counts: the others met a busy thread

log = logging.getLogger("costeer.edge")

T = TypeVar("T")


@dataclass(frozen=True)
class Retry:
    """How a lost or refused attachment is tried again: after ``first_s``, twice that, ..., ``most_s``, each with jitter."""

    first_s: float = 0.2
    most_s: float = 10.0
    name_taken: int = 12  # times in a row: a former self's half-open connection is noticed by the hub within half a minute


class AttachmentRefused(CoSteerError):
    """The hub will not have this edge worker; trying again is of no use."""


class EdgeWorker:
    """One edge worker. ``run`` it in an event loop; ``stop`` ends it."""

    def __init__(
        self, settings: EdgeSettings, *, on_frame_sent: Callable[[bytes], None] | None = None, retry: Retry | None = None
    ) -> None:
        self._settings = settings
        self._on_frame_sent = on_frame_sent
        self._retry = retry or Retry()
        self._instance = secrets.token_hex(16)
        self._random = random.Random()
        self._thread = ThreadPoolExecutor(1, "costeer-model")
        self._news = asyncio.Event()  # a frame was taken in
        self._stopping = asyncio.Event()
        self._attached_at: float | None = None
        self._steerable: PrivateContexts | None = None  # the contexts, while attached
        ledger = None if settings.ledger is None else Ledger(Path(settings.ledger), settings.name)
        self._books = Books(disclosures=Disclosures(settings.max_bits), ledger=ledger)
        self._turn_s = 0.0  # how long the last window of next ids took
        self._evaluator: Evaluator  # with the next three from the moment on when the model is loaded
        self._contexts: PrivateContexts
        self._streams: Streams
        self._attach: Attach

    def stop(self) -> None:
        """Ask ``run`` to return; call it in the event loop."""
        self._stopping.set()

    async def run(self) -> None:
        """Load the model, attach, and serve until ``stop``.

        Raises:
            InvalidParameter, Unsupported: if the model, the context or the template cannot be used.
            AttachmentRefused: if the hub refuses for a reason that will not go away.
        """
        try:
            with self._gateway() as gateway:  # from the start: plain answers need no small model
                await first_of(self._load_and_attach(), self._stopping.wait(), *([gateway.serve()] if gateway else []))
        finally:
            self._thread.shutdown(wait=True, cancel_futures=True)

    @contextlib.contextmanager
    def _gateway(self) -> "Iterator[Gateway | None]":
        if self._settings.gateway is None:
            yield None
            return
        from costeer_vllm.edge.gateway import Gateway

        with contextlib.closing(Gateway(self._settings, lambda: self._steerable, self._books)) as gateway:
            yield gateway

    async def _load_and_attach(self) -> None:
        settings = self._settings
        loaded = await self._in_thread(lambda: load(settings))
        self._evaluator, self._contexts = loaded.evaluator, loaded.contexts
        if settings.gateway is not None:  # somebody may look
            self._books.traces.decode = loaded.decode
        self._streams = Streams(
            settings.name,
            loaded.num_tokens,
            loaded.max_positions,
            settings.max_streams,
            settings.steering_key,
            settings.fusions,
            self._books.disclosures,
        )
        self._attach = _attach(settings, self._instance, loaded.vocabulary)
        await self._keep_attached()

    # --- attachment ---

    async def _keep_attached(self) -> None:
        attempt = num_taken = 0
        while True:
            self._attached_at = None
            try:
                await self._attach_and_serve()
            except _NameTaken as error:
                num_taken += 1
                if num_taken > self._retry.name_taken:
                    raise AttachmentRefused(str(error)) from None
                log.warning("%s; trying again", error)
            except (HubUnavailable, RemoteProtocolError) as error:
                log.warning("%s; trying again", error)
            except (OSError, TimeoutError, asyncio.TimeoutError, WebSocketException) as error:
                log.warning("the connection to %s failed or was lost (%s); trying again", self._url, _describe(error))
            if self._had_been_well():
                attempt = num_taken = 0
            delay = min(self._retry.first_s * 2**attempt, self._retry.most_s)
            attempt = min(attempt + 1, 32)
            await asyncio.sleep(delay * self._random.uniform(0.5, 1.0))

    def _had_been_well(self) -> bool:
        return self._attached_at is not None and time.monotonic() - self._attached_at > self._retry.most_s

    @property
    def _url(self) -> str:
        return attach_url(self._settings.hub)

    async def _attach_and_serve(self) -> None:
        """One connection, from the handshake until it is lost; raises whatever ended it."""
        connection = connect(
            self._url,
            compression=None,  # nothing whose size would depend on the contents
            max_size=MAX_FRAME_BYTES,
            ping_interval=PING_INTERVAL_S,
            ping_timeout=PING_TIMEOUT_S,
            open_timeout=ATTACH_TIMEOUT_S,
            close_timeout=2.0,
        )
        async with connection as websocket:
            await self._send(websocket, self._attach)
            with anyio.fail_after(ATTACH_TIMEOUT_S):
                answer = await websocket.recv()
            self._check_attached(answer)
            self._attached_at = time.monotonic()
            vocabulary = self._attach.vocabulary
            log.info(
                "attached as %r to %s (model %s, vocabulary %s of %d tokens)",
                self._attach.worker, self._url, self._attach.model, vocabulary.fingerprint[:8], vocabulary.size,
            )  # fmt: skip
            self._steerable = self._contexts
            try:
                await first_of(self._read(websocket), self._answer(websocket), self._expire(websocket), self._measure(websocket))
            finally:
                self._steerable = None
                self._books.detached()
                self._streams.clear()
                await self._turn()

    def _check_attached(self, frame: str | bytes) -> None:
        match _decode(frame):
            case Attached():
                return
            case Refused(code="name_taken", sentence=sentence):
                raise _NameTaken(f"the hub refuses: {_printable(sentence)}")
            case Refused(code="full", sentence=sentence):
                raise HubUnavailable(f"the hub refuses for now: {_printable(sentence)}")
            case Refused(sentence=sentence):
                raise AttachmentRefused(f"the hub refuses: {_printable(sentence)}")
            case _:
                raise RemoteProtocolError("the hub's first frame is neither Attached nor Refused")

    # --- while attached ---

    async def _read(self, websocket: ClientConnection) -> None:
        malformed = 0
        async for frame in websocket:
            message = _decode(frame)
            if isinstance(message, (Begin, Advance, Candidates, End)):
                self._books.received(message, len(frame))
                await self._send_if_any(websocket, self._streams.feed(message, time.monotonic()))
                self._news.set()
                continue
            malformed += 1
            if malformed > MAX_MALFORMED:
                raise RemoteProtocolError(f"the hub sent {malformed} malformed frames")
        raise ConnectionResetError("closed by the hub")

    async def _answer(self, websocket: ClientConnection) -> None:
        while True:
            if not self._evaluator.is_busy:
                await self._news.wait()
            if self._streams.num_asked:
                await self._gather()
            self._news.clear()
            for result in await self._turn():
                await self._send_result(websocket, result)

    async def _gather(self) -> None:
        """The streams of one engine ask at the same time, one frame after the other: wait a little for all of them."""
        await asyncio.sleep(0)
        deadline = time.monotonic() + min(GATHER_SHARE * self._turn_s, MAX_GATHER_S)
        while self._streams.num_asked < len(self._streams) and (left := deadline - time.monotonic()) > 0:
            self._news.clear()
            with anyio.move_on_after(left):  # asyncio.wait_for can lose a cancellation before Python 3.12
                await self._news.wait()

    async def _expire(self, websocket: ClientConnection) -> None:
        while True:
            await asyncio.sleep(IDLE_S / 20)
            for end in self._streams.expire(time.monotonic() - IDLE_S):
                await self._send_if_any(websocket, end)
                self._news.set()

    async def _measure(self, websocket: ClientConnection) -> None:
        """How long the round trip to the hub takes."""
        latest: deque[float] = deque(maxlen=NUM_PINGS)
        while True:
            latest.append(await (await websocket.ping()))
            self._evaluator.pace.round_trip_s = min(latest)
            await asyncio.sleep(PING_INTERVAL_S if len(latest) == NUM_PINGS else 0)

    async def _turn(self) -> list[Result]:
        """Hand the newest orders to the model thread and wait for its results."""
        orders, closed = self._streams.take_orders()
        start = time.monotonic()
        results = await self._in_thread(functools.partial(self._evaluator.turn, orders, closed))
        if results:
            self._turn_s = time.monotonic() - start
        return results

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """``work()`` in the model thread; a cancellation waits for its end, so that nothing is left running unheard."""
        future = asyncio.get_running_loop().run_in_executor(self._thread, work)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait([future])
            raise

    async def _send_result(self, websocket: ClientConnection, result: Result) -> None:
        match result:
            case Answer():
                await self._send_if_any(websocket, self._streams.answered(result))
            case Read(serial, token, without_context, with_context):
                self._books.traces.moved(self._streams.name_of(serial) or "", token, without_context, with_context)
            case NoRoom(serial):
                log.warning("stream %d: the private context does not fit into the small model's positions", serial)
                self._streams.no_room(serial)
            case Failure(serial, reason, sentence):
                await self._send_if_any(websocket, self._streams.fail(serial, reason, sentence))

    async def _send_if_any(self, websocket: ClientConnection, message: Delta | Choice | End | None) -> None:
        if isinstance(message, End):
            level = logging.DEBUG if message.reason == "unknown_stream" else logging.WARNING
            log.log(level, "%s: %s", message.reason, message.sentence)
        if isinstance(message, Choice) and (chooser := self._streams.chooser_of(message.stream)) is not None:
            self._books.chosen(message, chooser)
        if message is not None:
            await self._send(websocket, message)

    async def _send(self, websocket: ClientConnection, message: Attach | Delta | Choice | End) -> None:
        frame = encode(message)
        if not isinstance(message, Attach):
            self._books.sent(message, len(frame))
        await websocket.send(frame)
        if self._on_frame_sent is not None:
            self._on_frame_sent(frame)


class _NameTaken(CoSteerError):
    """Another worker is attached under the name, or our own former connection is not known to be dead yet."""


def run(settings: EdgeSettings) -> int:
    """Serve until SIGINT or SIGTERM; logs what goes wrong. Returns the exit code: 0 stopped, 1 failed, 2 invalid, 3 refused."""
    try:
        asyncio.run(_run(settings))
        return EXIT_STOPPED
    except KeyboardInterrupt:
        return EXIT_STOPPED
    except AttachmentRefused as error:
        log.error("%s", error)
        return EXIT_REFUSED
    except CoSteerError as error:
        log.error("%s", error)
        return EXIT_INVALID
    except Exception as error:  # shown without its text and its frames, which may hold private text
        log.error("the edge worker fails: %s", where(error))
        return EXIT_FAILED


async def _run(settings: EdgeSettings) -> None:
    worker = EdgeWorker(settings)
    for signum in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError, ValueError):  # Windows; not the main thread
            asyncio.get_running_loop().add_signal_handler(signum, worker.stop)
    await worker.run()


def _attach(settings: EdgeSettings, instance: str, vocabulary: Vocabulary) -> Attach:
    model = Path(settings.model).resolve().name if os.path.isdir(settings.model) else settings.model
    return Attach(
        PROTOCOL_VERSION,
        settings.name,
        instance,
        model[:512],  # of a directory the last part only: the others may name a person
        vocabulary,
        attach_key=settings.attach_key,
        key_digest=keys.key_digest(settings.steering_key) if settings.steering_key is not None else None,
        max_streams=settings.max_streams,
        fusions=settings.fusions,
    )


def _decode(frame: str | bytes) -> HubToEdge | None:
    """The message in a frame; None, and its kind of malformation in the log, if there is none."""
    if isinstance(frame, str):
        log.debug("a text frame from the hub")
        return None
    try:
        message: HubToEdge = decode_hub_to_edge(frame)
        return message
    except Exception as error:  # mostly msgspec's, but whatever it is, a frame must not stop the worker
        log.debug("a malformed frame from the hub: %s", type(error).__name__)
        return None


def _describe(error: BaseException) -> str:
    """What ended a connection, without anything that the peer wrote."""
    if isinstance(error, ConnectionClosed):
        received = error.rcvd.code if error.rcvd else None
        return f"closed with code {received}" if received else "closed without a word"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return type(error).__name__


def _printable(sentence: str) -> str:
    return "".join(character if character.isprintable() else " " for character in sentence)
