"""Whatever the hub sends, the worker neither falls nor grows, and the streams that are well go on."""

import gc
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from costeer_vllm.edge.streams import Answer, Streams
from costeer_vllm.edge.worker import MAX_MALFORMED, _decode
from costeer_vllm.protocol.messages import (
    Advance,
    Attached,
    Begin,
    Candidates,
    Choice,
    Delta,
    End,
    Message,
    Query,
    Refused,
    Sampling,
    Turn,
    encode,
)
from costeer_vllm.protocol.stream import extend_hash

from .hub import GREEDY, Link, advance, attached, begin, candidates, run, settings_for

NUM_FRAMES, PER_CONNECTION = 10_000, 90

SEEDS: list[Message] = [
    begin("victim"),
    begin("victim", Query(prompt="Once"), tokens=[1, 2, 3]),
    begin("victim", Query(prompt_ids=[1, 2, 300])),
    begin("victim", sampling=Sampling(0.7, 0.9, 5, 0.01, 3, 0.9, 20.0)),
    candidates("victim", [], {1: -1.0, 2: -2.0}),
    candidates("victim", [1, 2, 3], {7: -0.1, 639: -5.0}),
    advance("victim", [1, 2, 3], 3),
    advance("victim", []),
    End("victim", "finished"),
    Attached("laptop", 10.0),
    Refused("version", "no"),
    Delta("victim", 0, 0, b"payload"),
    Choice("victim", 0, 0, 1),
]


def flip(rng: random.Random, frame: bytes) -> bytes:
    changed = bytearray(frame)
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def cut(rng: random.Random, frame: bytes) -> bytes:
    return frame[: rng.randrange(len(frame))]


def stretch(rng: random.Random, frame: bytes) -> bytes:
    at = rng.randrange(len(frame))
    return frame[:at] + rng.randbytes(rng.randint(1, 20)) + frame[at:]


def noise(rng: random.Random, frame: bytes) -> bytes:
    return rng.randbytes(rng.randint(0, 100))


def nest(rng: random.Random, frame: bytes) -> bytes:
    return b"\x91" * rng.randint(1, 5000)


def boast(rng: random.Random, frame: bytes) -> bytes:
    return rng.choice((b"\xdd", b"\xdf", b"\xc6", b"\xdb")) + b"\xff\xff\xff\xff" + frame[:20]  # 2**32 - 1 entries or bytes


def swap(rng: random.Random, frame: bytes) -> bytes:
    """A valid map with a value of another type or size."""
    message = msgspec.msgpack.decode(frame)
    key = rng.choice(sorted(message))
    message[key] = rng.choice([None, -1, 2**63, 1e308, "", "x" * 2000, [], {}, [2**31], [[]], b"\xff", True, {"type": "Begin"}])
    return msgspec.msgpack.encode(message)


MUTATIONS: list[Callable[[random.Random, bytes], bytes]] = [flip, flip, cut, stretch, noise, nest, boast, swap, swap, swap]


async def answer_of(link: Link, stream: str) -> Delta | Choice | End:
    while (answer := await link.receive()).stream != stream:
        pass
    return answer


async def well(link: Link, generated: list[int]) -> None:
    generated.append(7)
    await link.send(advance("good", generated))
    answer = await answer_of(link, "good")
    assert isinstance(answer, Delta), answer
    assert answer.position == len(generated)


def test_ten_thousand_malformed_frames(model_dir: Path, tmp_path: Path) -> None:
    rng = random.Random(0)
    seeds = [encode(seed) for seed in SEEDS]

    async def main() -> None:
        async with attached(replace(settings_for(model_dir, tmp_path), max_streams=4)) as (hub, link, worker):
            arena = worker._evaluator._model._arena
            sizes, sent = [], 0
            while sent < NUM_FRAMES:
                await link.send(begin("good"))
                assert isinstance(await answer_of(link, "good"), Delta)
                generated: list[int] = []
                for _ in range(PER_CONNECTION):
                    frame = rng.choice(MUTATIONS)(rng, rng.choice(seeds))
                    await link.websocket.send(frame if rng.random() < 0.98 else frame.hex())
                    sent += 1
                    if sent % 30 == 0:
                        await well(link, generated)
                assert len(worker._streams) <= 4
                assert arena.num_rows < 64
                await link.websocket.close()
                link = await hub.link()
                if sent % (20 * PER_CONNECTION) == 0:
                    gc.collect()
                    sizes.append(len(gc.get_objects()))
            await link.send(begin("good"))
            assert isinstance(await answer_of(link, "good"), Delta)
            assert len(sizes) >= 5
            assert max(sizes[1:]) - sizes[0] < 2000, sizes
            assert not hub.links.qsize(), "the worker never left by itself"

    run(main())


