"""The ledger for people: a table, lines of JSON, a plot."""

import datetime
import itertools
from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from costeer_vllm.edge.ledger import Entry
from costeer_vllm.errors import Unsupported

BLUE, ORANGE, GRAY = "#0072b2", "#d55e00", "#666666"  # of Okabe and Ito, told apart by everybody


def print_json(entries: Sequence[Entry]) -> None:
    """One object per line."""
    for entry in entries:
        print(msgspec.json.encode(entry).decode())


def print_table(entries: Sequence[Entry], last: int) -> None:
    """The ``last`` entries, and the sums over all."""
    table = Table("ended", "worker", "fusion", title=f"{len(entries)} answers in the ledger", title_justify="left")
    for name in ("tokens", "bits", "budget", "bytes up", "bytes down"):
        table.add_column(name, justify="right")
    for entry in entries[-last:]:
        bits = "(deltas)" if entry.bits is None else f"{entry.bits:.1f}"
        budget = "" if entry.max_bits is None else f"{entry.max_bits:g}"
        table.add_row(f"{_at(entry):%m-%d %H:%M}", entry.worker, entry.fusion, str(entry.tokens), bits, budget,
                      f"{entry.bytes_up:,}", f"{entry.bytes_down:,}")  # fmt: skip
    console = Console()
    console.print(table)
    told = [entry for entry in entries if entry.bits is not None]
    in_cloud = [entry for entry in entries if entry.fusion == "cloud"]
    console.print(f"edge fusion: at most {sum(entry.bits or 0 for entry in told):.1f} bits told in {len(told)} answers")
    if in_cloud:
        up = sum(entry.bytes_up for entry in in_cloud)
        console.print(
            f"cloud fusion: {up:,} bytes of deltas left this device in {len(in_cloud)} answers; "
            "what they tell is not counted in bits, and is far more (docs/privacy.md)"
        )


def draw(entries: Sequence[Entry], path: Path) -> None:
    """Bits of each edge-fused answer and their running sum over time, to a PNG; raises Unsupported without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise Unsupported("costeer: a plot needs matplotlib: pip install matplotlib") from None
    told = [(_at(entry), entry.bits) for entry in entries if entry.bits is not None]
    figure = Figure(figsize=(8, 5), dpi=110, layout="constrained")
    single, total = figure.subplots(2, 1, sharex=True)
    times, bits = [at for at, _ in told], [value for _, value in told]
    single.vlines(times, 0, bits, color=BLUE, linewidth=1)
    single.plot(times, bits, "o", color=BLUE, markersize=4)
    single.axhline(0, color=GRAY, linewidth=0.8)
    single.set_ylabel("bits told by an answer")
    total.step(times, list(itertools.accumulate(bits)), where="post", color=ORANGE)
    total.set_ylabel("bits told in all")
    total.set_ylim(bottom=min(0.0, *itertools.accumulate(bits), 0.0))
    figure.autofmt_xdate()
    figure.suptitle(f"What {len(told)} edge-fused answers can have told about the context", fontsize=11)
    figure.savefig(path)


def _at(entry: Entry) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(entry.time)
