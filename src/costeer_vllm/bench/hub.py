"""The hub alone: a real hub on one core, and on another one all that talks to it, which does nothing but talk.

    python -m costeer_vllm.bench.hub                         1,000 edge workers, 2,000 deltas per second
    python -m costeer_vllm.bench.hub --edges 100 --rate 500  fewer
    python -m costeer_vllm.bench.hub --json FILE             and every window as JSON

One engine's end asks by ``Advance`` over ZeroMQ, at random times (a Poisson process, the same at every run), one stream of every
edge worker in its turn. The edge workers' ends, raw WebSockets (RFC 6455) on asyncio protocols, answer at once with a ``Delta``.
All of these live in one thread. Latency is the time from the engine's send until it has the delta: two ways through the hub, four
socket hops, and what the work of that thread keeps waiting: it shows in the processes' shares of their cores and in how
late the engine's end asked, which stand beside it.
"""

import argparse
import asyncio
import base64
import contextlib
import json
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import zmq

from costeer_vllm.bench.machine import pin
from costeer_vllm.errors import CoSteerError
from costeer_vllm.processes import Running, free_port, running, wait_until
from costeer_vllm.protocol.messages import (
    PROTOCOL_VERSION,
    Advance,
    Attach,
    Attached,
    Begin,
    Delta,
    End,
    Join,
    Joined,
    Query,
    Vocabulary,
    decode_hub_to_edge,
    decode_hub_to_engine,
    encode,
)

PAYLOAD = bytes(400)  # of one delta
VOCABULARY = Vocabulary("ab" * 32, 152_064)
CONNECTING = 64  # edge workers at a time
ATTACH_TIMEOUT_S = 60.0
DRAIN_S = 5.0  # after a window: what has not come by then is lost
BINARY, CLOSE, PING, PONG = 2, 8, 9, 10  # opcodes of RFC 6455


class Broken(CoSteerError):
    """The hub refused or closed something that it must not: there is nothing to measure."""


@dataclass(frozen=True, slots=True)
class Window:
    """What one window of load measured."""

    asked: int
    lost: int  # never answered
    rate: float  # answers per second of the window
    p50_ms: float  # engine -> hub -> edge worker -> hub -> engine
    p99_ms: float
    max_ms: float
    late_p99_ms: float  # how late the engine's end asked: the load's own lag
    hub_share: float  # of its core
    load_share: float  # of its core


class LightEdge(asyncio.Protocol):
    """An edge worker's end that answers at once."""

    def __init__(self, worker: str, address: str, lost: Callable[[str], None]) -> None:
        loop = asyncio.get_running_loop()
        self.worker = worker
        self.attached: asyncio.Future[None] = loop.create_future()
        self._address, self._lost = address, lost
        self._buffer = bytearray()
        self._upgraded = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        key = base64.b64encode(os.urandom(16)).decode()
        lines = ["GET /v1/attach HTTP/1.1", f"Host: {self._address}", "Upgrade: websocket", "Connection: Upgrade"]
        lines += [f"Sec-WebSocket-Key: {key}", "Sec-WebSocket-Version: 13", "", ""]
        transport.write("\r\n".join(lines).encode())

    def connection_lost(self, error: Exception | None) -> None:
        if not self.attached.done():
            self.attached.set_exception(Broken(f"the hub closed the connection of {self.worker}"))
        self._lost(self.worker)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self._upgraded and not self._upgrade():
            return
        while (frame := self._next()) is not None:
            self._heard(*frame)

    def close(self) -> None:
        """Without a word: the hub must be able to bear that."""
        self._transport.abort()

    def _upgrade(self) -> bool:
        head, found, rest = bytes(self._buffer).partition(b"\r\n\r\n")
        if not found:
            return False
        if not head.startswith(b"HTTP/1.1 101"):
            raise Broken(f"the hub does not take a WebSocket: {head.splitlines()[0].decode()}")
        self._buffer = bytearray(rest)
        self._upgraded = True
        self._send(encode(Attach(PROTOCOL_VERSION, self.worker, self.worker, "none", VOCABULARY)))
        return True

    def _next(self) -> tuple[int, bytes] | None:
        """Opcode and payload of one whole frame of the hub, which masks none and splits none."""
        buffer = self._buffer
        if len(buffer) < 2:
            return None
        length, begin = buffer[1], 2
        if length == 126:
            length, begin = int.from_bytes(buffer[2:4], "big"), 4
        elif length == 127:
            length, begin = int.from_bytes(buffer[2:10], "big"), 10
        if len(buffer) < begin + length:
            return None
        opcode, payload = buffer[0] & 15, bytes(buffer[begin : begin + length])
        del buffer[: begin + length]
        return opcode, payload

    def _heard(self, opcode: int, payload: bytes) -> None:
        if opcode == PING:
            self._send(payload, PONG)
        elif opcode == BINARY:
            match decode_hub_to_edge(payload):
                case Advance(stream, position, prefix_hash):
                    self._send(encode(Delta(stream, position, prefix_hash, PAYLOAD)))
                case Begin(stream):
                    self._send(encode(Delta(stream, 0, 0, PAYLOAD)))
                case Attached():
                    self.attached.set_result(None)

    def _send(self, payload: bytes, opcode: int = BINARY) -> None:
        """One frame; the mask that a client must use is all zeros, which costs the hub what any other does."""
        size = len(payload)
        length = bytes([128 + size]) if size < 126 else b"\xfe" + size.to_bytes(2, "big")
        self._transport.write(bytes([128 + opcode]) + length + bytes(4) + payload)


