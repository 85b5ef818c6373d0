"""The two kinds of link: a WebSocket per edge worker with a bounded queue, and one ZeroMQ ROUTER for all engines."""

import asyncio
import contextlib
import errno
import logging
import os
import socket
from collections import deque
from collections.abc import Callable
from typing import Literal

import zmq
from starlette.websockets import WebSocket
from zmq.utils.monitor import recv_monitor_message

from costeer_vllm.errors import HubUnavailable
from costeer_vllm.protocol import keys
from costeer_vllm.protocol.messages import MAX_FRAME_BYTES

# WebSocket close codes, RFC 6455 and its registry
NORMAL, PROTOCOL_ERROR, TRY_AGAIN_LATER = 1000, 1008, 1013

logger = logging.getLogger("costeer.hub")

HIGH_WATER_MARK = 4096  # frames queued per engine and direction
FRAMES_PER_TURN = 256  # read from engines before other sockets get their turn


class EdgeLink:
    """The outgoing half of one edge connection: a bounded queue and the one task that empties it."""

    __slots__ = ("_bytes", "_frames", "_max_bytes", "_max_frames", "_wake", "close_code", "close_reason", "on_overflow")

    def __init__(self, max_frames: int, max_bytes: int) -> None:
        self._max_frames = max_frames
        self._max_bytes = max_bytes
        self._frames: deque[bytes] = deque()
        self._bytes = 0
        self._wake = asyncio.Event()
        self.close_code: int | None = None
        self.close_reason = ""
        self.on_overflow: Callable[[], object] = lambda: None  # stops the task that may be stuck in a send

    @property
    def closing(self) -> bool:
        """Whether nothing more is accepted or heard."""
        return self.close_code is not None

    def put(self, frame: bytes) -> bool:
        """Queue a frame. False if there is no room: the other end is too slow, and the link is closed at once."""
        if self.closing:
            return True
        if len(self._frames) >= self._max_frames or self._bytes + len(frame) > self._max_bytes:
            self._frames.clear()
            self.close(TRY_AGAIN_LATER, "too slow")
            self.on_overflow()
            return False
        self._frames.append(frame)
        self._bytes += len(frame)
        self._wake.set()
        return True

    def close(self, code: int, reason: str = "") -> None:
        """Close with a WebSocket code once the queue is empty; only the first call counts."""
        if not self.closing:
            self.close_code, self.close_reason = code, reason
            self._wake.set()

    async def write(self, websocket: WebSocket) -> None:
        """Send what is queued until ``close``."""
        while True:
            while self._frames:
                frame = self._frames.popleft()
                await websocket.send({"type": "websocket.send", "bytes": frame})
                self._bytes -= len(frame)
            if self.closing:
                return
            self._wake.clear()
            await self._wake.wait()


