"""The gateway over real sockets: what it forwards, what it gives back, and what it does when either side fails."""

import asyncio
import itertools
import json
import logging
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from costeer_vllm.edge import completions
from costeer_vllm.edge.asks import parse_ask
from costeer_vllm.protocol.messages import End

from .device import BODY, QUICK, device
from .hub import TIMEOUT_S, run
from .upstream import Call

ANSWER = {"id": "x", "object": "chat.completion", "choices": [{"index": 0, "logprobs": {"content": []}}], "usage": {"total": 1}}


def ref_of(call: Call) -> str:
    return str(call.json["costeer"]["context_ref"])


def sse(*events: Any) -> list[bytes]:
    return [f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n".encode() for event in events]


CHUNK = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [{"index": 0, "delta": {}}]}


def events_of(body: bytes) -> list[Any]:
    values = [event.removeprefix(b"data: ") for event in body.split(b"\n\n") if event.startswith(b"data: ")]
    return [value.decode() if value == b"[DONE]" else json.loads(value) for value in values]


def post(body: bytes) -> bytes:
    """A request as bytes, for apps that do not go on."""
    head = ("POST /v1/chat/completions HTTP/1.1", "host: localhost", "content-type: application/json")
    return "\r\n".join((*head, f"content-length: {len(body)}\r\n\r\n")).encode() + body


# --- the good way ---


def test_an_answer_and_its_account(tmp_path: Path) -> None:
    async def main() -> None:
        async with device(tmp_path, steering_key="sesame") as at:

            async def script(call: Call) -> None:
                assert at.text(ref_of(call)) is None
                at.steers(ref_of(call), steered=7, missed=1)
                await call.answer(json.dumps(ANSWER).encode(), more="x-request-id: 7\r\nset-cookie: a=b\r\n")

            at.server.script = script
            answer = await at.chat(costeer={"T": 1, "deadline_ms": 100}, tools=[{"type": "function"}], seed=1)
            assert answer.json() == {
                **ANSWER,
                "costeer": {
                    "worker": "laptop", "fusion": "cloud", "strength": pytest.approx(1 / 2.1), "tokens_steered": 7,
                    "tokens_missed": 1, "bytes_up": 1000, "bytes_down": 100, "disclosed_bits": None,
                },
            }  # fmt: skip
            assert answer.headers["x-request-id"] == "7"
            assert "set-cookie" not in answer.headers
            (call,) = at.server.calls
            ref = ref_of(call)
            steering = {"T": 1, "deadline_ms": 100, "worker": "laptop", "context_ref": ref, "key": "sesame"}
            assert call.json == {**BODY, "tools": [{"type": "function"}], "seed": 1, "costeer": steering}

    run(main())


def test_a_private_text_stays_here(tmp_path: Path) -> None:
    async def main() -> None:
        async with device(tmp_path) as at:

            async def script(call: Call) -> None:
                assert at.text(ref_of(call)) == "I am Clara Quagmire."
                at.steers(ref_of(call), steered=1)
                await call.answer(json.dumps(ANSWER).encode())

            at.server.script = script
            assert (await at.chat(costeer={"context": "I am Clara Quagmire."})).json()["costeer"]["tokens_steered"] == 1
            assert b"Quagmire" not in at.server.received
            assert b"Wilhelmina" not in at.server.received

    run(main())


def test_false_is_the_plain_answer_byte_for_byte(tmp_path: Path) -> None:
    async def main() -> None:
        async with device(tmp_path) as at:
            body = b' {"choices" : [] , "n": 1.0e1}\n'
            at.server.script = lambda call: call.answer(body)
            at.steerable = None  # and it needs no hub
            answer = await at.chat(costeer=False)
            assert answer.content == body
            assert at.server.calls[0].json == BODY
            stream = b": hm\r\n\r\n" + b"".join(sse(CHUNK, "[DONE]"))

            async def streamed(call: Call) -> None:
                await call.start_events()
                await call.chunk(stream, b"")

            at.server.script = streamed
            assert (await at.chat(costeer=False, stream=True)).content == stream

    run(main())


def test_models_are_the_servers_without_the_aliases(tmp_path: Path) -> None:
    async def main() -> None:
        async with device(tmp_path) as at:
            models = [{"id": "m", "object": "model", "x": 1}, {"id": "m+costeer", "object": "model"}]
            at.server.script = lambda call: call.answer(json.dumps({"object": "list", "data": models, "y": 2}).encode())
            assert (await at.app.get("/models")).json() == {"object": "list", "data": models[:1], "y": 2}
            assert (await at.app.head("/models")).content == b""
            assert at.server.calls[0].head.startswith("GET /v1/models ")
            for odd in (b"[]", b"{}", b'{"data": 5}', b"oh", b"\xff"):
                at.server.script = lambda call, odd=odd: call.answer(odd)  # type: ignore[misc]
                assert (await at.app.get("/models")).content == odd

    run(main())