class EngineEnd:
    """An engine's end that asks and takes the time; read from the event loop as the hub reads its own."""

    def __init__(self, endpoint: str) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.connect(endpoint)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket.FD, self._read)
        self.joined: asyncio.Future[None] = self._loop.create_future()
        self.asked_at: dict[tuple[str, int], float] = {}  # not answered yet
        self.latencies: list[float] = []  # seconds
        self.ended: str | None = None  # a stream that the hub ended

    def close(self) -> None:
        self._loop.remove_reader(self._socket.FD)
        self._context.destroy(linger=0)

    def send(self, message: Join | Begin | Advance | End) -> None:
        """Never waits; ZeroMQ would rather drop than raise only where it has no peer, and it has one."""
        if isinstance(message, (Begin, Advance)):
            position = message.position if isinstance(message, Advance) else 0
            self.asked_at[message.stream, position] = time.perf_counter()
        self._socket.send(encode(message), zmq.NOBLOCK)
        if int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN:  # the descriptor is edge-triggered: a send may swallow the edge
            self._loop.call_soon(self._read)

    def _read(self) -> None:
        with contextlib.suppress(zmq.Again):
            while True:
                self._heard(self._socket.recv(zmq.NOBLOCK))

    def _heard(self, frame: bytes) -> None:
        match decode_hub_to_engine(frame):
            case Delta(stream, position):
                if (asked := self.asked_at.pop((stream, position), None)) is not None:
                    self.latencies.append(time.perf_counter() - asked)
            case End(stream, reason):
                self.ended = f"{stream}: {reason}"
            case Joined():
                self.joined.set_result(None)


class Load:
    """All edge workers' ends and the engine's, connected; to be used inside one event loop."""

    def __init__(self, address: str, endpoint: str) -> None:
        self._address = address
        self._engine = EngineEnd(endpoint)
        self._edges: list[LightEdge] = []
        self._positions: dict[str, int] = {}
        self._rng = random.Random("arrivals")
        self._gone: set[str] = set()

    async def connect(self, num_edges: int) -> None:
        """Attach all, join, and begin a stream at each.

        Raises:
            Broken, TimeoutError: if the hub does not take them.
        """
        self._engine.send(Join(PROTOCOL_VERSION))
        await asyncio.wait_for(self._engine.joined, ATTACH_TIMEOUT_S)
        for begin in range(0, num_edges, CONNECTING):
            some = [self._connect(f"edge-{i}") for i in range(begin, min(num_edges, begin + CONNECTING))]
            await asyncio.wait_for(asyncio.gather(*some), ATTACH_TIMEOUT_S)
        for edge in self._edges:
            self._engine.send(Begin(edge.worker, edge.worker, edge.worker, Query(prompt="a prompt"), 1.0))
            self._positions[edge.worker] = 0
        await self._drain()

    async def _connect(self, worker: str) -> None:
        host, _, port = self._address.rpartition(":")
        loop = asyncio.get_running_loop()
        _, edge = await loop.create_connection(lambda: LightEdge(worker, self._address, self._gone.add), host, int(port))
        await edge.attached
        self._edges.append(edge)

    async def window(self, rate: float, seconds: float, hub: int) -> Window:
        """Ask ``rate`` times a second for ``seconds``; ``hub``: its process id."""
        engine = self._engine
        engine.latencies.clear()
        late: list[float] = []
        used, own, start = cpu_s(hub), time.process_time(), time.perf_counter()
        due, asked, workers = start, 0, list(self._positions)
        while due < start + seconds:
            if (early := due - time.perf_counter()) > 0:
                await asyncio.sleep(early)
            late.append(time.perf_counter() - due)
            self._ask(workers[asked % len(workers)])
            asked += 1
            due += self._rng.expovariate(rate)
        elapsed = time.perf_counter() - start
        shares = (cpu_s(hub) - used) / elapsed, (time.process_time() - own) / elapsed
        answered = len(engine.latencies)
        lost = await self._drain()
        if self._gone or engine.ended:
            raise Broken(f"the hub gave up what it should have kept: {sorted(self._gone)[:3] or engine.ended}")
        ordered = sorted(engine.latencies)
        p50, p99, worst = (1000 * _quantile(ordered, share) for share in (0.5, 0.99, 1.0))
        return Window(asked, lost, answered / elapsed, p50, p99, worst, 1000 * _quantile(sorted(late), 0.99), *shares)

    def close(self) -> None:
        for edge in self._edges:
            edge.close()
        self._engine.close()

    def _ask(self, worker: str) -> None:
        self._positions[worker] += 1
        position = self._positions[worker]
        self._engine.send(Advance(worker, position, 2**63 + position, [position]))

    async def _drain(self) -> int:
        """Wait for what is on its way; the number of answers that did not come."""
        deadline = time.perf_counter() + DRAIN_S
        while self._engine.asked_at and time.perf_counter() < deadline:
            await asyncio.sleep(0.01)
        lost = len(self._engine.asked_at)
        self._engine.asked_at.clear()
        return lost


