"""What the scheduler and the processor of one engine tell each other: a table in shared memory, a row per steered request.

vLLM's scheduler may live in another process than the logits processor, and the two meet in no call of vLLM's. Each field has one
writer and eight bytes. A reader that sees a row half written takes a request for asked or answered a step too early or too late,
which costs time and never a wrong token.

    scheduler -> processor   live        the ticket, from the request's arrival until its end
    processor -> scheduler   ticket      whose row the other fields speak of
                             position    that the fields speak of: tokens generated before it
                             state       of that position: see State
                             asked_at    when its question was sent; seconds, monotonic, the same clock in all processes
                             answer_s    how long an answer is expected to take at the most; 0: nothing is known
                             taken_back  the position whose token the processor asks the scheduler to drop; -1: none
                             sentence    why the request must fail
"""

import enum
import mmap
import os
import secrets
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from costeer_vllm.engine import settings
from costeer_vllm.errors import Unsupported

ROWS = 2**14  # steered requests at a time in one engine, waiting ones included; those beyond fail
SENTENCE_BYTES = 384
_HEADER = 64  # bytes; the first eight are the processor's step_s
_ROW = np.dtype(
    [
        ("live", "<u8"),
        ("ticket", "<u8"),
        ("position", "<i8"),
        ("state", "<i8"),
        ("asked_at", "<f8"),
        ("answer_s", "<f8"),
        ("taken_back", "<i8"),
        ("sentence", f"S{SENTENCE_BYTES}"),
    ]
)


class State(enum.IntEnum):
    """Of a position."""

    UNASKED = 0
    ASKED = 1
    SETTLED = 2  # its answer is there, or is not worth another wait
    FAILED = 3  # the request must end with an error


class Board:
    """One table. The processor writes rows, the scheduler hands out tickets."""

    def __init__(self, path: Path, reserve: bool = False) -> None:
        """Open the table at ``path``, or make it; the memory lasts for as long as somebody has it open.

        ``reserve``: take all of it now. A page that cannot be had later ends the process by a signal (SIGBUS).

        Raises:
            Unsupported: if there is not so much.
        """
        size = _HEADER + ROWS * _ROW.itemsize
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
        try:
            os.ftruncate(descriptor, size)
            if reserve and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, size)
            memory = mmap.mmap(descriptor, size)
        except OSError as error:
            sentence = f"costeer: {path.parent} has no room for {size} bytes ({error.strerror}); for /dev/shm see --shm-size"
            raise Unsupported(sentence) from None
        finally:
            os.close(descriptor)
        self.rows = np.frombuffer(memory, _ROW, ROWS, _HEADER)
        self._header = np.frombuffer(memory, "<f8", 1)

    @property
    def step_s(self) -> float:
        """How long a step of the engine takes, as the processor measures it; seconds, 0 before the first."""
        return float(self._header[0])

    @step_s.setter
    def step_s(self, seconds: float) -> None:
        self._header[0] = seconds

    def is_live(self, ticket: int) -> bool:
        """Whether the scheduler still has the request, be it in a batch or not."""
        return bool(self.rows["live"][ticket % ROWS] == ticket)

    def write(self, ticket: int, position: int, state: State, asked_at: float = 0.0, answer_s: float = 0.0) -> None:
        """What is known of the position that a request stands at."""
        row = self.rows[ticket % ROWS]
        self._occupy(row, ticket)
        row["state"] = State.UNASKED  # until the rest is written
        row["position"], row["asked_at"], row["answer_s"] = position, asked_at, answer_s
        row["state"] = state

    def fail(self, ticket: int, sentence: str) -> None:
        """The request must end with an error that says ``sentence``."""
        row = self.rows[ticket % ROWS]
        self._occupy(row, ticket)
        row["sentence"] = sentence.encode(errors="replace")[:SENTENCE_BYTES]
        row["state"] = State.FAILED

    def take_back(self, ticket: int, position: int) -> None:
        """The token at ``position`` was chosen without its answer and shall not count; -1: the newest token counts."""
        row = self.rows[ticket % ROWS]
        self._occupy(row, ticket)
        row["taken_back"] = position

    def _occupy(self, row: np.void, ticket: int) -> None:
        """A new occupant's row speaks of it only when nothing of the former one's is left in it."""
        if row["ticket"] != ticket:
            row["state"], row["taken_back"] = State.UNASKED, -1
            row["ticket"] = ticket


class Tickets:
    """The scheduler's half: numbers that are never used twice, each of which is a row of the board for a while."""

    def __init__(self, board: Board) -> None:
        self._live = board.rows["live"]
        self._free = list(reversed(range(ROWS)))
        self._issued = 0

    def issue(self) -> int | None:
        """A live ticket; None if there is no row left."""
        if not self._free:
            return None
        self._issued += 1
        ticket = self._issued * ROWS + self._free.pop()
        self._live[ticket % ROWS] = ticket
        return ticket

    def withdraw(self, ticket: int) -> None:
        """The request is over."""
        self._live[ticket % ROWS] = 0
        self._free.append(ticket % ROWS)


def open_board(vllm_config: Any, reserve: bool = False) -> Board | None:
    """The board of an engine, for its processor and its scheduler alike; None if the server was not started with us."""
    path = settings.board()
    return None if path is None else Board(_path(path, vllm_config), reserve)


def remove_board(vllm_config: Any) -> None:
    """Take the board's name from the file system: all who need it have it open."""
    if (path := settings.board()) is not None:
        _path(path, vllm_config).unlink(missing_ok=True)


def _path(path: Path, vllm_config: Any) -> Path:
    # data_parallel_rank is 0 in every engine of a dense model.
    rank = getattr(getattr(vllm_config, "parallel_config", None), "data_parallel_index", 0)
    return path.with_name(f"{path.name}-{rank}")


def new_path() -> Path:
    """Where the processes of a server that is about to start shall have their boards; each engine adds its rank."""
    shared = Path("/dev/shm")
    folder = shared if shared.is_dir() and os.access(shared, os.W_OK) else Path(tempfile.gettempdir())
    return folder / f"costeer-{secrets.token_hex(8)}"
