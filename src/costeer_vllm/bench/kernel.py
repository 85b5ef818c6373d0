"""Bandwidth of ``steer_inplace`` against a plain copy of the same bytes; needs torch, on a GPU also triton, and no vLLM.

    python benchmarks/kernel.py                     the table, on the GPU if there is one
    python benchmarks/kernel.py --json kernel.json  and the numbers behind it
    python benchmarks/kernel.py --check             compare the results on this device with float64 instead

Each repetition times one call and one copy, back to back; the ratio is the median of the pairs' ratios. On a CPU the number of
threads is torch's own: ``OMP_NUM_THREADS``.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from costeer_vllm.kernels import Backend, Deltas, DenseDeltas, SparseDeltas, steer_inplace

VOCAB, PADDING = 152_064, 128  # Qwen2.5: logits, and how many of them are no ids
ENTRIES = 512  # of one sparse delta; the codec sends up to 4,096, and fewer than this as a rule
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@dataclass(frozen=True, slots=True)
class Settings:
    """Where and how large."""

    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    backend: Backend = "auto"
    rows: tuple[int, ...] = (1, 8, 64, 256)
    vocab: int = VOCAB
    repetitions: int = 50

    @property
    def width(self) -> int:
        """Ids that have a delta."""
        return max(1, self.vocab - PADDING)

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")


@dataclass(frozen=True, slots=True)
class Timing:
    """One kind of deltas for one number of rows."""

    rows: int
    deltas: str
    moved_bytes: int  # that steering must read and write
    steer_us: float  # medians
    copy_us: float
    ratios: tuple[float, ...]  # copy / steer of every pair: 1 is as fast as a copy

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    def __str__(self) -> str:
        gb_per_s = self.moved_bytes / self.steer_us / 1e3
        return (
            f"{self.rows:4}  {self.deltas:15}  {self.moved_bytes / 1e6:7.2f}  {self.steer_us:8.1f}  {self.copy_us:8.1f}"
            f"  {gb_per_s:10.1f}  {self.ratio:13.2f}"
        )


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison with the operation's definition in float64."""

    deltas: str
    steered: int
    rows: int
    vocab: int
    width: int
    worst: float  # error in units of the two roundings allowed
    good: bool

    def __str__(self) -> str:
        size = f"{self.steered:3} of {self.rows:3} x {self.vocab:6}, width {self.width:6}"
        return f"{'ok  ' if self.good else 'FAIL'}  {self.deltas:22}  {size}  {self.worst:.3f}"


TITLES = f"{'rows':>4}  {'deltas':15}  {'MB':>7}  {'steer us':>8}  {'copy us':>8}  {'steer GB/s':>10}  {'ratio to copy':>13}"


def device_name(settings: Settings) -> str:
    return torch.cuda.get_device_name() if settings.on_gpu else f"{torch.get_num_threads()} CPU threads"


def timings(settings: Settings) -> Iterator[Timing]:
    """One after the other, every kind of deltas for every number of rows."""
    for num_rows in settings.rows:
        with torch.device(settings.device):
            named_deltas = all_deltas(num_rows, settings)
        for label, deltas, moved_bytes in named_deltas:
            pairs = time_pairs(num_rows, deltas, moved_bytes, settings)
            steer_us, copy_us = (statistics.median(times) for times in zip(*pairs, strict=True))
            yield Timing(num_rows, label, moved_bytes, steer_us, copy_us, tuple(copy / steer for steer, copy in pairs))


def all_deltas(num_rows: int, settings: Settings) -> list[tuple[str, Deltas, int]]:
    """Name, deltas and the bytes that steering with them must read and write."""
    dense = [torch.randn(num_rows, settings.vocab).to(dtype)[:, : settings.width] for dtype in DTYPES]
    named: list[tuple[str, Deltas, int]] = [
        (f"dense {_name(values.dtype)}", DenseDeltas(values), values.numel() * (8 + values.element_size())) for values in dense
    ]
    entries = min(ENTRIES, settings.width)
    sparse = random_sparse(torch.full((num_rows,), entries), settings.width, torch.float16)
    return [*named, (f"sparse {entries}", sparse, num_rows * entries * (8 + 8 + 2))]


def random_sparse(counts: Tensor, width: int, dtype: torch.dtype) -> SparseDeltas:
    """``counts[i]`` entries for row i at random ids below ``width``."""
    ids = torch.cat([torch.randperm(width)[:count].sort().values for count in counts.tolist()])
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return SparseDeltas(offsets, ids, torch.randn(ids.shape).to(dtype))


