"""What is measured in processes of its own: the hub alone, and ``steer_inplace`` with a fixed number of threads."""

import json
import os
import subprocess
import sys
from typing import Any

from costeer_vllm.bench.bench import Bench
from costeer_vllm.bench.figures import Samples
from costeer_vllm.bench.kernel import VOCAB
from costeer_vllm.errors import CoSteerError

TIMEOUT_S = 300.0
WINDOW_S = 5  # of the hub's load
ROWS = 64
PAIRS = 10  # of steering and copying, per repetition
THREADS = (1, 2)

HUB_FIGURES = {  # name: unit, field of a window
    "hub_rate": ("deltas/s", "rate"),
    "hub_p50": ("ms", "p50_ms"),
    "hub_p99": ("ms", "p99_ms"),
    "hub_max": ("ms", "max_ms"),
    "hub_lost": ("deltas", "lost"),
    "hub_share": ("share", "hub_share"),
    "load_share": ("share", "load_share"),
    "load_late_p99": ("ms", "late_p99_ms"),
}


class Failed(CoSteerError):
    """A benchmark in a process of its own did not end well."""


def hub_steps(_: Bench) -> int:
    return 1


def measure_hub(bench: Bench) -> None:
    """The hub under the load of ``bench.settings``, one window per repetition."""
    settings = bench.settings
    bench.say(f"the hub alone, {settings.edges:,} edges and {settings.deltas_per_s:,} deltas per second", settle=True)
    options = ["--edges", str(settings.edges), "--rate", str(settings.deltas_per_s)]
    options += ["--seconds", str(WINDOW_S), "--repetitions", str(settings.repetitions)]
    for window in _run(bench, "hub", options)["windows"]:
        for name, (unit, key) in HUB_FIGURES.items():
            bench.samples.add(name, unit, window[key], edges=settings.edges)


def kernel_steps(_: Bench) -> int:
    return len(_threads())


def measure_kernel(bench: Bench) -> None:
    """Steering against a copy, once for each number of threads."""
    for threads in _threads():
        bench.say(f"steer_inplace, {threads} thread{'s' * (threads > 1)}", settle=True)
        options = ["--device", "cpu", "--rows", str(ROWS), "--repetitions", str(PAIRS * bench.settings.repetitions)]
        _add_ratios(bench.samples, _run(bench, "kernel", options, threads)["results"], threads)


def _add_ratios(samples: Samples, timings: list[dict[str, Any]], threads: int) -> None:
    for timing in timings:
        kind, _, what = timing["deltas"].partition(" ")
        if kind == "dense":
            for ratio in timing["ratios"]:
                samples.add(f"steer/copy {what}", "ratio", ratio, threads=threads)


def _threads() -> list[int]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return [threads for threads in THREADS if threads <= cores]


def _run(bench: Bench, module: str, options: list[str], threads: int = 1) -> Any:
    """What ``python -m costeer_vllm.bench.MODULE`` writes as JSON."""
    found = bench.folder / f"{module}.json"
    command = [sys.executable, "-m", f"costeer_vllm.bench.{module}", *options, "--json", str(found)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    try:
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise Failed(f"{module}: did not end within {TIMEOUT_S:g} s") from None
    if run.returncode:
        raise Failed(f"{module}: {run.stderr.strip()[-1000:]}")
    return json.loads(found.read_text())


def hub_notes(bench: Bench) -> list[str]:
    """What a reader must know of this part."""
    return [
        f"The hub alone: windows of {WINDOW_S} s, {bench.settings.deltas_per_s:,} deltas per second. A real hub on one core; on "
        "another a process with a raw WebSocket per edge worker, that answers at once with a delta of 400 bytes, and an engine's "
        "ZeroMQ link, which asks at random times (Poisson). Latency is engine, hub, edge worker, hub, engine; the load is in it."
    ]


def kernel_notes(_: Bench) -> list[str]:
    """What a reader must know of this part."""
    return [f"`steer_inplace`: {ROWS} rows x {VOCAB:,} against a copy that moves the same bytes; 1 is as fast as a copy."]
