"""The board, by which the scheduler's process and the worker's know of each other."""

import errno
import multiprocessing
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from vllm.config import ParallelConfig

from costeer_vllm.engine import settings
from costeer_vllm.engine.board import ROWS, SENTENCE_BYTES, Board, State, Tickets, new_path, open_board, remove_board
from costeer_vllm.errors import Unsupported


@pytest.fixture
def board(tmp_path: Path) -> Board:
    return Board(tmp_path / "board")


def _write(path: Path, ticket: int) -> None:
    there = Board(path)
    there.write(ticket, 7, State.ASKED, 1.5, 0.25)
    there.step_s = 0.125


def test_two_processes_see_the_same(tmp_path: Path) -> None:
    board = Board(tmp_path / "board")
    ticket = Tickets(board).issue()
    assert ticket is not None
    process = multiprocessing.get_context("spawn").Process(target=_write, args=(tmp_path / "board", ticket))
    process.start()
    process.join(60)
    row = board.rows[ticket % ROWS]
    assert (row["ticket"], row["position"], row["state"], row["asked_at"], row["answer_s"]) == (ticket, 7, State.ASKED, 1.5, 0.25)
    assert board.step_s == 0.125
    assert (tmp_path / "board").stat().st_mode & 0o077 == 0, "others may not read it"


def test_a_ticket_is_live_until_it_is_withdrawn_and_never_comes_again(board: Board) -> None:
    tickets = Tickets(board)
    first = tickets.issue()
    assert first is not None
    assert board.is_live(first)
    tickets.withdraw(first)
    assert not board.is_live(first)
    second = tickets.issue()
    assert second is not None
    assert second % ROWS == first % ROWS
    assert second != first
    assert board.is_live(second)
    assert not board.is_live(first)


def test_when_all_rows_are_taken_there_is_no_ticket_until_one_is_free(board: Board) -> None:
    tickets = Tickets(board)
    issued = [tickets.issue() for _ in range(ROWS)]
    assert None not in issued
    assert tickets.issue() is None
    tickets.withdraw(issued[5] or 0)
    assert tickets.issue() is not None


def test_a_new_occupant_of_a_row_has_nothing_to_take_back(board: Board) -> None:
    board.take_back(3, 9)
    board.write(3 + ROWS, 0, State.ASKED)
    assert board.rows[3]["taken_back"] == -1


def test_a_sentence_that_is_too_long_is_cut(board: Board) -> None:
    board.fail(1, "é" * SENTENCE_BYTES)
    assert board.rows[1]["state"] == State.FAILED
    assert bytes(board.rows[1]["sentence"]).decode(errors="replace").startswith("éé")


def parallel_configs() -> list[ParallelConfig]:
    """Of two engines of one server, as vLLM leaves them for a dense model."""
    configs = []
    for rank in (0, 1):
        parallel = ParallelConfig(data_parallel_size=2)
        parallel.data_parallel_rank = parallel.data_parallel_index = rank
        parallel.reconfigure_for_independent_dp_rank()
        configs.append(parallel)
    return configs


def test_a_row_never_shows_the_former_occupants_failure_under_a_new_ticket(board: Board) -> None:
    board.fail(3, "costeer: former")
    seen = []

    class Watched(np.ndarray):
        """Notes what a reader would see after every single write."""

        def __setitem__(self, key: object, value: object) -> None:
            super().__setitem__(key, value)
            seen.append((int(self["ticket"]), int(self["state"])))

    rows = board.rows
    for change in (lambda: board.write(3 + ROWS, 0, State.ASKED), lambda: board.take_back(3 + 2 * ROWS, 0)):
        row = rows[3:4].view(Watched).reshape(())
        board.rows = {3: row}  # type: ignore[assignment]
        change()
        board.rows = rows
        board.fail(int(rows[3]["ticket"]), "costeer: former")
    assert seen
    assert all(state != State.FAILED for ticket, state in seen if ticket != 3)


def test_memory_that_cannot_be_had_is_told_at_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(Unsupported, match=r"has no room for \d+ bytes \(No space left on device\); for /dev/shm see --shm-size"):
        Board(tmp_path / "board", reserve=True)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="no such call on this platform")
def test_the_scheduler_takes_the_memory_at_once(tmp_path: Path) -> None:
    Board(tmp_path / "board")
    assert (tmp_path / "board").stat().st_blocks == 0
    Board(tmp_path / "board", reserve=True)
    found = (tmp_path / "board").stat()
    assert found.st_blocks * 512 >= found.st_size > ROWS * SENTENCE_BYTES


def test_each_engine_has_a_board_of_its_own_that_leaves_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    path = new_path()
    monkeypatch.setenv(settings.BOARD, str(path))
    engines = [SimpleNamespace(parallel_config=parallel) for parallel in parallel_configs()]
    boards = [open_board(engine) for engine in engines]
    assert boards[0] is not None
    assert boards[1] is not None
    boards[0].step_s = 2.0
    assert boards[1].step_s == 0
    again = open_board(engines[0])
    for engine in engines:
        remove_board(engine)
    assert again is not None
    assert again.step_s == 2.0
    assert list(path.parent.glob(f"{path.name}*")) == []
    monkeypatch.delenv(settings.BOARD)
    assert open_board(engines[0]) is None
