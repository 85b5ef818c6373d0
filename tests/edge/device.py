"""A gateway over real sockets, without a small model: the tests play the engine by telling the accounts what came."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from costeer_vllm.edge.accounts import Accounts
from costeer_vllm.edge.books import Books
from costeer_vllm.edge.context import PrivateContexts
from costeer_vllm.edge.gateway import Gateway
from costeer_vllm.edge.settings import EdgeSettings, gateway_settings
from costeer_vllm.edge.upstream import Patience
from costeer_vllm.protocol.messages import Delta, End, Query

from .hub import TIMEOUT_S, begin
from .upstream import Upstream, upstream

QUICK = Patience(connect_s=2.0, answer_s=10.0, client_s=10.0, counts_s=0.3)
BODY = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}


@dataclass
class Device:
    """``steerable``: None while the worker is not attached."""

    server: Upstream
    books: Books
    accounts: Accounts
    contexts: PrivateContexts
    steerable: PrivateContexts | None
    gateway: Gateway
    app: httpx.AsyncClient  # its base URL is the gateway's
    serving: asyncio.Task[None]

    async def chat(self, **fields: Any) -> httpx.Response:
        return await self.app.post("/chat/completions", json={**BODY, **fields})

    def text(self, ref: str) -> str | None:
        """The private text under a ref; None if it is the worker's own context."""
        registered = self.contexts._registered[ref]
        return None if registered is None else str(registered.text)

    def steers(self, ref: str, *, missed: int = 0, steered: int = 0, streams: int = 1, end: bool = True) -> None:
        """What the accounts sees of the streams of a request: per stream 100 bytes down and 1,000 up."""
        for i in range(streams):
            name = f"{ref}.{i}"
            self.accounts.received(begin(name, Query(prompt="Hi", ref=ref)), 100)
            self.accounts.sent(Delta(name, 0, 0, b""), 1000)
            if end:
                self.accounts.received(End(name, "finished", "", steered, missed), 10)


@contextlib.asynccontextmanager
async def device(folder: Path, server: str | None = None, patience: Patience = QUICK, **options: Any) -> AsyncIterator[Device]:
    """A gateway before a scripted server, or before what is at ``server``; it must end well and give everything back."""
    context = folder / "me.md"
    if not context.exists():
        context.write_text("I am Wilhelmina.", encoding="utf-8")
    contexts, books = PrivateContexts.load(str(context)), Books()
    accounts = books.accounts
    keys = {name: options.pop(name, None) for name in ("key", "server_key")}
    async with upstream() as up:
        address = options.pop("address", "127.0.0.1:0")
        settings = EdgeSettings(
            **{"hub": "127.0.0.1:1", "name": "laptop", "model": "tiny", "context": str(context), **options},
            gateway=gateway_settings(address, server or up.url, **keys),
        )
        gateway = Gateway(settings, lambda: found.steerable, books, patience)
        serving = asyncio.create_task(gateway.serve())
        async with httpx.AsyncClient(base_url=gateway.url, trust_env=False, timeout=TIMEOUT_S) as app:
            found = Device(up, books, accounts, contexts, contexts, gateway, app, serving)
            try:
                yield found
            finally:
                await app.aclose()
                serving.cancel()
                await asyncio.wait([serving], timeout=TIMEOUT_S)
                gateway.close()
        assert serving.done()
        assert gateway._device.num_taken == 0
        assert gateway._device.num_bytes == 0
        assert not accounts._by_ref
        assert not accounts._by_stream
        assert not contexts._registered
