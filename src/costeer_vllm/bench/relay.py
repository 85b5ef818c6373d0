"""A longer way between two machines that are one: a TCP relay that passes every byte on after a fixed time.

    python -m costeer_vllm.bench.relay --to 127.0.0.1:8770 --delay-ms 25     says where it listens, and ends with its parent

Half a round trip in each direction; bytes and their order are kept, the bandwidth is not limited, and what is on the way is
bounded: beyond that the sender is not read from. Timers of an event loop make a byte up to 1 ms late.
"""

import argparse
import asyncio
import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from costeer_vllm.processes import running, wait_until

READ_BYTES = 2**16
MAX_CHUNKS = 1024  # on the way in one direction of one connection: 64 MiB at the most
START_TIMEOUT_S = 30.0
READY = re.compile(r"relay ready at (\S+)")


@contextlib.contextmanager
def relay(to: str, round_trip_ms: float, folder: Path) -> Iterator[str]:
    """A relay to ``host:port`` in a process of its own; yields its own ``host:port``. Logs to ``folder``.

    Raises:
        StartFailed: with the end of the log.
    """
    command = [sys.executable, "-m", "costeer_vllm.bench.relay", "--to", to, "--delay-ms", str(round_trip_ms / 2)]
    with running(command, folder / f"relay-{round_trip_ms:g}.log", {}) as process:
        wait_until(lambda: READY.search(process.log_text), process, START_TIMEOUT_S)
        yield READY.findall(process.log_text)[0]


class Relay:
    """Serves connections to one address."""

    def __init__(self, host: str, port: int, delay_s: float) -> None:
        self._host, self._port, self._delay_s = host, port, delay_s

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection to its end; an error on one side ends both."""
        try:
            far_reader, far_writer = await asyncio.open_connection(self._host, self._port)
        except OSError:
            writer.close()
            return
        tasks = [*self._direction(reader, far_writer), *self._direction(far_reader, writer)]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for end in (writer, far_writer):
                end.close()

    def _direction(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> "list[asyncio.Task[None]]":
        chunks: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(MAX_CHUNKS)
        return [asyncio.create_task(self._take(reader, chunks)), asyncio.create_task(_give(chunks, writer))]

    async def _take(self, reader: asyncio.StreamReader, chunks: "asyncio.Queue[tuple[float, bytes]]") -> None:
        loop = asyncio.get_running_loop()
        data = b"begin"
        while data:
            data = await reader.read(READ_BYTES)  # empty: the end, which is passed on in its turn
            await chunks.put((loop.time() + self._delay_s, data))


async def _give(chunks: "asyncio.Queue[tuple[float, bytes]]", writer: asyncio.StreamWriter) -> None:
    loop = asyncio.get_running_loop()
    while True:
        due, data = await chunks.get()
        if (early := due - loop.time()) > 0:
            await asyncio.sleep(early)
        if not data:
            writer.write_eof()
            return
        writer.write(data)
        await writer.drain()


async def serve(to: str, delay_s: float) -> None:
    """Listen on a free port of loopback, say which, and serve until cancelled."""
    host, _, port = to.rpartition(":")
    server = await asyncio.start_server(Relay(host, int(port), delay_s).serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    print(f"relay ready at {host}:{port}", flush=True)
    async with server:
        await server.serve_forever()


def main() -> None:
    """The process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", required=True, metavar="HOST:PORT")
    parser.add_argument("--delay-ms", type=float, required=True, help="in each direction")
    options = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(options.to, options.delay_ms / 1000))


if __name__ == "__main__":
    main()
