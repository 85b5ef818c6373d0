"""Bandwidth of ``steer_inplace`` against a plain copy of the same bytes; needs torch, on a GPU also triton, and no vLLM.

    python benchmarks/kernel.py                     the table, on the GPU if there is one
    python benchmarks/kernel.py --json kernel.json  and the numbers behind it
    python benchmarks/kernel.py --check             compare the results on this device with float64 instead

Each repetition times one call and one copy, back to back; the ratio is the median of the pairs' ratios.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from costeer_vllm.kernels import Deltas, DenseDeltas, SparseDeltas, steer_inplace

VOCAB, WIDTH = 152_064, 151_936  # Qwen2.5: logits and ids
ENTRIES = 512  # of one sparse delta, the codec's default
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", choices=["auto", "torch", "triton"], default="auto")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--repetitions", type=int, default=50)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.check:
        with torch.device(options.device):
            sys.exit(check(options.backend))
    measure(options)


def measure(options: argparse.Namespace) -> None:
    on_gpu = options.device.startswith("cuda")
    name = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} CPU threads"
    print(f"{name}, torch {torch.__version__}, backend {options.backend}, medians of {options.repetitions} pairs")
    print(f"{'rows':>4}  {'deltas':15}  {'MB':>7}  {'steer us':>8}  {'copy us':>8}  {'steer GB/s':>10}  {'ratio to copy':>13}")
    results = []
    for num_rows in options.rows:
        with torch.device(options.device):
            named_deltas = all_deltas(num_rows)
        for label, deltas, moved_bytes in named_deltas:
            steer_us, copy_us = time_pairs(num_rows, deltas, moved_bytes, options)
            result = {
                "rows": num_rows,
                "deltas": label,
                "moved_bytes": moved_bytes,
                "steer_us": statistics.median(steer_us),
                "copy_us": statistics.median(copy_us),
                "ratio": statistics.median(copy / steer for steer, copy in zip(steer_us, copy_us, strict=True)),
            }
            results.append(result)
            print(
                f"{num_rows:4}  {label:15}  {moved_bytes / 1e6:7.2f}  {result['steer_us']:8.1f}  {result['copy_us']:8.1f}"
                f"  {moved_bytes / result['steer_us'] / 1e3:10.1f}  {result['ratio']:13.2f}"
            )
    if options.json:
        about = {"device": name, "torch": torch.__version__, "backend": options.backend, "repetitions": options.repetitions}
        options.json.write_text(json.dumps(about | {"vocab": VOCAB, "width": WIDTH, "results": results}, indent=2) + "\n")


def all_deltas(num_rows: int) -> list[tuple[str, Deltas, int]]:
    """Name, deltas and the bytes that steering with them must read and write."""
    dense = [torch.randn(num_rows, VOCAB).to(dtype)[:, :WIDTH] for dtype in DTYPES]
    named: list[tuple[str, Deltas, int]] = [
        (f"dense {str(values.dtype)[6:]}", DenseDeltas(values), values.numel() * (8 + values.element_size())) for values in dense
    ]
    sparse = random_sparse(torch.full((num_rows,), ENTRIES), WIDTH, torch.float16)
    return [*named, (f"sparse {ENTRIES}", sparse, num_rows * ENTRIES * (8 + 8 + 2))]


def random_sparse(counts: Tensor, width: int, dtype: torch.dtype) -> SparseDeltas:
    """``counts[i]`` entries for row i at random ids below ``width``."""
    ids = torch.cat([torch.randperm(width)[:count].sort().values for count in counts.tolist()])
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return SparseDeltas(offsets, ids, torch.randn(ids.shape).to(dtype))


def time_pairs(num_rows: int, deltas: Deltas, moved_bytes: int, options: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Microseconds of every repetition: of steering, and of a copy that reads and writes ``moved_bytes`` together."""
    with torch.device(options.device):  # not around what is timed: inside, every torch call costs microseconds more
        logits = torch.randn(num_rows, VOCAB)
        rows, strength = torch.arange(num_rows), torch.full((num_rows,), 1e-3)
        source = torch.zeros(moved_bytes // 2, dtype=torch.uint8)
        target = torch.zeros_like(source)

    def steer() -> None:
        steer_inplace(logits, rows, strength, deltas, options.backend)

    def copy() -> None:
        target.copy_(source)

    clock = gpu_clock if logits.is_cuda else cpu_clock
    clock(steer, copy)  # compiles and touches every page
    pairs = [clock(steer, copy) for _ in range(options.repetitions)]
    return [steer_us for steer_us, _ in pairs], [copy_us for _, copy_us in pairs]


def cpu_clock(first: Callable[[], None], second: Callable[[], None]) -> tuple[float, float]:
    start = time.perf_counter()
    first()
    middle = time.perf_counter()
    second()
    return (middle - start) * 1e6, (time.perf_counter() - middle) * 1e6


def gpu_clock(first: Callable[[], None], second: Callable[[], None]) -> tuple[float, float]:
    """Device time alone: the GPU sleeps until all is queued, so that no launch overhead is in it."""
    start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    torch.cuda._sleep(2_000_000)  # cycles, about 1 ms
    start.record()
    first()
    middle.record()
    second()
    end.record()
    end.synchronize()
    return start.elapsed_time(middle) * 1e3, middle.elapsed_time(end) * 1e3


def check(backend: str) -> int:
    """0 if steering on this device is the operation's definition in float64 up to two roundings, for all types and widths."""
    failures = 0
    for dtype in DTYPES:
        for n, num_rows, vocab, width in [(1, 1, 1, 1), (17, 20, 1003, 2001), (8, 9, VOCAB, WIDTH), (3, 3, WIDTH, VOCAB)]:
            stored = torch.randn(num_rows, vocab + 16)
            stored[torch.rand(stored.shape) < 0.2] = -torch.inf
            logits = stored[:, :vocab]
            rows, strength = torch.randperm(num_rows)[:n], 2 * torch.randn(n)
            values = torch.randn(n, width).to(dtype)
            sparse = random_sparse(torch.randint(0, width + 1, (n,)), width, dtype)
            for deltas, wide in ((DenseDeltas(values), values.double()), (sparse, widened(sparse, width))):
                after = stored.clone()
                steer_inplace(after[:, :vocab], rows, strength, deltas, backend)
                worst, untouched = compare(logits, after[:, :vocab], rows, strength, wide)
                good = worst <= 1 and untouched and torch.equal(after[:, vocab:], stored[:, vocab:])
                failures += not good
                kind = f"{type(deltas).__name__} {str(dtype)[6:]}"
                print(f"{'ok  ' if good else 'FAIL'}  {kind:22}  {n:2} of {num_rows:2} x {vocab:6}, width {width:6}  {worst:.3f}")
    return int(failures > 0)


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


if __name__ == "__main__":
    main()
