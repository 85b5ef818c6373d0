"""The load that the hub alone is put under: every question is answered, through a real hub, and what is not is told."""

import asyncio
import struct
from pathlib import Path

import pytest

from costeer_vllm.bench.hub import BINARY, PING, PONG, Broken, LightEdge, Window, cpu_s, main, measure
from costeer_vllm.protocol.messages import Advance, Attach, Delta, decode_edge_to_hub, encode


def test_nothing_is_lost_on_the_way_through_a_real_hub() -> None:
    windows: list[Window] = []
    dropped = measure(edges=20, rate=200.0, seconds=0.5, repetitions=2, each=windows.append)
    assert dropped == {}
    assert len(windows) == 2
    for window in windows:
        assert window.lost == 0
        assert window.asked > 20
        assert 0 < window.p50_ms <= window.p99_ms <= window.max_ms


def test_the_same_as_a_script(tmp_path: Path) -> None:
    found = tmp_path / "hub.json"
    main(["--edges", "3", "--rate", "100", "--seconds", "0.2", "--repetitions", "1", "--json", str(found)])
    assert '"lost": 0' in found.read_text()


class Sink(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += bytes(data)

    def frames(self) -> list[tuple[int, bytes]]:
        """Opcodes and payloads of the masked frames after the handshake, by RFC 6455, section 5.2."""
        rest, found = self.written.partition(b"\r\n\r\n")[2], []
        while rest:
            opcode, length, begin = rest[0] & 15, rest[1] & 127, 2
            assert rest[0] & 128
            assert rest[1] & 128
            if length == 126:
                (length,), begin = struct.unpack("!H", rest[2:4]), 4
            mask, payload = rest[begin : begin + 4], rest[begin + 4 : begin + 4 + length]
            assert len(payload) == length
            found.append((opcode, bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))))
            rest = rest[begin + 4 + length :]
        return found


def edge(*received: bytes) -> Sink:
    """What an edge worker's end writes when it has received this."""

    async def run() -> Sink:
        sink, end = Sink(), LightEdge("edge-0", "hub:1", lambda worker: None)
        end.connection_made(sink)
        for data in received:
            end.data_received(data)
        return sink

    return asyncio.run(run())


UPGRADED = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n"


def frame(payload: bytes, opcode: int = BINARY) -> bytes:
    length = bytes([len(payload)]) if len(payload) < 126 else b"\x7e" + struct.pack("!H", len(payload))
    return bytes([128 | opcode]) + length + payload


def test_it_attaches_and_answers_each_question_and_each_ping() -> None:
    asked = frame(encode(Advance("s", 7, 2**63, [1])))
    (_, attach), *answers = edge(UPGRADED + asked, frame(b"beat", PING)).frames()
    assert isinstance(decode_edge_to_hub(attach), Attach)
    assert [opcode for opcode, _ in answers] == [BINARY, PONG]
    delta = decode_edge_to_hub(answers[0][1])
    assert isinstance(delta, Delta)
    assert (delta.stream, delta.position, delta.prefix_hash, len(delta.payload)) == ("s", 7, 2**63, 400)
    assert answers[1][1] == b"beat"


def test_frames_may_come_in_any_pieces() -> None:
    data = UPGRADED + 2 * frame(encode(Advance("s" * 150, 7, 0, [1])))
    whole = edge(data).frames()
    assert len(whole) == 3
    assert edge(*(data[i : i + 1] for i in range(len(data)))).frames() == whole


def test_a_hub_that_takes_no_websocket_is_told() -> None:
    with pytest.raises(Broken, match="403"):
        edge(b"HTTP/1.1 403 Forbidden\r\n\r\n")


def test_a_process_that_is_gone_has_used_nothing() -> None:
    assert cpu_s(2**30) == 0.0
