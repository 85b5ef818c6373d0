"""A real worker with its gateway, between a hub and a server that record every byte: steered answers, and planted secrets."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from costeer_vllm.edge.context import MAX_CONTEXT_BYTES
from costeer_vllm.edge.gateway import Gateway
from costeer_vllm.edge.settings import EdgeSettings, gateway_settings
from costeer_vllm.edge.upstream import Upstream as Client
from costeer_vllm.edge.worker import EdgeWorker
from costeer_vllm.processes import free_port
from costeer_vllm.protocol import keys
from costeer_vllm.protocol.messages import Delta, End, Query, Refused, Turn, decode_edge_to_hub, encode

from .hub import TIMEOUT_S, Hub, Link, advance, begin, running, settings_for
from .test_privacy import CONTEXT, SECRETS, Witness, scrutinized
from .test_privacy import witness as witness  # a fixture
from .upstream import Call, Upstream, upstream

BODY: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Write an invitation."}]}
ANSWER = b'{"id":"x","object":"chat.completion","choices":[]}'


@dataclass
class Engine:
    """The server's half of a stream: asks over the hub's link for as many deltas as an answer has tokens."""

    link: Link
    frames: list[bytes]
    key: str | None = None
    num_tokens: int = 4

    async def steer(self, call: Call, stream: str, end: bool = True) -> None:
        costeer = call.json["costeer"]
        query = Query(messages=[Turn(**turn) for turn in call.json["messages"]], ref=costeer["context_ref"])
        grant = None if self.key is None else keys.grant(keys.key_digest(self.key), "laptop", query)
        generated: list[int] = []
        await self.ask(begin(stream, query, grant=grant))
        for token in range(5, 4 + self.num_tokens):
            generated.append(token)
            await self.ask(advance(stream, generated))
        if end:
            message = End(stream, "finished", "", self.num_tokens, 0)
            self.frames.append(encode(message))
            await self.link.send(message)

    async def ask(self, message: Any) -> None:
        self.frames.append(encode(message))
        answer = await self.link.ask(message)
        assert isinstance(answer, Delta), answer
        self.frames.append(encode(answer))


@dataclass
class Place:
    hub: Hub
    server: Upstream
    engine: Engine
    app: httpx.AsyncClient
    worker: EdgeWorker

    async def chat(self, **fields: Any) -> httpx.Response:
        return await self.app.post("/chat/completions", json={**BODY, **fields})


@contextlib.asynccontextmanager
async def place(settings: EdgeSettings, frames: list[bytes], **options: Any) -> AsyncIterator[Place]:
    """A worker that is attached, and its gateway."""
    port = free_port()
    async with Hub() as hub, upstream() as server:
        settings = replace(settings, gateway=gateway_settings(f"127.0.0.1:{port}", server.url))
        async with running(hub, settings, on_frame_sent=frames.append, **options) as (worker, _):
            engine = Engine(await hub.link(), frames, settings.steering_key)
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}/v1", trust_env=False, timeout=TIMEOUT_S) as app:
                yield Place(hub, server, engine, app, worker)


@pytest.fixture
def settings(model_dir: Path, tmp_path: Path) -> EdgeSettings:
    (tmp_path / "me.md").write_text(CONTEXT, encoding="utf-8")
    return settings_for(model_dir, tmp_path)


def test_steered_answers_tell_nothing_of_either_context(settings: EdgeSettings, witness: Witness, capfd: Any) -> None:
    private = f"My sister is {SECRETS[0]}, my card {SECRETS[1]}; I am {SECRETS[2]} and live at {SECRETS[3]}."

    async def main() -> None:
        async with place(replace(settings, steering_key="sesame"), witness.frames) as at:

            async def script(call: Call) -> None:
                await at.engine.steer(call, f"s{len(at.server.calls)}")
                if not call.json.get("stream"):
                    return await call.answer(ANSWER)
                await call.start_events()
                return await call.chunk(b'data: {"id": "x", "choices": []}\n\n', b"data: [DONE]\n\n", b"")

            at.server.script = script
            for stream in (False, True):
                for costeer in ({}, {"context": private, "T": 3}):
                    answer = await at.chat(stream=stream, costeer=costeer)
                    text = answer.text if not stream else answer.text.split("\n\n")[-3].removeprefix("data: ")
                    found = json.loads(text)["costeer"]
                    assert (found["tokens_steered"], found["tokens_missed"]) == (4, 0)
                    assert found["bytes_up"] > 4 * 640
                    assert found["bytes_down"] > 100
            # The private text did reach the small model: the same prefix has another delta.
            deltas = [message for message in map(_delta, witness.frames) if message and message.position == 0]
            assert len({delta.payload for delta in deltas}) >= 2
            witness.frames.append(bytes(at.server.received))
            witness.records.texts += [repr(at.worker.__dict__), repr(at.worker._books.accounts.__dict__)]

    scrutinized(main)
    assert any(b"Write an invitation." in frame for frame in witness.frames), "the search itself works"
    witness.check(*capfd.readouterr())


def _delta(frame: bytes) -> Delta | None:
    try:
        message = decode_edge_to_hub(frame)
    except Exception:
        return None
    return message if isinstance(message, Delta) else None


def test_whatever_goes_wrong_tells_nothing(
    settings: EdgeSettings, witness: Witness, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    async def main() -> None:
        async with place(settings, witness.frames) as at:

            async def fails(status: int, body: Any) -> None:
                content = body if isinstance(body, bytes) else json.dumps({**BODY, **body}).encode()
                answer = await at.app.post("/chat/completions", content=content, headers={"content-type": "application/json"})
                assert answer.status_code == status, answer.text

            for costeer in ({"context": [CONTEXT]}, {"context": {CONTEXT: CONTEXT}}, {"contxt": CONTEXT}, CONTEXT, [CONTEXT],
                            {"context": CONTEXT, "key": CONTEXT}, {"context": CONTEXT, "T": -1},
                            {"context": CONTEXT * (MAX_CONTEXT_BYTES // len(CONTEXT) + 1)}):  # fmt: skip
                await fails(400, {"costeer": costeer})
            await fails(400, json.dumps({"costeer": {"context": CONTEXT}}).encode()[:-1])
            await fails(400, b'{"costeer": {"context": "' + CONTEXT.replace("\n", " ").encode() + b'\xff"}}')
            await fails(400, b'{"' + CONTEXT.replace("\n", " ").encode() + b'\xff": 1}')
            private = {"costeer": {"context": CONTEXT}}

            async def reset(call: Call) -> None:
                call.reset()

            at.server.script = reset
            await fails(502, private)
            for owner, method in ((Client, "asked"), (Client, "read"), (Client, "_headers")):
                with monkeypatch.context() as patch:
                    patch.setattr(owner, method, _raising)
                    at.server.script = at.server.complete
                    await fails(500, private)
            witness.frames.append(bytes(at.server.received))

    scrutinized(main)
    assert any("the gateway fails: RuntimeError at" in text for text in witness.records.texts)
    witness.check(*capfd.readouterr())


def _raising(*args: Any, **kwargs: Any) -> Any:
    private = CONTEXT  # in the frame's locals
    raise RuntimeError(private) from ValueError(CONTEXT)


def test_until_it_is_attached_nothing_is_steered_but_plain_answers_are_given(settings: EdgeSettings) -> None:
    async def main() -> None:
        frames: list[bytes] = []
        async with place(settings, frames) as at:
            at.hub.replies = [lambda attach: Refused("full", "not now")] * 1000
            await at.engine.link.websocket.close()
            while (await at.app.get("../healthz")).json()["attached"]:
                await asyncio.sleep(0.01)
            assert (await at.chat()).status_code == 503
            assert not at.server.received
            assert (await at.chat(costeer=False)).status_code == 200
            at.hub.replies.clear()
            at.engine.link = await at.hub.link()
            at.server.script = lambda call: _steered(at, call)
            assert (await at.chat()).json()["costeer"]["tokens_steered"] == 4

    scrutinized(main)


async def _steered(at: Place, call: Call) -> None:
    await at.engine.steer(call, "s")
    await call.answer(ANSWER)


def test_a_link_that_is_lost_in_the_middle_is_told(settings: EdgeSettings) -> None:
    async def main() -> None:
        async with place(settings, []) as at:

            async def script(call: Call) -> None:
                await at.engine.steer(call, "s", end=False)
                await at.engine.link.websocket.close()
                at.engine.link = await at.hub.link()
                await call.answer(ANSWER)

            at.server.script = script
            found = (await at.chat()).json()["costeer"]
            assert (found["tokens_steered"], found["tokens_missed"]) == (None, None)
            assert "the link to the hub was lost" in found["note"]

    scrutinized(main)


def test_a_wrong_grant_is_told(settings: EdgeSettings) -> None:
    async def main() -> None:
        async with place(replace(settings, steering_key="sesame"), []) as at:

            async def script(call: Call) -> None:
                query = Query(prompt="Hi", ref=call.json["costeer"]["context_ref"])
                assert isinstance(await at.engine.link.ask(begin("s", query, grant="0" * 64)), End)
                await call.answer(ANSWER)

            at.server.script = script
            found = (await at.chat()).json()["costeer"]
            assert found["tokens_steered"] == 0
            assert "the steering key of the request does not fit" in found["note"]

    scrutinized(main)


def test_the_gateway_ends_with_its_worker(settings: EdgeSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with place(settings, []) as at:
            url = at.app.base_url
            assert (await at.app.get("../healthz")).status_code == 200
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}models", trust_env=False)

        async def failing(_: Gateway) -> None:
            raise OSError("no")

        monkeypatch.setattr(Gateway, "serve", failing)
        async with Hub() as hub, upstream() as server:
            changed = replace(settings, gateway=gateway_settings("127.0.0.1:0", server.url))
            async with running(hub, changed) as (_, task):
                with pytest.raises(OSError, match="no"):
                    await asyncio.wait_for(asyncio.shield(task), TIMEOUT_S)

    scrutinized(main)