class EngineLink:
    """The ROUTER socket for engines and front ends, read from the event loop without a task.

    ZeroMQ does not say which peer disconnected, but it says on which file descriptor, and it knows the descriptor of a received
    frame: from ``watch(identity)`` on the end of a peer's connection is reported, once, after the last frame that it sent.
    """

    def __init__(self, endpoint: str, attach_key: str | None = None) -> None:
        """Bind.

        Raises:
            HubUnavailable: if the endpoint is in use or cannot be bound.
        """
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = _router_socket(self._context, attach_key)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
        try:
            _bind(self._socket, endpoint)
        except (OSError, zmq.ZMQError) as error:
            self.close(linger_ms=0)
            raise HubUnavailable(f"the engine endpoint {endpoint} cannot be used: {error.strerror}") from None
        self.endpoint = self._socket.get_string(zmq.LAST_ENDPOINT)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._scheduled = False
        self._alive: set[int] = set()  # file descriptors
        self._identity_of: dict[int, bytes] = {}  # who is watched, by descriptor
        self._descriptor_of: dict[bytes, int] = {}
        self._lost: set[bytes] = set()  # to be reported
        self._descriptor = -1  # of the frame that is being handled

    def start(self, on_frame: Callable[[bytes, bytes], None], on_lost: Callable[[bytes], None]) -> None:
        """From now on call ``on_frame(identity, frame)`` and ``on_lost(identity)`` from the running loop."""
        self._on_frame, self._on_lost = on_frame, on_lost
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket.FD, self._read)
        self._loop.add_reader(self._monitor.FD, self._read)
        self._schedule()

    def stop(self) -> None:
        """Hear nothing more; ``send`` still works."""
        if self._loop is not None:
            self._loop.remove_reader(self._socket.FD)
            self._loop.remove_reader(self._monitor.FD)
            self._loop = None

    def close(self, linger_ms: int = 200) -> None:
        """Send what is queued for at most ``linger_ms``, then free everything."""
        self._socket.disable_monitor()
        self._context.destroy(linger=linger_ms)

    def send(self, identity: bytes, frame: bytes) -> Literal["sent", "full", "gone"]:
        """Send without waiting: ``full`` if the peer does not read, ``gone`` if it is not connected."""
        try:
            self._socket.send_multipart((identity, frame), zmq.NOBLOCK)
        except zmq.Again:
            return "full"
        except zmq.ZMQError:
            return "gone"
        finally:
            # The socket's descriptor is edge-triggered and a send may have swallowed the edge.
            if not self._scheduled and int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN:
                self._schedule()
        return "sent"

    def watch(self, identity: bytes) -> None:
        """Report the end of ``identity``'s connection; to be called from ``on_frame``."""
        if self._descriptor_of.get(identity) == self._descriptor or identity in self._lost:
            return
        self._note_events()
        if self._descriptor in self._alive:
            self._identity_of[self._descriptor] = identity
            self._descriptor_of[identity] = self._descriptor
        else:
            self._lost.add(identity)

    def _schedule(self) -> None:
        if self._loop is not None:
            self._scheduled = True
            self._loop.call_soon(self._read)

    def _read(self) -> None:
        self._scheduled = False
        if self._loop is None:
            return
        self._note_events()
        for _ in range(FRAMES_PER_TURN):
            try:
                identity, *parts = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                for lost in list(self._lost):  # all is read: what they sent last, their counts above all, was heard
                    self._report(lost)
                return
            try:
                self._handle(identity.bytes, parts)
            except Exception:  # an edge-triggered socket must be read on, whatever one frame did
                logger.exception("a bug in the hub: a frame of an engine is lost")
        self._schedule()

    def _handle(self, identity: bytes, parts: list[zmq.Frame]) -> None:
        self._descriptor = int(parts[-1].get("__fd")) if parts else -1
        known = self._descriptor_of.get(identity, self._descriptor)
        if known != self._descriptor or (identity in self._lost and self._descriptor in self._alive):
            self._report(identity)  # this frame came on a new connection
        # A message of several frames is none of ours; an empty one is malformed to whoever decodes it.
        self._on_frame(identity, parts[0].bytes if len(parts) == 1 else b"")

    def _note_events(self) -> None:
        with contextlib.suppress(zmq.Again):
            while True:
                event = recv_monitor_message(self._monitor, zmq.NOBLOCK)
                if event["event"] == zmq.EVENT_ACCEPTED:
                    self._alive.add(event["value"])
                else:
                    self._note_disconnect(event["value"])

    def _note_disconnect(self, descriptor: int) -> None:
        self._alive.discard(descriptor)
        identity = self._identity_of.pop(descriptor, None)
        if identity is not None:
            del self._descriptor_of[identity]
            self._lost.add(identity)

    def _report(self, identity: bytes) -> None:
        self._lost.discard(identity)
        self._identity_of.pop(self._descriptor_of.pop(identity, -1), None)
        self._on_lost(identity)


def _router_socket(context: "zmq.Context[zmq.Socket[bytes]]", attach_key: str | None) -> "zmq.Socket[bytes]":
    router = context.socket(zmq.ROUTER)
    router.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a send to a peer that is gone says so
    router.setsockopt(zmq.ROUTER_HANDOVER, 1)  # an engine that starts again takes its identity over
    router.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
    router.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
    router.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
    router.setsockopt(zmq.HEARTBEAT_IVL, 10_000)  # ms
    router.setsockopt(zmq.HEARTBEAT_TIMEOUT, 30_000)
    router.setsockopt(zmq.LINGER, 200)
    if attach_key is not None:
        router.curve_server = True
        router.curve_secretkey = keys.curve_keypair(attach_key)[1]
    return router


def _bind(router: "zmq.Socket[bytes]", endpoint: str) -> None:
    if "[" in endpoint:
        router.setsockopt(zmq.IPV6, 1)
    if not endpoint.startswith("ipc://"):
        router.bind(endpoint)
        return
    _refuse_live_socket(endpoint.removeprefix("ipc://"))
    mask = os.umask(0o077)  # only this user may connect
    try:
        router.bind(endpoint)
    finally:
        os.umask(mask)


def _refuse_live_socket(path: str) -> None:
    """ZeroMQ takes over the path of a local socket even if somebody still listens there."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except OSError:
            return
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
