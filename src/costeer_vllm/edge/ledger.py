"""The ledger: one line per stream of what it told and sent, in a file on the device. No text, no token, no name of a context.

The file is JSONL, readable by its owner alone. Beyond MAX_BYTES it becomes ``FILE.1`` and a new one is begun.
"""

import logging
import os
from collections.abc import Iterable
from pathlib import Path

import msgspec

from costeer_vllm.edge.answers import UNREADABLE
from costeer_vllm.edge.traces import Trace
from costeer_vllm.errors import InvalidParameter
from costeer_vllm.protocol.messages import Fusion

MAX_BYTES = 4 * 2**20
MAX_SHOWN = 20_000  # entries kept in memory

log = logging.getLogger("costeer.edge")


class Entry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One stream."""

    time: float  # of its end, seconds since the epoch
    worker: str
    request: str
    fusion: Fusion
    strength: float
    tokens: int
    bytes_up: int
    bytes_down: int
    bits: float | None = None  # told; None in cloud fusion, where nobody on the device can know
    max_bits: float | None = None  # budget of the whole request


def entry_of(trace: Trace, worker: str) -> Entry:
    """What the ledger says of a stream."""
    return Entry(
        time=trace.ended or trace.began,
        worker=worker,
        request=trace.request,
        fusion=trace.fusion,
        strength=trace.strength,
        tokens=max(trace.num_tokens, trace.num_before + len(trace.tokens)),
        bytes_up=trace.bytes_up,
        bytes_down=trace.bytes_down,
        bits=trace.bits,
        max_bits=trace.max_bits,
    )


class Ledger:
    """The file, as the worker writes it. A file that cannot be written is told once, and steering goes on."""

    def __init__(self, path: Path, worker: str) -> None:
        """Raises InvalidParameter if the file cannot be opened for writing."""
        self._path, self._worker, self._has_failed = path, worker, False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._append(b"")
            self._mend()
        except OSError as error:
            raise InvalidParameter(
                "ledger", str(path), f"a file that can be written ({error.strerror}), or --no-ledger"
            ) from None
        self.entries = read(path)[-MAX_SHOWN:]  # for the page: the file's

    def add(self, trace: Trace) -> None:
        """A line for a stream that has ended."""
        entry = entry_of(trace, self._worker)
        self.entries = [*self.entries[1 - MAX_SHOWN :], entry]
        try:
            self._append(msgspec.json.encode(entry) + b"\n")
        except OSError as error:
            if not self._has_failed:
                log.error("the ledger %s cannot be written: %s", self._path, error.strerror)
            self._has_failed = True

    def _mend(self) -> None:
        """After a crash in the middle of a line the next one shall not be lost with it."""
        content = self._path.read_bytes() if self._path.exists() else b""  # there is none after a rotation
        if content and not content.endswith(b"\n"):
            self._append(b"\n")

    def _append(self, line: bytes) -> None:
        file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.write(file, line)
            if os.fstat(file).st_size > MAX_BYTES:
                os.replace(self._path, f"{self._path}.1")
        finally:
            os.close(file)


def default_path() -> Path:
    """Where the ledger is unless it is said otherwise: the XDG state folder of the user."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "costeer" / "ledger.jsonl"


def read(path: Path) -> list[Entry]:
    """The entries, oldest first; lines that are none are skipped.

    Raises:
        InvalidParameter: if there is no such file.
    """
    decode = msgspec.json.Decoder(Entry).decode
    entries = []
    for line in _lines(path):
        try:
            entries.append(decode(line))
        except UNREADABLE:  # torn by a crash
            continue
    return entries


def _lines(path: Path) -> Iterable[bytes]:
    former = Path(f"{path}.1")
    try:
        older = former.read_bytes().splitlines() if former.exists() else []
        return older if older and not path.exists() else [*older, *path.read_bytes().splitlines()]  # none after a rotation
    except OSError as error:
        allowed = f"the ledger of an edge worker on this device ({error.strerror})"
        raise InvalidParameter("ledger", str(path), allowed) from None
