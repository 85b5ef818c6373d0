"""10,000 hostile frames at a real hub over real links, while one honest pair works through it and loses nothing."""

import asyncio
import contextlib
import os
import random
import threading
from collections.abc import Iterator

import msgspec
import pytest
from ends import (
    DEADLINE_S,
    Edge,
    Engine,
    RunningHub,
    admit,
    advance,
    attach,
    begin,
    candidates,
    choice,
    delta,
    edge,
    edge_begin,
    engine,
    eventually,
)
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from costeer_vllm.protocol import keys
from costeer_vllm.protocol.messages import (
    Admitted,
    Advance,
    Begin,
    Delta,
    End,
    Join,
    decode_hub_to_edge,
    decode_hub_to_engine,
    encode,
)

SEED = int(os.environ.get("COSTEER_FUZZ_SEED", "20260101"))
NUM_EDGE_FRAMES = 4000
NUM_ENGINE_FRAMES = 6000
NUM_WARM_UP = 500  # of each, before memory is measured
MAX_GROWTH_BYTES = 20 * 10**6
FRAMES_PER_ENGINE = 100  # before it reconnects
EDGES_AT_ONCE = 8

# Aimed at the honest pair wherever that is possible: its stream, its worker's name, another instance.
MESSAGES = [
    attach("honest", instance="another"),
    attach("fuzz", instance="fuzz", key_digest=keys.key_digest("k")),
    attach("fuzz", version=2),
    delta("honest-stream", 3),
    delta("fuzz-stream", 0, b"x" * 1000),
    attach("fuzz", instance="fuzz", fusions=("edge",)),
    choice("honest-stream", 3),
    choice("fuzz-stream"),
    admit(5, worker="honest", fusion="edge"),
    edge_begin("honest-stream", "honest"),
    edge_begin("fuzz-stream", "honest"),
    candidates("honest-stream", 3),
    candidates("fuzz-stream", 0, b"x" * 1000),
    End("honest-stream", "failed", "because"),
    Join(1),
    Join(99),
    admit(3, worker="honest", user="someone"),
    admit(4, version=7),
    begin("honest-stream", "honest"),
    begin("fuzz-stream", "honest", tokens=list(range(200))),
    begin("fuzz-stream", "fuzz"),
    advance("honest-stream", 5),
    advance("fuzz-stream", 5),
    End("fuzz-stream", "finished", "", 10, 10),
]
FRAMES = [encode(message) for message in MESSAGES]
TAGS = [*sorted({type(message).__name__ for message in MESSAGES}), "Joined", "Object", ""]
HUGE = [head + b"\xff\xff\xff\xff" for head in (b"\xdd", b"\xdf", b"\xdb", b"\xc6", b"\xc9")]  # array, map, str, bin, ext
NUMBERS = [True, -1, 2**63, 2**64 - 1, 1e308, float("nan")]
VALUES = [None, *NUMBERS, "", "\n", "x" * 10_000, b"\x00", [], [[]], {}, {"type": "Attach"}]


def bit_flips(rng: random.Random, frame: bytes) -> bytes:
    flipped = bytearray(frame)
    for _ in range(rng.randint(1, 8)):
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def truncated(rng: random.Random, frame: bytes) -> bytes:
    return frame[: rng.randrange(len(frame))]


def huge_length(rng: random.Random, frame: bytes) -> bytes:
    at = rng.randrange(len(frame))
    return frame[:at] + rng.choice(HUGE) + frame[at + 1 :]


def spliced(rng: random.Random, frame: bytes) -> bytes:
    other = rng.choice(FRAMES)
    return frame[: rng.randrange(len(frame))] + other[rng.randrange(len(other)) :]


def swapped_type(rng: random.Random, frame: bytes) -> bytes:
    fields = msgspec.msgpack.decode(frame)
    fields[rng.choice(list(fields))] = rng.choice(VALUES)
    return msgspec.msgpack.encode(fields)


def other_tag(rng: random.Random, frame: bytes) -> bytes:
    fields = msgspec.msgpack.decode(frame)
    fields["type"] = rng.choice(TAGS)
    return msgspec.msgpack.encode(fields)


def nested(rng: random.Random, frame: bytes) -> bytes:
    """A field more, which nobody knows and which has no bottom."""
    return bytes([frame[0] + 1]) + frame[1:] + b"\xa7unknown" + b"\x91" * rng.choice([10, 1000, 50_000])


def padded(rng: random.Random, frame: bytes) -> bytes:
    return frame + rng.randbytes(rng.choice([1, 10, 100_000]))


def out_of_order(rng: random.Random, frame: bytes) -> bytes:
    return frame


MUTATIONS = [bit_flips, truncated, huge_length, spliced, swapped_type, other_tag, nested, padded, out_of_order]


def mutated_frames(num_frames: int, seed: int) -> Iterator[bytes]:
    rng = random.Random(seed)
    for _ in range(num_frames):
        yield rng.choice(MUTATIONS)(rng, rng.choice(FRAMES))


