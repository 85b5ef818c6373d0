"""The hub's process: uvicorn for edge workers and HTTP, ZeroMQ for engines, one event loop, one router between them."""

import asyncio
import contextlib
import itertools
import logging
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response, WebSocket
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from costeer_vllm import __version__
from costeer_vllm.errors import HubUnavailable, RemoteProtocolError
from costeer_vllm.hub.links import NORMAL, PROTOCOL_ERROR, EdgeLink, EngineLink
from costeer_vllm.hub.metrics import build_registry
from costeer_vllm.hub.router import Router, Send, StreamRow, WorkerRow
from costeer_vllm.hub.settings import HubSettings
from costeer_vllm.protocol import keys
from costeer_vllm.protocol.messages import MAX_FRAME_BYTES, PROTOCOL_VERSION

__all__ = ["Hub", "HubSettings", "build_app", "run"]

logger = logging.getLogger("costeer.hub")

TICK_S = 0.5  # between two looks at the parent process
SWEEP_S = 5.0
TCP_TIMEOUT_MS = 30_000  # a peer that reads nothing for so long is cut off
SPARE_CONNECTIONS = 256  # that have not attached yet, beyond the limit of attachments


class Hub:
    """A router with its links: delivers what the router says and tells it what came in."""

    def __init__(self, settings: HubSettings, router: Router, engines: EngineLink) -> None:
        self.settings = settings
        self.router = router
        self.engines = engines
        self._edges: dict[int, EdgeLink] = {}
        self._connections = itertools.count(1)

    def start(self) -> None:
        """Begin to hear engines; needs a running loop."""
        self.engines.start(self._engine_frame, self._engine_lost)

    def deliver(self, sends: list[Send]) -> None:
        """Send without waiting. A peer that is gone or too slow is given up, which may lead to further sends."""
        pending = deque(sends)
        while pending:
            destination, frame = pending.popleft()
            if isinstance(destination, int):
                pending.extend(self._to_edge(destination, frame))
            elif frame is not None:
                pending.extend(self._to_engine(destination, frame))

    def sweep(self) -> None:
        """Let the router forget what is silent."""
        self.deliver(self.router.sweep(time.monotonic()))

    async def serve_edge(self, websocket: WebSocket) -> None:
        """One edge connection from its handshake to its end."""
        limits = self.settings.limits
        # Every browser sends Origin and no edge worker does: a web page must not attach to a hub on its visitor's machine.
        if "origin" in websocket.headers or len(self._edges) >= limits.max_attachments + SPARE_CONNECTIONS:
            await websocket.close()
            return
        await websocket.accept()
        connection, link = next(self._connections), EdgeLink(limits.queue_frames, limits.queue_bytes)
        self._edges[connection] = link
        loop = asyncio.get_running_loop()
        deadline = loop.call_later(limits.attach_timeout_s, self._expect_attached, connection)
        reader = asyncio.create_task(self._read(websocket, connection, link))
        writer = asyncio.create_task(link.write(websocket))
        link.on_overflow = writer.cancel
        try:
            await asyncio.wait((reader, writer), return_when=asyncio.FIRST_COMPLETED)
        finally:
            deadline.cancel()
            del self._edges[connection]
            self.deliver(self.router.edge_lost(connection, time.monotonic()))
            await _close(websocket, link, reader, writer)

    async def _read(self, websocket: WebSocket, connection: int, link: EdgeLink) -> None:
        while True:
            message = await websocket.receive()
            if message["type"] == "websocket.disconnect":
                return
            if link.closing:
                continue
            try:
                self.deliver(self._edge_frame(connection, message))
            except RemoteProtocolError as error:
                self._refuse(connection, str(error))
            except Exception:
                logger.exception("a bug in the hub: an edge connection is lost")
                return

    def _edge_frame(self, connection: int, message: Any) -> list[Send]:
        frame = message.get("bytes")
        if frame is None:
            self.router.totals.malformed["edge"] += 1
            raise RemoteProtocolError("a text frame: messages are binary")
        return self.router.from_edge(connection, frame, time.monotonic())

    def _expect_attached(self, connection: int) -> None:
        if connection not in self.router.attachments:
            self._refuse(connection, f"no Attach within {self.settings.limits.attach_timeout_s:g} s")

    def _refuse(self, connection: int, reason: str) -> None:
        """Close an edge connection that broke the protocol."""
        self.router.totals.closed["protocol"] += 1
        attachment = self.router.attachments.get(connection)
        if attachment is None:  # anyone may connect: not worth a line each
            logger.debug("an edge connection is closed: %s", reason)
        else:
            logger.warning("edge worker '%s' broke the protocol and is closed: %s", attachment.attach.worker, reason)
        self._edges[connection].close(PROTOCOL_ERROR, reason)
        self.deliver(self.router.edge_lost(connection, time.monotonic()))

    def _engine_frame(self, identity: bytes, frame: bytes) -> None:
        sends = self.router.from_engine(identity, frame, time.monotonic())
        if identity in self.router.engines:
            self.engines.watch(identity)
        self.deliver(sends)

    def _engine_lost(self, identity: bytes) -> None:
        self.deliver(self.router.engine_lost(identity))

    def _to_edge(self, connection: int, frame: bytes | None) -> list[Send]:
        link = self._edges.get(connection)
        if link is None:
            self.router.totals.dropped["edge_gone"] += 1
        elif frame is None:
            link.close(NORMAL)
        elif not link.put(frame):
            self.router.totals.dropped["edge_too_slow"] += 1
            self.router.totals.closed["too_slow"] += 1
            attachment = self.router.attachments[connection]  # nothing else fills a queue
            logger.warning("edge worker '%s' does not read fast enough and is closed", attachment.attach.worker)
            return self.router.edge_lost(connection, time.monotonic())
        return []

    def _to_engine(self, identity: bytes, frame: bytes) -> list[Send]:
        outcome = self.engines.send(identity, frame)
        if outcome == "full":
            self.router.totals.dropped["engine_too_slow"] += 1
        elif outcome == "gone":
            self.router.totals.dropped["engine_gone"] += 1
            return self.router.engine_lost(identity)
        return []