def measure(edges: int, rate: float, seconds: float, repetitions: int, each: Callable[[Window], None]) -> dict[str, int]:
    """Start a hub, load it in ``repetitions`` windows and tell each; frames that the hub dropped by reason, from its own metrics.

    Raises:
        CoSteerError: if the hub does not start or does not hold.
    """
    _allow_descriptors(2 * edges + 256)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="costeer-hub-") as folder, contextlib.ExitStack() as stack:
        endpoint = f"tcp://127.0.0.1:{free_port()}"
        command = [sys.executable, "-m", "costeer_vllm.cli", "hub", "--port", str(port), "--engine-endpoint", endpoint]
        hub = stack.enter_context(running(command, Path(folder) / "hub.log", {}))
        wait_until(lambda: "hub ready" in hub.log_text, hub, ATTACH_TIMEOUT_S)
        if len(cores) > 1:
            pin(hub.process.pid, cores[0])
            os.sched_setaffinity(0, {cores[-1]})
            stack.callback(os.sched_setaffinity, 0, set(cores))
        return asyncio.run(_windows(hub, f"127.0.0.1:{port}", endpoint, edges, rate, seconds, repetitions, each))


async def _windows(
    hub: Running,
    address: str,
    endpoint: str,
    edges: int,
    rate: float,
    seconds: float,
    repetitions: int,
    each: Callable[[Window], None],
) -> dict[str, int]:
    load = Load(address, endpoint)
    try:
        await load.connect(edges)
        await load.window(rate, min(1.0, seconds), hub.process.pid)  # warm
        for _ in range(repetitions):
            each(await load.window(rate, seconds, hub.process.pid))
        return _dropped(f"http://{address}/metrics")  # as long as all are there: frames to those who leave are no loss
    finally:
        load.close()


def cpu_s(pid: int) -> float:
    """Seconds of processor time that a process has used; 0 where the system does not say."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def _dropped(url: str) -> dict[str, int]:
    lines = httpx.get(url, trust_env=False).raise_for_status().text.splitlines()
    name = "costeer_hub_dropped_frames_total{"
    found = [line.removeprefix(name).rpartition("} ") for line in lines if line.startswith(name)]
    return {labels.partition('"')[2].rstrip('"'): int(float(value)) for labels, _, value in found}


def _quantile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def _allow_descriptors(wanted: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def main(arguments: list[str] | None = None) -> None:
    """Print a line per window."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edges", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=2000.0, help="deltas asked for per second")
    parser.add_argument("--seconds", type=float, default=5.0, help="of a window")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    windows: list[dict[str, Any]] = []

    def each(window: Window) -> None:
        windows.append(asdict(window))
        print("  ".join(f"{name} {value:.3g}" for name, value in windows[-1].items()), flush=True)

    try:
        dropped = measure(options.edges, options.rate, options.seconds, options.repetitions, each)
    except CoSteerError as error:
        sys.exit(f"hub benchmark: {error}")
    print(f"frames that the hub dropped: {dropped or 'none'}")
    if options.json:
        options.json.write_text(json.dumps({"windows": windows, "dropped": dropped}, indent=2) + "\n")


if __name__ == "__main__":
    main()
