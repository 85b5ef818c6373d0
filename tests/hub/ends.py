"""What the hub's tests hold in their hands: a hub in a process of its own, and the two ends that talk to it."""

import contextlib
import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import zmq
from websockets.sync.client import ClientConnection, connect

from costeer_vllm.protocol import keys
from costeer_vllm.protocol.messages import (
    PROTOCOL_VERSION,
    Admit,
    Advance,
    Attach,
    Attached,
    Begin,
    Candidates,
    Choice,
    Delta,
    End,
    Join,
    Joined,
    Message,
    Query,
    Sampling,
    Vocabulary,
    decode_hub_to_edge,
    decode_hub_to_engine,
    encode,
)

DEADLINE_S = 20.0
VOCABULARY = Vocabulary("ab" * 32, 1000)
OTHER_VOCABULARY = Vocabulary("cd" * 32, 1000)
T = TypeVar("T")

_READY = re.compile(r"edge workers at ws://(\S+), engines at (\S+)")
_RUN = "import sys; from costeer_vllm.hub.app import *; from costeer_vllm.hub.router import Limits; run(eval(sys.argv[1]))"


def attach(worker: str = "alice", instance: str = "1", **fields: Any) -> Attach:
    given = {"version": PROTOCOL_VERSION, "vocabulary": VOCABULARY} | fields
    return Attach(worker=worker, instance=instance, model="tiny", **given)


def admit(ticket: int = 1, **fields: Any) -> Admit:
    given = {"version": PROTOCOL_VERSION, "vocabulary": VOCABULARY} | fields
    return Admit(ticket=ticket, **given)


def begin(stream: str = "s", worker: str = "alice", request: str = "r", **fields: Any) -> Begin:
    return Begin(stream, request, worker, Query(prompt="hello"), 1.0, **fields)


def advance(stream: str = "s", position: int = 1) -> Advance:
    return Advance(stream, position, position * 7, [position])


def delta(stream: str = "s", position: int = 0, payload: bytes = b"payload") -> Delta:
    return Delta(stream, position, position * 7, payload)


def edge_begin(stream: str = "s", worker: str = "alice", **fields: Any) -> Begin:
    return begin(stream, worker, sampling=Sampling(temperature=0.0), **fields)


def candidates(stream: str = "s", position: int = 0, payload: bytes = b"likeliest") -> Candidates:
    return Candidates(stream, position, position * 7, payload)


def choice(stream: str = "s", position: int = 0, token: int = 5) -> Choice:
    return Choice(stream, position, position * 7, token)


def eventually(look: Callable[[], T], what: str = "this") -> T:
    """The first true answer of ``look``; fails after DEADLINE_S seconds."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        if answer := look():
            return answer
        assert time.monotonic() < deadline, f"{what} did not happen within {DEADLINE_S:g} s"
        time.sleep(0.01)


class RunningHub:
    """A hub started as ``run(HubSettings(...))`` in a child process, on free ports."""

    def __init__(self, log: Path, settings: str) -> None:
        self.log = log
        with log.open("wb") as sink:
            code = f"HubSettings({settings})"
            self.process = subprocess.Popen([sys.executable, "-c", _RUN, code], stdout=sink, stderr=sink)
        self.address, self.engine_endpoint = eventually(self._ready, "the ready line")

    def _ready(self) -> tuple[str, str] | None:
        found = _READY.search(self.log.read_text())
        assert found or self.process.poll() is None, self.log.read_text()
        return (found[1], found[2]) if found else None

    def get(self, path: str, key: str | None = None) -> tuple[int, str]:
        """Status and body of an HTTP GET."""
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        request = urllib.request.Request(f"http://{self.address}{path}", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def json(self, path: str, key: str | None = None) -> Any:
        return json.loads(self.get(path, key)[1])

    def counts(self) -> tuple[int, int, int]:
        """Workers, engines and streams."""
        health = self.json("/healthz")
        return health["workers"], health["engines"], health["streams"]

    def rss_bytes(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024

    def stop(self) -> int:
        """Ask the hub to end. Its exit code."""
        self.process.terminate()
        try:
            return self.process.wait(DEADLINE_S)
        finally:
            self.process.kill()


@contextlib.contextmanager
def running_hub(directory: Path, settings: str = "") -> Iterator[RunningHub]:
    defaults = "port=0, engine_endpoint='tcp://127.0.0.1:*', "
    if "engine_endpoint" in settings:
        defaults = "port=0, "
    hub = RunningHub(directory / "hub.log", defaults + settings)
    try:
        yield hub
    finally:
        hub.stop()


class Edge:
    """An edge worker's end of a real WebSocket."""

    def __init__(self, websocket: ClientConnection) -> None:
        self.websocket = websocket

    def send(self, message: Message) -> bytes:
        frame = encode(message)
        self.websocket.send(frame)
        return frame

    def receive(self) -> Any:
        return decode_hub_to_edge(self.receive_frame())

    def receive_frame(self) -> bytes:
        return self.websocket.recv(DEADLINE_S, decode=False)

    def attach(self, worker: str = "alice", **fields: Any) -> "Edge":
        self.send(attach(worker, **fields))
        assert isinstance(self.receive(), Attached)
        return self


@contextlib.contextmanager
def edge(hub: RunningHub, **options: Any) -> Iterator[Edge]:
    with connect(f"ws://{hub.address}/v1/attach", compression=None, max_size=None, close_timeout=2, **options) as websocket:
        yield Edge(websocket)


class Engine:
    """An engine's end of a real ZeroMQ link."""

    def __init__(self, socket: "zmq.Socket[bytes]") -> None:
        self.socket = socket

    def send(self, message: Message) -> bytes:
        frame = encode(message)
        self.socket.send(frame)
        return frame

    def receive(self) -> Any:
        return decode_hub_to_engine(self.receive_frame())

    def receive_frame(self) -> bytes:
        assert self.socket.poll(DEADLINE_S * 1000), "nothing came"
        return self.socket.recv()

    def join(self) -> "Engine":
        self.send(Join(PROTOCOL_VERSION))
        assert isinstance(self.receive(), Joined)
        return self


@contextlib.contextmanager
def engine(hub: RunningHub, key: str | None = None, identity: bytes | None = None, linger_ms: int = 0) -> Iterator[Engine]:
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, linger_ms)
        if identity is not None:
            socket.setsockopt(zmq.ROUTING_ID, identity)
        if key is not None:
            socket.curve_serverkey = keys.curve_keypair(key)[0]
            socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
        socket.connect(hub.engine_endpoint)
        yield Engine(socket)


def steer(edge_end: Edge, engine_end: Engine, stream: str = "s", positions: int = 3, **fields: Any) -> None:
    """One whole stream, every frame checked to be the one that was sent."""
    sent = engine_end.send(begin(stream, **fields))
    for position in range(positions):
        assert edge_end.receive_frame() == sent
        answer = edge_end.send(delta(stream, position, bytes([position]) * 100))
        assert engine_end.receive_frame() == answer
        sent = engine_end.send(advance(stream, position + 1))
    assert edge_end.receive_frame() == sent
    sent = engine_end.send(End(stream, "finished", tokens_steered=positions, tokens_missed=1))
    assert edge_end.receive_frame() == sent