async def _close(websocket: WebSocket, link: EdgeLink, *tasks: "asyncio.Task[None]") -> None:
    """Stop both tasks and say goodbye, for at most a second: the other end may read nothing."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    # Whatever a send to a connection that is gone raises (it depends on the server), there is nothing left to say.
    with contextlib.suppress(Exception):
        await asyncio.wait_for(websocket.close(link.close_code or NORMAL, link.close_reason), 1.0)


def build_app(hub: Hub) -> FastAPI:
    """The HTTP and WebSocket interface of a hub. Names of workers are personal: a hub with a key shows them to its holders."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        hub.start()
        yield
        hub.engines.stop()

    def authorized(request: Request) -> None:
        key, given = hub.settings.attach_key, request.headers.get("authorization", "")
        if key is None or keys.same(given, f"Bearer {key}"):
            return
        sentence = "the attach key is missing or wrong: send it as Authorization: Bearer <attach key>"
        raise HTTPException(401, sentence, {"WWW-Authenticate": "Bearer"})

    app = FastAPI(title="costeer hub", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    registry = build_registry(hub.router)
    app.add_api_websocket_route("/v1/attach", hub.serve_edge)

    @app.get("/healthz")
    async def healthz() -> dict[str, str | int | bool]:
        return {
            "status": "ok",
            "version": __version__,
            "protocol": PROTOCOL_VERSION,
            "engine_endpoint": hub.engines.endpoint,
            "curve": hub.settings.curve,
            "workers": len(hub.router.attachments),
            "engines": len(hub.router.engines),
            "streams": len(hub.router.streams),
        }

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/workers", dependencies=[Depends(authorized)], response_model=None)
    async def workers() -> dict[str, list[WorkerRow]]:
        return {"workers": hub.router.worker_rows(time.monotonic())}

    @app.get("/v1/streams", dependencies=[Depends(authorized)], response_model=None)
    async def streams(limit: Annotated[int, Query(ge=1, le=10_000)] = 100) -> dict[str, list[StreamRow]]:
        return {"streams": hub.router.stream_rows(limit)}

    @app.get("/v1/streams/{name}", dependencies=[Depends(authorized)], response_model=None)
    async def stream(name: str) -> dict[str, Any]:
        rows = hub.router.streams_of(name)
        if not rows:
            raise HTTPException(404, "no stream or request of this id is live or among the streams that finished recently")
        return {
            "id": name,
            "tokens_steered": sum(row["tokens_steered"] for row in rows),
            "tokens_missed": sum(row["tokens_missed"] for row in rows),
            "streams": rows,
        }

    return app


class _Server(uvicorn.Server):
    """uvicorn, with the ready line and an end that is no signal to whoever started it."""

    def __init__(self, config: uvicorn.Config, hub: Hub, address: str) -> None:
        super().__init__(config)
        self._hub = hub
        self._address = address
        self._parent = os.getppid()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn would raise the signal again at its end.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, self._stop)
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._housekeeping = asyncio.create_task(self._keep_house())
        logger.info("hub ready: edge workers at %s, engines at %s", self._address, self._hub.engines.endpoint)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._housekeeping.cancel()
        await super().shutdown(sockets)
        logger.info("hub stopped")

    def _stop(self) -> None:
        self.should_exit = True

    async def _keep_house(self) -> None:
        swept = time.monotonic()
        while True:
            await asyncio.sleep(TICK_S)
            if self._hub.settings.exit_with_parent and os.getppid() != self._parent:
                logger.info("the process that started this hub is gone")
                self._stop()
            if time.monotonic() - swept >= SWEEP_S:
                self._hub.sweep()
                swept = time.monotonic()


