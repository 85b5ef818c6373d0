"""The machine that is measured: its facts, and which model runs on which of its cores."""

import contextlib
import importlib.metadata
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from costeer_vllm.serve import has_cuda


@dataclass(frozen=True, slots=True)
class Cores:
    """Where the two models run. A deployment has them on two machines; on one CPU they must not fight for cores."""

    large: int | None  # core of vLLM's workers and of the serial loop; None: wherever the system puts them
    small: int | None  # core of the edge worker
    note: str  # what a reader of the figures must know about it


def choose_cores() -> Cores:
    """The first core for the large model and the last for the small one, if there are two and they can be chosen."""
    if has_cuda():
        return Cores(None, None, "Nothing is pinned to cores: the large model runs on the GPU.")
    if not hasattr(os, "sched_setaffinity"):
        return Cores(None, None, "This system cannot pin threads to cores: the two models compete for them.")
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) == 1:
        return Cores(cores[0], None, "Only one core: the two models take turns on it, which no deployment would have them do.")
    return Cores(
        cores[0],
        cores[-1],
        f"Of {len(cores)} cores, the vLLM workers and the serial loop compute on core {cores[0]} alone, with one thread, and all "
        f"else on the others, the edge worker on core {cores[-1]}: a deployment has the two models on two machines.",
    )


def worker_environment(cores: Cores) -> dict[str, str]:
    """What has vLLM's workers compute on the large model's core."""
    return {} if cores.large is None else {"VLLM_CPU_OMP_THREADS_BIND": str(cores.large)}


def pin(pid: int, core: int | None) -> None:
    """Move every thread of a process to one core; those it starts later follow. None: leave it."""
    if core is None:
        return
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(ProcessLookupError):  # a thread that has just ended
            os.sched_setaffinity(int(task.name), {core})


def keep_off(pid: int, cores: Cores) -> None:
    """Move a server's other processes off the large model's core, where one of them that spins would cost it time at random."""
    if cores.large is None or not hasattr(os, "sched_setaffinity"):
        return
    others = os.sched_getaffinity(0) - {cores.large}
    for each in [pid, *_descendants(pid)]:
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            if others and os.sched_getaffinity(each) != {cores.large}:  # the worker has moved there itself
                for task in Path(f"/proc/{each}/task").iterdir():
                    with contextlib.suppress(ProcessLookupError):  # a thread that has ended in the meantime
                        os.sched_setaffinity(int(task.name), others)


def _descendants(pid: int) -> list[int]:
    """Processes that a process has started, and those that they have started."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents.setdefault(int(stat.read_text().rpartition(")")[2].split()[1]), []).append(int(stat.parent.name))
    found = [pid]
    for each in found:
        found += parents.get(each, [])
    return found[1:]


@contextlib.contextmanager
def on_core(core: int | None) -> Iterator[None]:
    """The calling thread, and what it starts, on one core."""
    if core is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def load() -> float:
    """Processes that have been running here within the last minute, on average; 0 where the system does not say."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else 0.0


def facts() -> dict[str, str | int | float]:
    """What a figure depends on: processor, cores, accelerator and versions."""
    import torch

    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "vllm": _version("vllm"),
        "costeer_vllm": _version("costeer-vllm"),
    }


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