def test_models_take_a_place_and_end_with_the_app(tmp_path: Path) -> None:
    async def main() -> None:
        async with device(tmp_path, max_streams=1) as at:
            at.server.script = _hangs
            _, writer = await asyncio.open_connection("127.0.0.1", at.app.base_url.port)
            writer.write(b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n")
            while not at.server.calls:
                await asyncio.sleep(0.01)
            for answer in (await at.app.get("/models"), await at.chat()):
                assert (answer.status_code, answer.json()["error"]["code"]) == (429, "busy")
            writer.close()
            await asyncio.wait_for(at.server.calls[0].hung_up.wait(), TIMEOUT_S)
            at.server.script = lambda call: call.answer(b"{}")
            while at.gateway._device.num_taken:
                await asyncio.sleep(0.01)
            assert (await at.app.get("/models")).status_code == 200

    run(main())


def test_health(tmp_path: Path) -> None:
    async def main() -> None:
        async with device(tmp_path) as at:
            assert (await at.app.get("../healthz")).json()["attached"] is True
            at.steerable = None
            health = (await at.app.get("../healthz")).json()
            assert (health["status"], health["attached"]) == ("ok", False)

    run(main())


@pytest.mark.parametrize("pieces", [1, 3, 10_000])
def test_a_stream_is_passed_on_byte_for_byte_with_one_more_event(tmp_path: Path, pieces: int) -> None:
    """However it is cut, with all that server-sent events may hold."""
    first = b': wait\n\ndata: {"id": "x",\r\ndata: "created": 1}\r\n\r\n'
    middle = b': a comment\n\nevent: odd\nid: 7\ndata: {"choices": [{"delta": {"content": "[DONE]"}}]}\n\n\n\ndata:\r\rdata\n\n'
    last = b"data: [DONE]\n\n: and more\n\n"
    stream = first + middle + last
    cuts = [len(stream) * i // min(pieces, len(stream)) for i in range(min(pieces, len(stream)) + 1)]

    async def main() -> None:
        async with device(tmp_path) as at:

            async def script(call: Call) -> None:
                await call.start_events()
                await call.chunk(*(stream[a:b] for a, b in itertools.pairwise(cuts)), pause_s=0.0001)
                at.steers(ref_of(call), steered=2)
                await call.chunk(b"")

            at.server.script = script
            answer = await at.chat(stream=True)
            assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
            head, tail = answer.content[: len(first + middle)], answer.content[len(first + middle) :]
            assert head == first + middle
            event, *rest = tail.split(b"\n\n", 1)
            assert rest[0] == last
            found = json.loads(event.removeprefix(b"data: "))
            assert (found["id"], found["created"], found["choices"]) == ("x", 1, [])
            assert found["costeer"]["tokens_steered"] == (2 if pieces else None)

    run(main())


def test_events_are_passed_on_as_they_come(tmp_path: Path) -> None:
    async def main() -> None:
        async with device(tmp_path) as at:
            seen = asyncio.Event()

            async def script(call: Call) -> None:
                await call.start_events()
                await call.chunk(*sse(CHUNK))
                await asyncio.wait_for(seen.wait(), TIMEOUT_S)  # nothing more comes before this has arrived
                at.steers(ref_of(call), steered=1)
                await call.chunk(*sse("[DONE]"), b"")

            at.server.script = script
            async with at.app.stream("POST", "/chat/completions", json={**BODY, "stream": True}) as answer:
                parts = answer.aiter_bytes()
                assert events_of(await anext(parts)) == [CHUNK]
                seen.set()
                rest = b"".join([part async for part in parts])
            assert events_of(rest)[0]["costeer"]["tokens_steered"] == 1
            assert events_of(rest)[1] == "[DONE]"

    run(main())


def test_the_openai_client_reads_both(tmp_path: Path) -> None:
    async def main() -> None:
        async with device(tmp_path) as at:

            async def script(call: Call) -> None:
                at.steers(ref_of(call), steered=2, streams=2)
                if call.json.get("stream"):
                    await call.start_events()
                    return await call.chunk(*sse(CHUNK, {**CHUNK, "choices": [], "usage": None}, "[DONE]"), b"")
                return await call.answer(json.dumps({**ANSWER, "created": 1, "model": "m"}).encode())

            at.server.script = script
            http = httpx.AsyncClient(trust_env=False)
            async with openai.AsyncOpenAI(base_url=at.gateway.url, api_key="none", http_client=http, max_retries=0) as client:
                messages: Any = BODY["messages"]
                whole = await client.chat.completions.create(model="m", messages=messages, n=2)
                assert whole.costeer["tokens_steered"] == 4  # type: ignore[attr-defined]
                stream = await client.chat.completions.create(model="m", messages=messages, n=2, stream=True)
                chunks = [chunk async for chunk in stream]
                assert len(chunks) == 3
                assert chunks[-1].costeer["tokens_steered"] == 4  # type: ignore[attr-defined]
                assert (chunks[-1].id, chunks[-1].choices) == ("x", [])

    run(main())


# --- the counts ---


@pytest.mark.parametrize("is_streamed", [False, True])
def test_counts_that_come_late_are_waited_for_and_those_that_never_come_are_null(tmp_path: Path, is_streamed: bool) -> None:
    async def main() -> None:
        async with device(tmp_path, patience=replace(QUICK, counts_s=1.0)) as at:
            late: list[float] = [0.1]

            async def script(call: Call) -> None:
                ref = ref_of(call)
                at.steers(ref, end=False)
                if late:
                    loop = asyncio.get_running_loop()
                    loop.call_later(late.pop(), at.accounts.received, End(f"{ref}.0", "finished", "", 3, 0), 5)
                if is_streamed:
                    await call.start_events()
                    await call.chunk(*sse(CHUNK, "[DONE]"), b"")
                else:
                    await call.answer(json.dumps(ANSWER).encode())

            def costeer(answer: httpx.Response) -> Any:
                found = events_of(answer.content)[-2] if is_streamed else answer.json()
                return found["costeer"]

            at.server.script = script
            assert costeer(await at.chat(stream=is_streamed))["tokens_steered"] == 3
            start = time.monotonic()
            found = costeer(await at.chat(stream=is_streamed))
            assert 0.9 < time.monotonic() - start < 5
            assert (found["tokens_steered"], found["tokens_missed"], found["bytes_up"]) == (None, None, 1000)
            assert "not known here" in found["note"]

    run(main())


def test_an_answer_that_was_not_steered_says_so(tmp_path: Path) -> None:
    async def main() -> None:
        async with device(tmp_path) as at:

            async def missed(call: Call) -> None:
                at.steers(ref_of(call), missed=5)
                await call.answer(json.dumps(ANSWER).encode())

            async def lost(call: Call) -> None:
                at.steers(ref_of(call), end=False)
                at.accounts.detached()
                await call.answer(json.dumps(ANSWER).encode())

            for script, counts, note in (
                (missed, (0, 5), "no token was steered: no answer of the edge worker came in time"),
                (lost, (None, None), "(the link to the hub was lost)"),
                (at.server.complete, (0, None), "asked it for nothing"),
            ):
                at.server.script = script
                found = (await at.chat()).json()["costeer"]
                assert (found["tokens_steered"], found["tokens_missed"]) == counts
                assert note in found["note"]

    run(main())


# --- what is refused here ---


@pytest.mark.parametrize(
    ("changes", "status", "code", "param"),
    [
        ({"content": b"{"}, 400, "bad_json", None),
        ({"json": {"costeer": {"context": 5}}}, 400, "bad_parameter", "costeer.context"),
        ({"json": {"costeer": {"context": "x" * (4 * 2**20 + 1)}}}, 400, "bad_parameter", "costeer.context"),
        ({"json": {"costeer": {"T": -1}}}, 400, "bad_parameter", "costeer.T"),
        ({"json": {"costeer": {"wish": 1}}}, 400, "bad_parameter", "costeer"),
        ({"json": {"costeer": {"worker": "desk"}}}, 400, "bad_parameter", "costeer.worker"),
        ({"json": {"costeer": 5}}, 400, "bad_parameter", "costeer"),
        ({"json": {"costeer": False, "model": "m+costeer"}}, 400, "bad_parameter", "model"),
        ({"content": b"{}", "headers": {"content-type": "text/plain"}}, 415, "bad_content_type", None),
        ({"content": b"x" * (16 * 2**20 + 1)}, 413, "too_long", None),
    ],
)
def test_mistakes_are_told_and_nothing_leaves(
    tmp_path: Path, changes: dict[str, Any], status: int, code: str, param: str | None
) -> None:
    async def main() -> None:
        async with device(tmp_path) as at:
            arguments = {"headers": {"content-type": "application/json"}, **changes}
            answer = await at.app.post("/chat/completions", **arguments)
            assert answer.status_code == status
            error = answer.json()["error"]
            assert (error["code"], error["param"], error["type"]) == (code, param, "invalid_request_error")
            assert len(error["message"]) < 400
            assert not at.server.received

    run(main())


def test_a_body_without_a_length_is_bounded_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completions, "MAX_BODY_BYTES", 1000)

    async def main() -> None:
        async def parts() -> Any:
            for _ in range(11):
                yield b" " * 100

        async with device(tmp_path) as at:
            answer = await at.app.post("/chat/completions", content=parts(), headers={"content-type": "application/json"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_long")

    run(main())


def test_the_bodies_of_all_requests_are_bounded_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completions, "MAX_BODIES_BYTES", 1000)

    async def main() -> None:
        async with device(tmp_path) as at:
            reader, writer = await asyncio.open_connection("127.0.0.1", at.app.base_url.port)
            body = b"{}".ljust(700)
            writer.write(post(body)[:-1])
            while at.gateway._device.num_bytes < 699:
                await asyncio.sleep(0.01)
            answer = await at.chat(user="x" * 400)
            assert (answer.status_code, answer.json()["error"]["code"]) == (429, "busy")
            assert (await at.chat()).status_code == 200, "for a short one there is room"
            assert at.gateway._device.num_bytes == 699
            writer.write(body[-1:])
            assert b" 200 " in await asyncio.wait_for(reader.readuntil(b"\r\n"), TIMEOUT_S)
            while at.gateway._device.num_bytes:
                await asyncio.sleep(0.01)
            assert (await at.chat(user="x" * 400)).status_code == 200
            writer.close()

    run(main())


def test_long_requests_are_taken_apart_in_a_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[threading.Thread] = []

    def watched(*body: Any) -> Any:
        threads.append(threading.current_thread())
        return parse_ask(*body)

    monkeypatch.setattr(completions, "parse_ask", watched)

    async def main() -> None:
        async with device(tmp_path) as at:
            for length in (10, 2**20):
                assert (await at.chat(user="x" * length)).status_code == 200
                assert len(at.server.calls[-1].json["user"]) == length
            answer = await at.chat(user="x" * 2**20, costeer={"T": -1})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "costeer.T")
            assert [thread is threading.current_thread() for thread in threads] == [True, False, False]

    run(main())


def test_a_request_that_does_not_arrive_is_not_waited_for(tmp_path: Path) -> None:
    async def main() -> None:
        async with device(tmp_path, patience=replace(QUICK, client_s=0.2)) as at:
            reader, writer = await asyncio.open_connection("127.0.0.1", at.app.base_url.port)
            writer.write(post(b"x" * 9)[:-8])
            assert b" 408 " in await asyncio.wait_for(reader.readuntil(b"\r\n"), TIMEOUT_S)
            writer.close()

    run(main())


def test_a_worker_that_is_not_attached_steers_nothing_in_silence(tmp_path: Path) -> None:
    async def main() -> None:
        async with device(tmp_path) as at:
            at.steerable = None
            answer = await at.chat()
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_attached")
            assert "costeer" in answer.json()["error"]["message"]
            assert not at.server.received

    run(main())


def test_a_worker_without_a_context_of_its_own_needs_one_in_the_request(tmp_path: Path) -> None:
    async def main() -> None:
        async with device(tmp_path) as at:
            at.contexts._default = None
            answer = await at.chat()
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "costeer.context")
            assert (await at.chat(costeer={"context": "I am Clara."})).status_code == 200

    run(main())