def run(settings: HubSettings) -> None:
    """Run a hub until SIGTERM, SIGINT or, if asked for, the end of the parent process. Blocks.

    Raises:
        SystemExit: with code 1 and a sentence on stderr if an address cannot be used.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    _allow_descriptors(settings.limits.max_attachments + settings.limits.max_engines + 2 * SPARE_CONNECTIONS)
    try:
        listener = _listen(settings)
        engines = EngineLink(settings.engine_endpoint, settings.attach_key if settings.curve else None)
    except HubUnavailable as error:
        print(f"costeer hub: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    try:
        _serve(settings, listener, engines)
    finally:
        listener.close()
        engines.close()


def _serve(settings: HubSettings, listener: socket.socket, engines: EngineLink) -> None:
    limits = settings.limits
    hub = Hub(settings, Router(limits, settings.attach_key), engines)
    config = uvicorn.Config(
        build_app(hub),
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        ws_max_size=MAX_FRAME_BYTES,
        ws_ping_interval=limits.heartbeat_s,
        ws_ping_timeout=2 * limits.heartbeat_s,
        ws_per_message_deflate=False,  # deltas do not compress, and it would cost time
        timeout_graceful_shutdown=2,
    )
    host, port = listener.getsockname()[:2]
    address = f"ws://[{host}]:{port}" if ":" in host else f"ws://{host}:{port}"
    _Server(config, hub, address).run([listener])


def _allow_descriptors(wanted: int) -> None:
    """Raise the limit of open files as far as this user may: each connection takes one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


def _listen(settings: HubSettings) -> socket.socket:
    """The listening socket; what is set here holds for every connection that it accepts."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(settings.host, settings.port, 0, socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise HubUnavailable(f"host {settings.host} cannot be used: {error.strerror}") from None
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, TCP_TIMEOUT_MS)
    try:
        listener.bind(address)
        listener.listen()  # already here: else a second hub could bind too, and fail later
    except OSError as error:
        listener.close()
        raise HubUnavailable(
            f"port {settings.port} on {settings.host} cannot be used ({error.strerror}): "
            "stop what uses it, or choose another port with COSTEER_HUB_PORT"
        ) from None
    return listener