def test_a_hub_that_says_nothing_else_is_left(model_dir: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with attached(settings_for(model_dir, tmp_path)) as (hub, link, _):
            for _ in range(3):
                assert isinstance(await link.ask(begin("s")), Delta)
                for _ in range(MAX_MALFORMED):
                    await link.websocket.send(b"\xc1")
                assert isinstance(await link.ask(advance("s", [1])), Delta)
                await link.websocket.send(b"\xc1")
                link = await hub.link()

    run(main())


# --- without a socket ---


@given(st.one_of(st.binary(max_size=300), st.text(max_size=50)))
@settings(max_examples=500)
def test_any_frame_is_a_message_or_nothing(frame: Any) -> None:
    _decode(frame)


ids = st.lists(st.integers(0, 12), max_size=6)
names = st.sampled_from(["a", "b", "c", "d"])
turns = st.lists(st.builds(Turn, st.sampled_from(["user", "system"]), st.text(max_size=5)), max_size=3)
queries = st.builds(Query, st.none() | turns, st.none() | st.text(max_size=5), st.none() | ids)
samplings = st.builds(Sampling, st.floats(), st.floats(), st.integers(), max_bits=st.none() | st.floats()) | st.just(GREEDY)
offered = st.dictionaries(st.integers(0, 12), st.floats(-50, 0), min_size=1, max_size=5)
messages = st.one_of(
    st.builds(Begin, names, names, st.just("laptop"), queries, st.just(1.0), ids, st.none(), st.none() | samplings),
    st.builds(Advance, names, st.integers(0, 2**31 - 1), st.integers(0, 2**64 - 1), ids),
    st.builds(lambda name, tokens, new: advance(name, tokens, min(new, len(tokens))), names, ids, st.integers(0, 6)),
    st.builds(Candidates, names, st.integers(0, 6), st.integers(0, 2**64 - 1), st.binary(max_size=30)),
    st.builds(candidates, names, ids, offered),
    st.builds(End, names, st.just("finished")),
)


@given(st.lists(st.tuples(messages, st.booleans()), max_size=40))
@settings(max_examples=200)
def test_any_order_of_messages_keeps_the_streams_in_order(
    events: list[tuple[Begin | Advance | Candidates | End, bool]],
) -> None:
    streams = Streams("laptop", num_tokens=10, max_positions=20, limit=2, steering_key=None)
    evaluated: dict[int, list[int]] = {}
    for now, (message, take) in enumerate(events):
        answer = streams.feed(message, float(now))
        assert answer is None or answer.stream == message.stream
        assert len(streams) <= 2
        if take:
            orders, closed = streams.take_orders()
            for serial in closed:
                del evaluated[serial]
            for order in orders:
                assert (order.query is not None) == (order.serial not in evaluated)
                known = evaluated.get(order.serial, [])
                assert order.keep <= len(known)
                evaluated[order.serial] = tokens = known[: order.keep] + list(order.tokens)
                assert (order.position, order.prefix_hash) == (len(tokens), extend_hash(0, tokens))
                delta = b"payload" if order.fusion == "cloud" else np.linspace(-1, 1, 10, dtype=np.float32)
                sent = streams.answered(Answer(order.serial, order.position, order.prefix_hash, delta))
                assert isinstance(sent, Delta) == (order.fusion == "cloud")
                assert not isinstance(sent, Choice) or sent.token < 10
            assert len(evaluated) <= 2
