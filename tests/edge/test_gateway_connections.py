"""Connections of apps that send no request, or nothing that is one; and too many of them."""

import asyncio
import json
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from costeer_vllm.edge import gateway

from .device import QUICK, Device, device
from .hub import TIMEOUT_S, run
from .test_gateway import post
from .upstream import Call

HEALTH = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n"
CHUNKED = post(b"").replace(b"content-length: 0", b"transfer-encoding: chunked")
REFUSED = CHUNKED.replace(b"application/json", b"text/plain")


async def connect(at: Device) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", at.app.base_url.port)


async def all_of(reader: asyncio.StreamReader) -> bytes:
    """Everything until the gateway closes the connection, in whatever way."""
    received = bytearray()
    try:
        while part := await asyncio.wait_for(reader.read(2**16), TIMEOUT_S):
            received += part
    except ConnectionError:
        pass
    return bytes(received)


@pytest.mark.parametrize(
    ("request_before", "sent", "goes_on_with"),
    [(b"", b"", b""), (b"", HEALTH[:7], b""), (b"", HEALTH[:-2], b"x"), (HEALTH, HEALTH[:7], b""), (HEALTH, HEALTH[:-2], b"x"),
     (REFUSED, b"", b"1\r\nx\r\n")],
    ids=["nothing", "half a line", "a long head", "half a second line", "a long second head", "a body that nobody wants"],
)  # fmt: skip
def test_a_head_that_does_not_arrive_is_not_waited_for(
    tmp_path: Path, request_before: bytes, sent: bytes, goes_on_with: bytes
) -> None:
    async def trickle(writer: asyncio.StreamWriter) -> None:
        while True:
            writer.write(goes_on_with)
            await asyncio.sleep(0.05)

    async def main() -> None:
        async with device(tmp_path, patience=replace(QUICK, client_s=0.4)) as at:
            reader, writer = await connect(at)
            if request_before:
                writer.write(request_before)
                await reader.readuntil(b"}")
            writer.write(sent)
            start = time.monotonic()
            more = asyncio.create_task(trickle(writer))
            await all_of(reader)
            assert 0.2 < time.monotonic() - start < 3, "uvicorn's own timeout is 5 s"
            more.cancel()
            writer.close()

    run(main())


def test_a_connection_is_kept_while_its_request_is_answered_and_for_the_next_ones(tmp_path: Path) -> None:
    async def main() -> None:
        async with device(tmp_path, patience=replace(QUICK, client_s=0.3)) as at:

            async def script(call: Call) -> None:
                await asyncio.sleep(0.5)
                await call.answer(b"{}")

            at.server.script = script
            reader, writer = await connect(at)
            for pause_s in (0.0, 0.5):
                await asyncio.sleep(pause_s)
                request = post(b"{}")
                for part in (request[:9], request[9:]):
                    writer.write(part)
                    await asyncio.sleep(0.05)
                head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), TIMEOUT_S)
                assert b" 200 " in head
                length = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
                await reader.readexactly(length)
            writer.close()

    run(main())


@pytest.mark.parametrize(
    "sent",
    [b"NONSENSE\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"x" * 2**17, HEALTH.replace(b"host", b"ho st"), CHUNKED + b"oh\r\n"],
    ids=["no HTTP", "no Host", "no end", "no header", "no chunk"],
)
def test_what_is_no_request_is_told_so(tmp_path: Path, sent: bytes) -> None:
    async def main() -> None:
        async with device(tmp_path) as at:
            reader, writer = await connect(at)
            writer.write(sent)
            head, _, body = (await all_of(reader)).partition(b"\r\n\r\n")
            assert b" 400 " in head
            assert b"content-type: application/json" in head
            assert json.loads(body)["error"]["code"] == "bad_request"
            writer.close()
            assert not at.server.received

    run(main())


def test_nonsense_behind_an_answer_is_not_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with device(tmp_path) as at:
            reader, writer = await connect(at)
            writer.write(REFUSED)
            answer = await reader.readuntil(b"}}")
            writer.write(b"Wilhelmina\r\n")
            assert b" 415 " in answer + await all_of(reader)
            writer.close()

    with caplog.at_level(logging.DEBUG):
        run(main())
    assert "Wilhelmina" not in caplog.text
    assert not [record for record in caplog.records if record.exc_info]


def test_beyond_so_many_connections_requests_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "SPARE_CONNECTIONS", 1)

    async def ask(at: Device) -> Any:
        reader, writer = await connect(at)
        writer.write(HEALTH.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"))
        head, _, body = (await all_of(reader)).partition(b"\r\n\r\n")
        writer.close()
        return int(head.split()[1]), json.loads(body)

    async def main() -> None:
        async with device(tmp_path, max_streams=1) as at:
            silent = [await connect(at) for _ in range(2)]
            status, body = await ask(at)
            assert (status, body["error"]["code"]) == (429, "busy")
            assert "more than 2 open connections" in body["error"]["message"]
            for _, writer in silent:
                writer.close()
            while (await ask(at))[0] != 200:
                await asyncio.sleep(0.01)

    run(main())
