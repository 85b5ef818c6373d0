"""Edge workers that do not behave, and a proxy that records what a real one sends."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from transformers import AutoTokenizer
from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from costeer_vllm.processes import free_port
from costeer_vllm.protocol.messages import (
    MAX_FRAME_BYTES,
    PROTOCOL_VERSION,
    Advance,
    Attach,
    Begin,
    Vocabulary,
    decode_hub_to_edge,
    encode,
)
from costeer_vllm.protocol.stream import extend_hash
from costeer_vllm.vocab import fingerprint

Answer = Callable[[Begin | Advance, int, int], list[bytes]]  # the question, its position and prefix hash -> frames


def vocabulary_of(folder: Path) -> Vocabulary:
    return fingerprint(AutoTokenizer.from_pretrained(folder).get_vocab())


@contextlib.contextmanager
def in_a_thread(main: Callable[[asyncio.Event], Any]) -> Iterator[None]:
    """Run ``main(stop)`` in an event loop of its own until the block ends; what it raises is raised here."""
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()
    errors: list[BaseException] = []

    def run() -> None:
        try:
            loop.run_until_complete(main(stop))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        if not thread.is_alive():
            loop.close()
        if errors:
            raise errors[0]


@contextlib.contextmanager
def rogue_edge(hub: str, name: str, vocabulary: Vocabulary, answer: Answer) -> Iterator[None]:
    """An edge worker that answers every question with whatever ``answer`` returns."""
    attached = threading.Event()

    async def main(stop: asyncio.Event) -> None:
        async with connect(f"ws://{hub}/v1/attach", compression=None, max_size=MAX_FRAME_BYTES) as socket:
            await socket.send(encode(Attach(PROTOCOL_VERSION, name, "rogue", "none", vocabulary)))
            await socket.recv()
            attached.set()
            ended = asyncio.create_task(stop.wait())
            reader = asyncio.create_task(_answer_all(socket, answer))
            await asyncio.wait((ended, reader), return_when=asyncio.FIRST_COMPLETED)
            reader.cancel()
            ended.cancel()

    with in_a_thread(main):
        assert attached.wait(10)
        yield


async def _answer_all(socket: Any, answer: Answer) -> None:
    with contextlib.suppress(ConnectionClosed):
        async for frame in socket:
            message = decode_hub_to_edge(frame)
            if isinstance(message, Begin):
                frames = answer(message, len(message.tokens), extend_hash(0, message.tokens))
            elif isinstance(message, Advance):
                frames = answer(message, message.position, message.prefix_hash)
            else:
                continue
            for reply in frames:
                await socket.send(reply)


@contextlib.contextmanager
def recording_proxy(hub: str) -> Iterator[tuple[str, list[bytes], list[bytes]]]:
    """A WebSocket proxy before ``hub``: its address, what edge workers sent through it, and what the hub sent."""
    port = free_port()
    up: list[bytes] = []
    down: list[bytes] = []
    ready = threading.Event()

    async def relay(edge: ServerConnection) -> None:
        assert edge.request is not None
        up.append("\n".join(f"{key}: {value}" for key, value in edge.request.headers.raw_items()).encode())
        up.append(edge.request.path.encode())
        async with connect(f"ws://{hub}/v1/attach", compression=None, max_size=MAX_FRAME_BYTES) as upstream:
            pumps = [asyncio.create_task(_pump(edge, upstream, up)), asyncio.create_task(_pump(upstream, edge, down))]
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            for pump in pumps:
                pump.cancel()

    async def main(stop: asyncio.Event) -> None:
        async with serve(relay, "127.0.0.1", port, compression=None, max_size=MAX_FRAME_BYTES):
            ready.set()
            await stop.wait()

    with in_a_thread(main):
        assert ready.wait(10)
        yield f"127.0.0.1:{port}", up, down


@contextlib.contextmanager
def recording_tcp_proxy(url: str) -> Iterator[tuple[str, bytearray]]:
    """A proxy before the HTTP server at ``url``: the same URL through it, and every byte that clients sent."""
    parts, port, sent = urlsplit(url), free_port(), bytearray()
    ready = threading.Event()

    async def relay(client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_connection(parts.hostname, parts.port)
        await asyncio.gather(_copy(client, to_server, sent), _copy(from_server, to_client, bytearray()))

    async def main(stop: asyncio.Event) -> None:
        async with await asyncio.start_server(relay, "127.0.0.1", port):
            ready.set()
            await stop.wait()

    with in_a_thread(main):
        assert ready.wait(10)
        yield f"http://127.0.0.1:{port}{parts.path}", sent


async def _copy(source: asyncio.StreamReader, target: asyncio.StreamWriter, record: bytearray) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await source.read(65536):
            record += data
            target.write(data)
            await target.drain()
    target.close()


async def _pump(source: Any, target: Any, record: list[bytes]) -> None:
    with contextlib.suppress(ConnectionClosed):
        async for frame in source:
            record.append(frame)
            await target.send(frame)