def time_pairs(num_rows: int, deltas: Deltas, moved_bytes: int, settings: Settings) -> list[tuple[float, float]]:
    """Microseconds of every repetition: of steering, and of a copy that reads and writes ``moved_bytes`` together."""
    with torch.device(settings.device):  # not around what is timed: inside, every torch call costs microseconds more
        logits = torch.randn(num_rows, settings.vocab)
        rows, strength = torch.arange(num_rows), torch.full((num_rows,), 1e-3)
        source = torch.zeros(moved_bytes // 2, dtype=torch.uint8)
        target = torch.zeros_like(source)

    def steer() -> None:
        steer_inplace(logits, rows, strength, deltas, settings.backend)

    def copy() -> None:
        target.copy_(source)

    clock = gpu_clock if logits.is_cuda else cpu_clock
    clock(steer, copy)  # compiles and touches every page
    return [clock(steer, copy) for _ in range(settings.repetitions)]


def cpu_clock(first: Callable[[], None], second: Callable[[], None]) -> tuple[float, float]:
    start = time.perf_counter()
    first()
    middle = time.perf_counter()
    second()
    return (middle - start) * 1e6, (time.perf_counter() - middle) * 1e6


def gpu_clock(first: Callable[[], None], second: Callable[[], None]) -> tuple[float, float]:
    """Device time alone: the GPU sleeps until all is queued, so that no launch overhead is in it."""
    cuda: Any = torch.cuda
    start, middle, end = (cuda.Event(enable_timing=True) for _ in range(3))
    cuda._sleep(2_000_000)  # cycles, about 1 ms
    start.record()
    first()
    middle.record()
    second()
    end.record()
    end.synchronize()
    return start.elapsed_time(middle) * 1e3, middle.elapsed_time(end) * 1e3


def checks(settings: Settings) -> Iterator[Check]:
    """Steering on this device against the operation's definition in float64, up to two roundings, for all types and widths."""
    vocab, width = settings.vocab, settings.width
    sizes = [(1, 1, 1, 1), (17, 20, 1003, 2001), (3, 3, width, vocab)]
    sizes += [(rows, rows + 1, vocab, width) for rows in settings.rows]
    for dtype in DTYPES:
        for size in sizes:
            with torch.device(settings.device):
                yield from _checked(dtype, *size, settings.backend)


def _checked(dtype: torch.dtype, n: int, num_rows: int, vocab: int, width: int, backend: Backend) -> Iterator[Check]:
    stored = torch.randn(num_rows, vocab + 16)
    stored[torch.rand(stored.shape) < 0.2] = -torch.inf
    logits = stored[:, :vocab]
    rows, strength = torch.randperm(num_rows)[:n], 2 * torch.randn(n)
    values = torch.randn(n, width).to(dtype)
    sparse = random_sparse(torch.randint(0, width + 1, (n,)), width, dtype)
    for deltas in (DenseDeltas(values), sparse):
        after = stored.clone()
        steer_inplace(after[:, :vocab], rows, strength, deltas, backend)
        wide = values.double() if isinstance(deltas, DenseDeltas) else widened(sparse, width)
        worst, untouched = compare(logits, after[:, :vocab], rows, strength, wide)
        good = worst <= 1 and untouched and torch.equal(after[:, vocab:], stored[:, vocab:])
        yield Check(f"{type(deltas).__name__} {_name(dtype)}", n, num_rows, vocab, width, worst, good)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def widened(sparse: SparseDeltas, width: int) -> Tensor:
    """``[n, width]`` float64 with zeros where there is no entry."""
    counts = sparse.offsets.diff()
    wide = torch.zeros(len(counts), width, dtype=torch.float64)
    wide[torch.arange(len(counts)).repeat_interleave(counts), sparse.ids] = sparse.values.double()
    return wide


def compare(before: Tensor, after: Tensor, rows: Tensor, strength: Tensor, wide: Tensor) -> tuple[float, bool]:
    """The largest error in units of the two roundings allowed, and whether all other rows and ids kept their values."""
    width = min(wide.shape[1], before.shape[1])
    product = strength.double()[:, None] * wide[:, :width]
    expected = before.double()
    expected[rows, :width] += product
    error = (after.double() - expected).abs()
    error[after == expected] = 0  # both -inf
    allowed = expected.abs()
    allowed[rows, :width] += product.abs()
    touched = torch.zeros(before.shape, dtype=torch.bool)
    touched[rows, :width] = True
    units = (error[touched] / (2.0**-23 * allowed[touched])).nan_to_num(nan=0.0)  # 0 / 0, or -inf in both
    return units.max().item(), torch.equal(after[~touched], before[~touched])


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that say where and how large."""
    default = Settings()
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", default=default.device)
    options.add_argument("--backend", choices=["auto", "torch", "triton"], default=default.backend)
    options.add_argument("--rows", type=int, nargs="+", default=default.rows)
    options.add_argument("--vocab", type=int, default=default.vocab)
    options.add_argument("--repetitions", type=int, default=default.repetitions)
    options.add_argument("--json", type=Path, metavar="FILE")
    return options


def settings_of(options: argparse.Namespace) -> Settings:
    return Settings(options.device, options.backend, tuple(options.rows), options.vocab, options.repetitions)


def show(settings: Settings) -> list[Timing]:
    """Print the table as it grows."""
    print(f"{device_name(settings)}, torch {torch.__version__}, backend {settings.backend}, {settings.repetitions} pairs")
    print(TITLES)
    found = []
    for timing in timings(settings):
        found.append(timing)
        print(timing, flush=True)
    return found


def show_checks(settings: Settings) -> list[Check]:
    """Print every comparison."""
    found = []
    for check in checks(settings):
        found.append(check)
        print(check, flush=True)
    return found


def as_json(timing: Timing) -> dict[str, object]:
    return asdict(timing) | {"ratio": timing.ratio}


def main(arguments: list[str] | None = None) -> None:
    """The script; its exit code is 1 if a check fails."""
    options = parser(__doc__)
    options.add_argument("--check", action="store_true")
    given = options.parse_args(arguments)
    settings = settings_of(given)
    torch.manual_seed(0)
    if given.check:
        sys.exit(int(not all(check.good for check in show_checks(settings))))
    found = show(settings)
    if given.json:
        about = {"device": device_name(settings), "torch": torch.__version__} | asdict(settings)
        given.json.write_text(json.dumps(about | {"results": [as_json(timing) for timing in found]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