def test_other_routes_are_told_what_there_is(tmp_path: Path) -> None:
    async def main() -> None:
        async with device(tmp_path) as at:
            for method, path, status in (("POST", "/responses", 404), ("GET", "/completions", 405), ("GET", "/docs", 404),
                                         ("GET", "/../openapi.json", 404), ("POST", "/completions/", 404)):  # fmt: skip
                answer = await at.app.request(method, path, json={})
                assert answer.status_code == status
                assert "POST /v1/chat/completions" in answer.json()["error"]["message"]

    run(main())


def test_as_many_streams_at_a_time_as_the_worker_serves(tmp_path: Path) -> None:
    async def main() -> None:
        async with device(tmp_path, max_streams=3) as at:
            release = asyncio.Event()

            async def script(call: Call) -> None:
                await asyncio.wait_for(release.wait(), TIMEOUT_S)
                await call.answer(b"{}")

            at.server.script = script
            waiting = [asyncio.create_task(at.chat(costeer=False)), asyncio.create_task(at.chat(n=2))]
            while len(at.server.calls) < 2:
                await asyncio.sleep(0.01)
            answer = await at.chat()
            assert (answer.status_code, answer.json()["error"]["code"]) == (429, "busy")
            release.set()
            assert [(await task).status_code for task in waiting] == [200, 200]
            assert (await at.chat(n=3)).status_code == 200

    run(main())