def generated_frames(num_frames: int) -> list[bytes]:
    """What hypothesis thinks of: bytes, and msgpack of any shape, some with a type of ours."""
    scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary()
    fields = st.sampled_from(["type", "stream", "version", "worker", "payload", "tokens", "query", "ticket"]) | st.text()
    shapes = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(fields, inner, max_size=6))
    tags = st.sampled_from([type(message).__name__ for message in MESSAGES])
    tagged = st.tuples(tags, st.dictionaries(fields, shapes, max_size=6)).map(lambda pair: {"type": pair[0], **pair[1]})
    frames: list[bytes] = []

    @settings(max_examples=num_frames // 10, deadline=None, database=None, phases=[Phase.generate], derandomize=True,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.lists(st.binary() | (tagged | shapes).map(msgspec.msgpack.encode), min_size=10, max_size=10))
    def collect(some: list[bytes]) -> None:
        frames.extend(some)

    collect()
    return frames[:num_frames]


class HonestPair:
    """An edge worker and an engine that exchange Advance and Delta until they are stopped, each checked to the byte."""

    def __init__(self, hub: RunningHub) -> None:
        self.exchanged = 0
        self.error: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(hub,))

    def __enter__(self) -> "HonestPair":
        self._thread.start()
        eventually(lambda: self.exchanged or self.error, "the first exchange")
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(DEADLINE_S)

    def _run(self, hub: RunningHub) -> None:
        try:
            with edge(hub) as worker, engine(hub) as server:
                self._work(worker, server)
        except BaseException as error:
            self.error = error

    def _work(self, worker: Edge, server: Engine) -> None:
        worker.attach("honest", instance=os.urandom(8).hex(), max_streams=4096)
        server.join()
        ours = server.send(begin("honest-stream", "honest"))
        position = 0
        while True:
            assert _next(worker.receive_frame, decode_hub_to_edge, (Begin, Advance)) == ours
            sent = worker.send(delta("honest-stream", position, os.urandom(position % 2000)))
            assert _next(server.receive_frame, decode_hub_to_engine, (Delta,)) == sent
            position = self.exchanged = position + 1
            if self._stop.is_set():
                break
            ours = server.send(advance("honest-stream", position))
        server.send(End("honest-stream", "finished", tokens_steered=position))
        assert decode_hub_to_edge(_next(worker.receive_frame, decode_hub_to_edge, (End,))).tokens_steered == position


def _next(receive_frame, decode, kinds) -> bytes:
    """The next frame of the honest stream; the hostile engines' Begins at the honest worker are not looked at."""
    while True:
        frame = receive_frame()
        message = decode(frame)
        if isinstance(message, kinds) and message.stream == "honest-stream":
            return frame


async def attack_as_edges(hub: RunningHub, frames: list[bytes]) -> None:
    """Each frame on a connection of its own, every other one after an Attach that is accepted."""
    url, options = f"ws://{hub.address}/v1/attach", {"compression": None, "close_timeout": 2}
    queue = iter(enumerate(frames))

    async def attacker(name: str) -> None:
        for number, frame in queue:
            with contextlib.suppress(ConnectionClosed):
                async with connect(url, **options) as websocket:
                    if number % 2:
                        await websocket.send(encode(attach(name, instance=name)))
                        await websocket.recv()
                    await websocket.send(frame if number % 50 else frame.decode("latin-1"))
                    if number % 3 == 0:  # leave without a goodbye
                        websocket.transport.abort()

    await asyncio.gather(*(attacker(f"attacker-{i}") for i in range(EDGES_AT_ONCE)))


def attack_as_engines(hub: RunningHub, frames: list[bytes]) -> None:
    """Every engine joins unless its number is even, sends its share and makes sure that it was heard."""
    for number, start in enumerate(range(0, len(frames), FRAMES_PER_ENGINE)):
        with engine(hub) as hostile:
            if number % 2:
                hostile.join()
            for frame in frames[start : start + FRAMES_PER_ENGINE]:
                hostile.socket.send_multipart([frame] if frame[:1] != b"\x00" else [frame, b"", frame])
            hostile.send(admit(2**40 + number, worker="honest"))
            while hostile.receive() != Admitted(2**40 + number, "honest", False):
                pass


def attack(hub: RunningHub, edge_frames: list[bytes], engine_frames: list[bytes]) -> None:
    errors: list[BaseException] = []

    def engines() -> None:
        try:
            attack_as_engines(hub, engine_frames)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=engines)
    thread.start()
    asyncio.run(attack_as_edges(hub, edge_frames))
    thread.join()
    assert errors == []


@pytest.mark.timeout(120)
def test_hostile_frames_harm_nobody_else(hub: RunningHub) -> None:
    generated = generated_frames(2000)
    edge_frames = generated[:1000] + list(mutated_frames(NUM_EDGE_FRAMES - 1000, SEED))
    engine_frames = generated[1000:] + list(mutated_frames(NUM_ENGINE_FRAMES - 1000, SEED + 1))
    random.Random(SEED).shuffle(edge_frames)
    random.Random(SEED).shuffle(engine_frames)
    with HonestPair(hub) as pair:
        attack(hub, edge_frames[:NUM_WARM_UP], engine_frames[:NUM_WARM_UP])
        before = hub.rss_bytes()
        attack(hub, edge_frames[NUM_WARM_UP:], engine_frames[NUM_WARM_UP:])
        eventually(lambda: hub.counts() == (1, 1, 1), "only the honest pair being left")
        growth = hub.rss_bytes() - before
        so_far = pair.exchanged
        eventually(lambda: pair.exchanged > so_far or pair.error, "a further exchange")
    assert pair.error is None, f"seed {SEED}"
    assert hub.json("/v1/streams/honest-stream")["tokens_steered"] == pair.exchanged
    assert growth < MAX_GROWTH_BYTES
    log = hub.log.read_text()
    assert "Traceback" not in log
    assert "bug" not in log
