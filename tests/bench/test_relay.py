"""The relay keeps every byte and their order, delays them, and passes ends on."""

import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from costeer_vllm.bench.relay import relay

ROUND_TRIP_MS = 60
TIMEOUT_S = 30.0


def echo(connection: socket.socket) -> None:
    """Everything back, until the other end has said all."""
    with connection:
        while data := connection.recv(65536):
            connection.sendall(data)


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[socket.socket], None]], str]]:
    """Start a server of one behavior; its address."""
    listeners = []

    def start(behave: Callable[[socket.socket], None]) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def accept() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:  # closed below
                    return
                threading.Thread(target=behave, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        return f"127.0.0.1:{listener.getsockname()[1]}"

    yield start
    for listener in listeners:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def connect(address: str) -> socket.socket:
    host, port = address.split(":")
    return socket.create_connection((host, int(port)), timeout=TIMEOUT_S)


def received(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size and (more := connection.recv(65536)):
        data += more
    return data


def test_bytes_and_their_order_are_kept(serve: Callable[[Callable[[socket.socket], None]], str], tmp_path: Path) -> None:
    sent = random.Random(0).randbytes(3_000_000)
    with relay(serve(echo), ROUND_TRIP_MS, tmp_path) as address, connect(address) as connection:
        writer = threading.Thread(target=connection.sendall, args=(sent,))
        writer.start()
        assert received(connection, len(sent)) == sent
        writer.join(TIMEOUT_S)


def test_a_round_trip_takes_no_less_than_was_asked_for(
    serve: Callable[[Callable[[socket.socket], None]], str], tmp_path: Path
) -> None:
    with relay(serve(echo), ROUND_TRIP_MS, tmp_path) as address, connect(address) as connection:
        for message in (b"one", b"two"):
            start = time.perf_counter()
            connection.sendall(message)
            assert received(connection, 3) == message
            assert time.perf_counter() - start >= ROUND_TRIP_MS / 1000


def test_an_end_is_passed_on_in_each_direction(serve: Callable[[Callable[[socket.socket], None]], str], tmp_path: Path) -> None:
    with relay(serve(echo), ROUND_TRIP_MS, tmp_path) as address, connect(address) as connection:
        connection.sendall(b"last words")
        connection.shutdown(socket.SHUT_WR)  # upon which the echo ends, after it has said everything
        assert received(connection, 100) == b"last words"


def test_a_connection_that_is_refused_ends(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
    with relay(address, ROUND_TRIP_MS, tmp_path) as way, connect(way) as connection:
        assert received(connection, 1) == b""


def test_connections_do_not_wait_for_one_another(serve: Callable[[Callable[[socket.socket], None]], str], tmp_path: Path) -> None:
    with relay(serve(echo), ROUND_TRIP_MS, tmp_path) as address, connect(address) as silent, connect(address) as other:
        other.sendall(b"hello")
        assert received(other, 5) == b"hello"
        silent.sendall(b"me too")
        assert received(silent, 6) == b"me too"