def test_more_answers_than_there_are_places_are_never_given(tmp_path: Path) -> None:
    async def main() -> None:
        async with device(tmp_path, max_streams=3) as at:
            texts, ids = {"prompt": ["x", "y"], "n": 2}, {"prompt": [[1]] * 4}
            for path, fields in (("/chat/completions", {"n": 4}), ("/completions", texts), ("/completions", ids)):
                answer = await at.app.post(path, json={**BODY, **fields})
                error = answer.json()["error"]
                assert (answer.status_code, error["code"], error["param"]) == (400, "bad_parameter", "n")
                assert "n for every prompt makes 4 answers; this device gives at most 3" in error["message"]
            assert (await at.chat(n="2")).json()["error"]["param"] == "n"
            assert not at.server.received

    run(main())


# --- a server that fails ---


@pytest.mark.parametrize("is_streamed", [False, True])
def test_the_servers_errors_are_passed_on_as_they_are(tmp_path: Path, is_streamed: bool) -> None:
    async def main() -> None:
        async with device(tmp_path) as at:
            body = b'{"error":  {"message": "no"}}\n'
            for status in ("400 Bad Request", "401 Unauthorized", "404 Not Found", "429 Too Many Requests", "500 Oh", "503 Busy"):
                at.server.script = lambda call, status=status: call.answer(body, status, more="retry-after: 7\r\n")  # type: ignore[misc]
                answer = await at.chat(stream=is_streamed)
                assert answer.status_code == int(status[:3])
                assert answer.content == body
                assert answer.headers["retry-after"] == "7"

    run(main())


