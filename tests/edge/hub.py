"""A hub of one page, over real sockets: it accepts one edge worker at a time and speaks the engine's side to it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from websockets.asyncio.server import Server, ServerConnection, serve

from costeer_vllm.candidates import BasePolicy, encode_candidates
from costeer_vllm.edge.worker import EdgeSettings, EdgeWorker, Retry
from costeer_vllm.protocol.messages import (
    MAX_FRAME_BYTES,
    Advance,
    Attach,
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
    decode_edge_to_hub,
    encode,
)
from costeer_vllm.protocol.stream import extend_hash

TIMEOUT_S = 30.0
CONTEXT = "# About me\n\nMy sister is called Wilhelmina Quagmire and I collect harpsichords.\n"
QUERY = Query(messages=[Turn("system", "You are brief."), Turn("user", "Write an invitation.")])
GREEDY = Sampling(temperature=0.0)
QUICK = Retry(first_s=0.001, most_s=0.01, name_taken=3)

Welcome = Callable[[Attach], Message]


def welcome(attach: Attach) -> Message:
    return Attached(attach.worker, 10.0)


class Link:
    """One attachment seen from the hub."""

    def __init__(self, websocket: ServerConnection, attach: Attach) -> None:
        self.websocket, self.attach = websocket, attach

    async def send(self, message: Message) -> None:
        await self.websocket.send(encode(message))

    async def receive(self) -> Delta | Choice | End:
        frame = await asyncio.wait_for(self.websocket.recv(), TIMEOUT_S)
        assert isinstance(frame, bytes)
        message = decode_edge_to_hub(frame)
        assert isinstance(message, (Delta, Choice, End)), message
        return message

    async def ask(self, message: Message) -> Delta | Choice | End:
        await self.send(message)
        return await self.receive()


class Hub:
    """``links`` holds the accepted attachments in order; ``replies`` the answers to the next Attaches, ``welcome`` if empty."""

    def __init__(self) -> None:
        self.links: asyncio.Queue[Link] = asyncio.Queue()
        self.attaches: list[Attach] = []
        self.replies: list[Welcome] = []
        self._server: Server

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def __aenter__(self) -> "Hub":
        self._server = await serve(self._serve, "127.0.0.1", 0, max_size=MAX_FRAME_BYTES, compression=None)
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def link(self) -> Link:
        return await asyncio.wait_for(self.links.get(), TIMEOUT_S)

    async def _serve(self, websocket: ServerConnection) -> None:
        assert websocket.request is not None
        assert websocket.request.path == "/v1/attach"
        frame = await websocket.recv()
        assert isinstance(frame, bytes)
        attach = decode_edge_to_hub(frame)
        assert isinstance(attach, Attach)
        self.attaches.append(attach)
        reply = (self.replies.pop(0) if self.replies else welcome)(attach)
        await websocket.send(encode(reply))
        if not isinstance(reply, Refused):
            self.links.put_nowait(Link(websocket, attach))
            await websocket.wait_closed()


@contextlib.asynccontextmanager
async def attached(settings: EdgeSettings, **options: Any) -> AsyncIterator[tuple[Hub, Link, EdgeWorker]]:
    """A hub, and a worker that is attached to it; the worker must end well."""
    async with Hub() as hub, running(hub, settings, **options) as (worker, task):
        yield hub, await hub.link(), worker
        assert not task.done()


@contextlib.asynccontextmanager
async def running(hub: Hub, settings: EdgeSettings, **options: Any) -> AsyncIterator[tuple[EdgeWorker, "asyncio.Task[None]"]]:
    """A worker that dials ``hub`` while the block runs."""
    worker = EdgeWorker(replace(settings, hub=hub.url), **{"retry": QUICK, **options})
    task = asyncio.create_task(worker.run())
    try:
        yield worker, task
    finally:
        worker.stop()
        await asyncio.wait([task], timeout=TIMEOUT_S)
    assert task.done()


def settings_for(model_dir: Path, tmp_path: Path, **changes: Any) -> EdgeSettings:
    context = tmp_path / "me.md"
    if not context.exists():
        context.write_text(CONTEXT, encoding="utf-8")
    return EdgeSettings(
        **{
            "hub": "127.0.0.1:1",
            "name": "laptop",
            "model": str(model_dir),
            "context": str(context),
            "threads": 1,
            "delta": "lossless",
            **changes,
        }
    )


def begin(stream: str, query: Query = QUERY, tokens: list[int] | None = None, **changes: Any) -> Begin:
    return Begin(**{"stream": stream, "request": stream, "worker": "laptop", "query": query, "strength": 1.0,
                    "tokens": tokens or [], **changes})  # fmt: skip


def candidates(stream: str, generated: list[int], log_probs: dict[int, float]) -> Candidates:
    """The base policy after ``generated``: log-probabilities by id."""
    ids = sorted(log_probs)
    payload = encode_candidates(BasePolicy(np.array(ids), np.array([log_probs[i] for i in ids]), 0.0))
    return Candidates(stream, len(generated), extend_hash(0, generated), payload)


def advance(stream: str, generated: list[int], num_new: int = 1) -> Advance:
    """``generated``: all ids so far, of which the last ``num_new`` are sent."""
    return Advance(stream, len(generated), extend_hash(0, generated), generated[len(generated) - num_new :])


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 4 * TIMEOUT_S))
