"""A relay between edge workers and a hub that loses, delays, repeats and reorders whole frames, stands still, and is cut.

What happens to a frame is a function of its message: the delays, in seconds, after which its copies are passed on. None: it is
lost; two: it is repeated; a shorter one than the frame's before: it overtakes. A relay that stands still takes everything and
passes nothing on until it moves again, as a network does whose connections are half-open: pings are still answered.
"""

import asyncio
import contextlib
import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from typing import Any, TypeAlias

from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from costeer_vllm.processes import free_port
from costeer_vllm.protocol.messages import (
    MAX_FRAME_BYTES,
    Attach,
    Attached,
    Choice,
    Delta,
    EdgeToHub,
    HubToEdge,
    decode_edge_to_hub,
    decode_hub_to_edge,
)

from .rogue import in_a_thread

Fault: TypeAlias = Callable[[Any], Collection[float]]  # a message -> after how many seconds each copy is passed on
Socket: TypeAlias = ServerConnection | ClientConnection
PASSED = (0.0,)


class Relay:
    """Where an edge worker finds the hub. All methods may be called from any thread."""

    def __init__(self, hub: str) -> None:
        self.hub = hub
        self.address = f"127.0.0.1:{free_port()}"
        self.up: Fault = lambda message: PASSED  # edge worker -> hub
        self.down: Fault = lambda message: PASSED  # hub -> edge worker
        self.stands_still = threading.Event()  # as stand_still_at had asked for
        self._loop: asyncio.AbstractEventLoop
        self._moves: asyncio.Event
        self._open: set[Socket] = set()
        self._seen: defaultdict[str, set[str]] = defaultdict(set)  # streams by the type of the messages that reached the relay
        self._news = threading.Condition()  # with a reentrant lock

    def stand_still_at(self, position: int) -> None:
        """Pass nothing on once an edge worker has answered for this position of any stream, that answer included."""

        def fault(message: Any) -> Collection[float]:
            if isinstance(message, (Delta, Choice)) and message.position >= position:
                self._moves.clear()
                self.stands_still.set()
            return PASSED

        self.stands_still.clear()
        self.up = fault

    def stand_still(self) -> None:
        """Pass nothing on from now on."""
        self._loop.call_soon_threadsafe(self._moves.clear)

    def move(self) -> None:
        """Pass on what came in the meantime, over connections that are not cut, and all that follows."""
        self._loop.call_soon_threadsafe(self._moves.set)

    def cut(self) -> None:
        """Break all connections, and lose what was under way; new ones may be made."""
        for socket in list(self._open):
            self._loop.call_soon_threadsafe(socket.transport.abort)

    def restore(self) -> None:
        """No fault from now on."""
        self.up = self.down = lambda message: PASSED
        self.move()

    def streams(self, kind: type) -> set[str]:
        """The streams of which a message of that type has come so far."""
        with self._news:
            return set(self._seen[kind.__name__])

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
        """Wait for a condition that depends on ``streams``."""
        with self._news:
            assert self._news.wait_for(condition, timeout_s), dict(self._seen)

    async def serve(self, stop: asyncio.Event, ready: threading.Event) -> None:
        """Until ``stop``."""
        self._loop, self._moves = asyncio.get_running_loop(), asyncio.Event()
        self._moves.set()
        port = int(self.address.rpartition(":")[2])
        async with serve(self._serve_edge, "127.0.0.1", port, compression=None, max_size=MAX_FRAME_BYTES, close_timeout=0.1):
            ready.set()
            await stop.wait()
            self._moves.set()

    async def _serve_edge(self, edge: ServerConnection) -> None:
        upstream = connect(f"ws://{self.hub}/v1/attach", compression=None, max_size=MAX_FRAME_BYTES, close_timeout=0.1)
        with contextlib.suppress(OSError, ConnectionClosed):  # the hub is not there: the edge worker is told by the end
            async with upstream as hub:
                self._open |= {edge, hub}
                ways = (self._pass_on(edge, hub, self._from_edge), self._pass_on(hub, edge, self._from_hub))
                tasks = [asyncio.create_task(way) for way in ways]
                try:
                    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    self._open -= {edge, hub}
                    for task in tasks:
                        task.cancel()

    async def _pass_on(self, source: Socket, target: Socket, judge: Callable[[bytes], Collection[float]]) -> None:
        due: asyncio.Queue[bytes] = asyncio.Queue()
        sender = asyncio.create_task(self._send(due, target))
        try:
            with contextlib.suppress(ConnectionClosed):
                async for frame in source:
                    assert isinstance(frame, bytes)
                    for delay_s in judge(frame):
                        if delay_s:
                            self._loop.call_later(delay_s, due.put_nowait, frame)
                        else:
                            due.put_nowait(frame)
        finally:
            sender.cancel()

    async def _send(self, due: "asyncio.Queue[bytes]", target: Socket) -> None:
        with contextlib.suppress(ConnectionClosed):
            while True:
                frame = await due.get()
                await self._moves.wait()
                await target.send(frame)

    def _from_edge(self, frame: bytes) -> Collection[float]:
        message = decode_edge_to_hub(frame)
        self._note(message)
        return PASSED if isinstance(message, Attach) else self.up(message)

    def _from_hub(self, frame: bytes) -> Collection[float]:
        message = decode_hub_to_edge(frame)
        self._note(message)
        return PASSED if isinstance(message, Attached) else self.down(message)

    def _note(self, message: EdgeToHub | HubToEdge) -> None:
        if (stream := getattr(message, "stream", None)) is not None:
            with self._news:
                self._seen[type(message).__name__].add(stream)
                self._news.notify_all()


@contextlib.contextmanager
def relay_to(hub: str) -> Iterator[Relay]:
    """A relay before the hub at ``host:port``."""
    relay, ready = Relay(hub), threading.Event()
    with in_a_thread(lambda stop: relay.serve(stop, ready)):
        assert ready.wait(10)
        yield relay


# --- faults ---


def delayed(seconds: float) -> Fault:
    """Every frame comes later, in its order."""
    return lambda message: (seconds,)


def at(positions: Collection[int], kinds: type | tuple[type, ...], delays: Collection[float]) -> Fault:
    """Of every stream, the first message of each of these types for each of these positions is passed on after these delays."""
    struck: set[tuple[type, str, int]] = set()

    def fault(message: Any) -> Collection[float]:
        if not isinstance(message, kinds) or message.position not in positions:
            return PASSED
        name = (type(message), message.stream, message.position)
        if name in struck:
            return PASSED
        struck.add(name)
        return delays

    return fault