def test_a_server_that_cannot_be_reached(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]

    async def main() -> None:
        async with device(tmp_path, f"http://127.0.0.1:{port}/v1") as at:
            for answer in (await at.chat(), await at.chat(stream=True), await at.app.get("/models")):
                assert answer.status_code == 502
                error = answer.json()["error"]
                assert (error["type"], error["code"]) == ("server_error", "server_unreachable")
                assert f"http://127.0.0.1:{port}/v1" in error["message"]

    run(main())


async def _hangs(call: Call) -> None:
    await call.hung_up.wait()


async def _half(call: Call) -> None:
    await call.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{")
    call.reset()


async def _nonsense(call: Call) -> None:
    await call.send(b"SSH-2.0-nonsense\r\n\r\n")
    call.reset()


async def _redirects(call: Call) -> None:
    await call.answer(b"", "307 Temporary Redirect", more="location: http://127.0.0.1:1/v1\r\n")


async def _zipped(call: Call) -> None:
    await call.answer(b"no gzip", more="content-encoding: gzip\r\n")


async def _long(call: Call) -> None:
    await call.answer(b"x" * (64 * 2**20 + 1))


@pytest.mark.parametrize(
    ("script", "status", "code"),
    [
        (_hangs, 504, "server_timeout"),
        (_half, 502, "server_broke_off"),
        (_nonsense, 502, "server_broke_off"),
        (_redirects, 502, "server_redirects"),
        (_zipped, 502, "server_broke_off"),
        (_long, 502, "bad_answer"),
    ],
)
def test_a_server_that_fails(tmp_path: Path, script: Any, status: int, code: str) -> None:
    async def main() -> None:
        async with device(tmp_path, patience=replace(QUICK, answer_s=2.0)) as at:
            at.server.script = script
            answer = await at.chat()
            assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
            assert answer.json()["error"]["type"] == "server_error"
            assert len(at.server.calls) == 1, "a request is never sent twice"

    run(main())


@pytest.mark.parametrize("costeer", [{}, False])
def test_a_stream_that_breaks_off_ends_with_an_error_event(tmp_path: Path, costeer: Any) -> None:
    async def reset(call: Call) -> None:
        call.reset()

    async def end(call: Call) -> None:
        await call.chunk(b"")

    async def main() -> None:
        async with device(tmp_path, patience=replace(QUICK, answer_s=2.0)) as at:
            for how, code in ((reset, "server_broke_off"), (end, "server_broke_off"), (_hangs, "server_timeout")):

                async def script(call: Call, how: Any = how) -> None:
                    await call.start_events()
                    await call.chunk(sse(CHUNK)[0], b'data: {"half', pause_s=0.02)
                    await how(call)

                at.server.script = script
                answer = await at.chat(stream=True, costeer=costeer)
                assert answer.status_code == 200
                *chunks, error = [event for event in answer.content.split(b"\n\n") if event]
                assert json.loads(chunks[0][6:]) == CHUNK
                assert json.loads(error.removeprefix(b"data: "))["error"]["code"] == code
                assert b"[DONE]" not in answer.content

    run(main())


@pytest.mark.parametrize("costeer", [{}, False])
@pytest.mark.parametrize("is_streamed", [False, True])
def test_an_answer_that_the_server_gave_up_does_not_look_finished(tmp_path: Path, is_streamed: bool, costeer: Any) -> None:
    """vLLM on SIGTERM, or paused: 200, a short answer, its usage, and a reason that no client of OpenAI's knows."""
    choices = [{"index": 0, "finish_reason": "stop"}, {"index": 1, "finish_reason": "abort"}]

    async def script(call: Call) -> None:
        if is_streamed:
            await call.start_events()
            await call.chunk(*sse(CHUNK, {**CHUNK, "choices": choices}, "[DONE]"), b"")
        else:
            await call.answer(json.dumps({**CHUNK, "choices": choices}).encode())

    async def main() -> None:
        async with device(tmp_path) as at:
            at.server.script = script
            answer = await at.chat(stream=is_streamed, costeer=costeer)
            assert answer.status_code == (200 if is_streamed else 502)
            *chunks, error = [event.removeprefix(b"data: ") for event in answer.content.split(b"\n\n") if event]
            assert [json.loads(chunk) for chunk in chunks] == ([CHUNK] if is_streamed else [])
            assert json.loads(error)["error"]["code"] == "server_broke_off"

    run(main())


@pytest.mark.parametrize("said", ['the "abort" key', '{"choices": [{"finish_reason": "abort"}]}'])
def test_an_answer_may_speak_of_an_abort(tmp_path: Path, said: str) -> None:
    body = json.dumps({"choices": [{"finish_reason": "stop", "message": {"content": said}}], "x": ["abort"]}).encode()

    async def main() -> None:
        async with device(tmp_path) as at:
            at.server.script = lambda call: call.answer(body)  # type: ignore[misc]
            assert (await at.chat(costeer=False)).content == body

    run(main())


def test_a_stream_that_breaks_off_behind_its_end_is_whole(tmp_path: Path) -> None:
    async def main() -> None:
        async with device(tmp_path, patience=replace(QUICK, answer_s=2.0)) as at:

            async def script(call: Call) -> None:
                at.steers(ref_of(call), steered=1)
                await call.start_events()
                await call.chunk(*sse(CHUNK, "[DONE]"))
                await call.hung_up.wait()

            at.server.script = script
            events = events_of((await at.chat(stream=True)).content)
            assert [event if isinstance(event, str) else sorted(event) for event in events] == [
                sorted(CHUNK), sorted([*CHUNK, "costeer"]), "[DONE]"
            ]  # fmt: skip

    run(main())


@pytest.mark.parametrize("is_silent", [False, True])
def test_behind_its_end_a_stream_is_not_waited_for_long(tmp_path: Path, is_silent: bool) -> None:
    async def main() -> None:
        async with device(tmp_path, patience=replace(QUICK, end_s=0.5)) as at:

            async def script(call: Call) -> None:
                at.steers(ref_of(call), steered=1)
                await call.start_events()
                await call.chunk(*sse(CHUNK, "[DONE]"))
                while not (is_silent or call.hung_up.is_set()):
                    await call.chunk(b": wait\n\n", pause_s=0.01)
                await call.hung_up.wait()

            at.server.script = script
            start = time.monotonic()
            answer = await at.chat(stream=True)
            assert 0.4 < time.monotonic() - start < 5
            assert events_of(answer.content)[-1] == "[DONE]"
            assert (b": wait\n\n" in answer.content) is not is_silent
            await asyncio.wait_for(at.server.calls[0].hung_up.wait(), TIMEOUT_S)

    run(main())


def test_headers_that_are_not_ascii_are_left_out(tmp_path: Path) -> None:
    async def main() -> None:
        async with device(tmp_path) as at:
            at.server.script = lambda call: call.answer(b"{}", more="x-request-id: \u65e5\r\nretry-after: 1\r\n")
            headers = {
                "x-request-id": "\xe9".encode(),
                "authorization": "Bearer \xe9".encode(),
                "content-type": b"application/json",
            }
            answer = await at.app.post("/completions", content=b"{}", headers=headers)  # type: ignore[arg-type]
            assert (answer.status_code, answer.headers["retry-after"]) == (200, "1")
            assert "x-request-id" not in answer.headers
            assert "authorization" not in at.server.calls[0].headers

    run(main())


def test_error_events_in_the_middle_are_the_servers_own(tmp_path: Path) -> None:
    events = sse(CHUNK, {"error": {"message": "oh", "code": 500}}, "[DONE]")

    async def main() -> None:
        async with device(tmp_path) as at:

            async def script(call: Call) -> None:
                at.steers(ref_of(call), steered=1)
                await call.start_events()
                await call.chunk(*events, b"")

            at.server.script = script
            answer = await at.chat(stream=True)
            assert answer.content.startswith(events[0] + events[1])
            assert answer.content.endswith(events[2])

    run(main())


# --- an app that goes away ---


@pytest.mark.parametrize("is_started", [False, True])
def test_an_app_that_hangs_up_hangs_up_on_the_server(tmp_path: Path, is_started: bool) -> None:
    async def main() -> None:
        async with device(tmp_path) as at:

            async def script(call: Call) -> None:
                if is_started:
                    await call.start_events()
                    await call.chunk(*sse(CHUNK))
                await asyncio.wait_for(call.hung_up.wait(), TIMEOUT_S)

            at.server.script = script
            reader, writer = await asyncio.open_connection("127.0.0.1", at.app.base_url.port)
            body = json.dumps({**BODY, "stream": is_started}).encode()
            writer.write(post(body))
            while not at.server.calls:
                await asyncio.sleep(0.01)
            if is_started:
                await reader.readuntil(b"\n\n")
            assert at.gateway._device.num_taken == 1
            assert len(at.contexts._registered) == 1
            writer.close()
            await asyncio.wait_for(at.server.calls[0].hung_up.wait(), TIMEOUT_S)
            while at.gateway._device.num_taken:
                await asyncio.sleep(0.01)
            assert not at.contexts._registered

    run(main())


@pytest.mark.parametrize("is_streamed", [False, True])
def test_an_app_that_reads_slowly_gets_it_all(tmp_path: Path, is_streamed: bool, caplog: pytest.LogCaptureFixture) -> None:
    """It takes longer than the gateway waits for each of the parts."""
    text = json.dumps("x" * (12 * 2**20)).encode()

    async def main() -> None:
        async with device(tmp_path, patience=replace(QUICK, client_s=1.0)) as at:

            async def script(call: Call) -> None:
                if not is_streamed:
                    return await call.answer(text)
                await call.start_events()
                return await call.chunk(b"data: " + text + b"\n\n", *sse("[DONE]"), b"")

            at.server.script = script
            loop, start, received = asyncio.get_running_loop(), time.monotonic(), bytearray()
            with socket.socket() as app:
                app.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
                app.setblocking(False)
                await loop.sock_connect(app, ("127.0.0.1", at.app.base_url.port))
                await loop.sock_sendall(app, post(b'{"costeer": false}').replace(b"\r\n", b"\r\nconnection: close\r\n", 1))
                while part := await asyncio.wait_for(loop.sock_recv(app, 2**16), TIMEOUT_S):
                    received += part
                    await asyncio.sleep(0.01)
            assert time.monotonic() - start > 1.5
            assert received.count(b"x") >= 12 * 2**20
            assert received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n" if is_streamed else b'x"')

    run(main())
    assert "without completing response" not in caplog.text


def test_a_cancellation_is_never_lost_in_a_send() -> None:
    """Whenever it comes: else an answer would go on without its app."""

    async def send(message: Any) -> None:
        await asyncio.sleep(0)

    async def answer() -> None:
        reply = completions.Reply(send, TIMEOUT_S)
        for _ in range(100):
            await reply.send(b"x")

    async def main() -> None:
        for turns in range(20):
            task = asyncio.create_task(answer())
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled()

    run(main())


def test_an_app_that_reads_nothing_is_given_up(tmp_path: Path) -> None:
    async def main() -> None:
        async with device(tmp_path, patience=replace(QUICK, client_s=0.3)) as at:

            async def script(call: Call) -> None:
                await call.start_events()
                while not call.hung_up.is_set():
                    await asyncio.wait_for(call.chunk(sse("x" * 100_000)[0]), TIMEOUT_S)

            at.server.script = script
            _, writer = await asyncio.open_connection("127.0.0.1", at.app.base_url.port, limit=1)
            writer.write(post(b"{}"))
            while not at.server.calls:
                await asyncio.sleep(0.01)
            await asyncio.wait_for(at.server.calls[0].hung_up.wait(), TIMEOUT_S)
            writer.close()

    run(main())


def test_the_end_of_the_worker_ends_what_is_under_way(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with device(tmp_path) as at:
            at.server.script = _hangs
            waiting = asyncio.create_task(at.chat())
            while not at.server.calls:
                await asyncio.sleep(0.01)
        with pytest.raises((httpx.HTTPError, RuntimeError)):
            await waiting

    run(main())
    assert not [record for record in caplog.records if record.exc_info]


def test_a_bug_is_told_by_its_place_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(*args: Any) -> Any:
        raise RuntimeError("Wilhelmina")

    monkeypatch.setattr(completions, "parse_ask", failing)

    async def main() -> None:
        async with device(tmp_path) as at:
            answer = await at.chat()
            assert (answer.status_code, answer.json()["error"]["code"]) == (500, "gateway_failed")

    with caplog.at_level(logging.DEBUG):
        run(main())
    assert any("the gateway fails: RuntimeError at test_gateway.py" in message for message in caplog.messages)
    assert "Wilhelmina" not in caplog.text


def test_nothing_of_a_request_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with device(tmp_path, key="open-sesame", server_key="server-sesame") as at:
            for costeer in ({"context": "I am Clara Quagmire."}, {"context": ["Quagmire"]}, {"Quagmire": 1}, False):
                await at.app.post("/chat/completions", json={**BODY, "costeer": costeer, "user": "Quagmire"},
                                  headers={"authorization": "Bearer open-sesame"})  # fmt: skip
            headers = {"authorization": "Bearer open-sesame", "content-type": "application/json"}
            bad = await at.app.post("/chat/completions?q=Quagmire", content=b'{"Quagmire": \xff}', headers=headers)
            assert bad.status_code == 400
            assert (await at.app.post("/chat/completions", json={**BODY, "user": "Quagmire"})).status_code == 401

    with caplog.at_level(logging.DEBUG):
        run(main())
    assert "gateway ready" in caplog.text
    assert "Quagmire" not in caplog.text.replace("?q=Quagmire", "", 1)  # which this test's own client logs
    assert "sesame" not in caplog.text


@pytest.mark.parametrize("its_stream", ["is lost", "has ended", "never began"])
@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_server_that_is_ending_and_says_nothing_more_is_not_waited_for(
    tmp_path: Path, is_streamed: bool, its_stream: str
) -> None:
    async def main() -> None:
        quick = replace(QUICK, silence_s=0.2, answer_s=20.0)
        async with device(tmp_path, patience=quick) as at:

            async def falls_silent(call: Call) -> None:
                if is_streamed:
                    await call.start_events()
                    await call.chunk(b'data: {"id": "x", "choices": []}\n\n')
                at.server._server.close()  # takes no connections any more; those that are open stay
                if its_stream != "never began":
                    at.steers(ref_of(call), end=its_stream == "has ended")
                if its_stream == "is lost":
                    at.accounts.received(End(f"{ref_of(call)}.0", "engine_gone", "the engine's connection is gone"), 10)
                await call.hung_up.wait()

            at.server.script = falls_silent
            answer = await asyncio.wait_for(at.chat(stream=is_streamed), 10)
            assert "server_broke_off" in answer.text
            assert answer.status_code == (200 if is_streamed else 502)

    run(main())


def test_an_answer_that_outlasts_the_worker_is_told_so(tmp_path: Path) -> None:
    """At the end of the process answers get two seconds; then apps are told, in OpenAI's format."""

    async def never(call: Call) -> None:
        if call.json.get("stream"):
            await call.start_events()
            await call.chunk(*sse(CHUNK))
        await call.hung_up.wait()

    async def main() -> None:
        async with device(tmp_path) as at:
            at.server.script = never
            asked = [asyncio.create_task(at.chat(stream=is_streamed)) for is_streamed in (False, True)]
            while len(at.server.calls) < 2:
                await asyncio.sleep(0.01)
            at.serving.cancel()
            whole, streamed = await asyncio.gather(*asked)
            assert (whole.status_code, whole.json()["error"]["code"]) == (503, "worker_stops")
            last = events_of(streamed.content)[-1]
            assert not isinstance(last, str)
            assert last["error"]["code"] == "worker_stops"

    run(main())


def test_behind_its_end_an_answer_gets_no_error(tmp_path: Path) -> None:
    """The worker ends while the server has not closed the stream that it has ended."""

    async def lingers(call: Call) -> None:
        await call.start_events()
        await call.chunk(*sse(CHUNK, "[DONE]"))
        await call.hung_up.wait()

    async def main() -> None:
        async with device(tmp_path, patience=replace(QUICK, end_s=30.0, counts_s=0.1)) as at:
            at.server.script = lingers
            asked = asyncio.create_task(at.chat(stream=True))
            while not at.server.calls:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.5)  # for the events to come through
            at.serving.cancel()
            assert events_of((await asked).content)[-1] == "[DONE]"

    run(main())
