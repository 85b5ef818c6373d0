"""Processes move to the cores they are meant for, with all that they started."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from costeer_vllm.bench.machine import Cores, choose_cores, facts, keep_off, load, on_core, pin, worker_environment

CORES = sorted(os.sched_getaffinity(0))
needs_two_cores = pytest.mark.skipif(len(CORES) < 2, reason="there is one core only")
FAMILY = """
import os, subprocess, sys
if sys.argv[1] == "child":
    os.sched_setaffinity(0, {int(sys.argv[2])})
else:
    child = subprocess.Popen([sys.executable, sys.argv[0], "child", sys.argv[1]], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child.stdout.readline()
    print(child.pid, end=" ")
print(os.getpid(), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def family(tmp_path: object) -> Iterator[tuple[int, int]]:
    """A process and its child, which keeps to the first core of its own will; their ids."""
    script = f"{tmp_path}/family.py"
    with open(script, "w") as file:
        file.write(FAMILY)
    command = [sys.executable, script, str(CORES[0])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child, parent = map(int, process.stdout.readline().split())
        yield parent, child


@needs_two_cores
def test_all_but_the_worker_are_kept_off_its_core(family: tuple[int, int]) -> None:
    parent, worker = family
    keep_off(parent, Cores(CORES[0], CORES[-1], ""))
    assert os.sched_getaffinity(parent) == set(CORES[1:])
    assert os.sched_getaffinity(worker) == {CORES[0]}


@needs_two_cores
def test_children_are_moved_with_their_parents(family: tuple[int, int]) -> None:
    parent, child = family
    keep_off(parent, Cores(CORES[-1], CORES[0], ""))
    assert os.sched_getaffinity(parent) == os.sched_getaffinity(child) == set(CORES[:-1])


def test_where_nothing_is_pinned_nothing_is_moved(family: tuple[int, int]) -> None:
    keep_off(family[0], Cores(None, None, ""))
    assert os.sched_getaffinity(family[0]) == set(CORES)
    assert worker_environment(Cores(None, None, "")) == {}


def test_a_process_is_pinned(family: tuple[int, int]) -> None:
    pin(family[0], CORES[-1])
    assert os.sched_getaffinity(family[0]) == {CORES[-1]}


def test_a_core_is_left_again() -> None:
    with on_core(CORES[0]):
        assert os.sched_getaffinity(0) == {CORES[0]}
    assert os.sched_getaffinity(0) == set(CORES)


def test_the_machine_is_described() -> None:
    assert {"cpu", "cores", "torch", "vllm"} <= facts().keys()
    assert choose_cores().note.endswith(".")
    assert load() >= 0
