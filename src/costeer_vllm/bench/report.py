"""From samples to figures: medians of repetitions and of paired ratios, the table, the notes and the JSON."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

QUIET = 0.5  # load average
MIN_STEP_RATIO = 5.0  # below it the small model is no small model, and steering cannot hide behind the large one's step

PHASES = {
    "plain": "(a) plain vLLM",
    "idle": "(b) with plugin, idle",
    "steered": "(c) steered",
    "serial": "(d) serial loop",
}
RATIOS = (("idle", "plain"), ("steered", "plain"), ("steered", "serial"))
TABLE = {
    "tokens per second, all streams": PHASES,
    "ratios of tokens per second": {f"{a}/{b}": f"{PHASES[a][:3]} / {PHASES[b][:3]}" for a, b in RATIOS},
    "milliseconds per step": {
        **{f"{phase}_step": PHASES[phase] for phase in ("plain", "idle", "steered")},
        "small_step": "small model, two rows each",
        "step_ratio": "(a) / small model",
        "encode": "deltas to bytes",
        "serial_large": "(d) large model",
        "serial_small": "(d) small model, twice",
        "serial_iterations": "(d) iterations of Eq. 7",
    },
    "tokens of (c)": {"steered_tokens": "steered", "missed": "missed"},
}


@dataclass(frozen=True, slots=True)
class Figure:
    """One quantity with its value in every repetition; ``streams`` is the number of them at a time."""

    name: str
    streams: int
    unit: str
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def __str__(self) -> str:
        return f"{_short(self.median)} ({_short(min(self.values))}-{_short(max(self.values))})"

    def as_json(self) -> dict[str, Any]:
        """What ``--json`` writes of it; ``value`` is the median."""
        return {
            "name": self.name,
            "streams": self.streams,
            "value": self.median,
            "unit": self.unit,
            "repetitions": len(self.values),
            "minimum": min(self.values),
            "median": self.median,
            "maximum": max(self.values),
        }


@dataclass(slots=True)
class Samples:
    """All that was measured: per quantity and number of streams one value per repetition, in the order of repetitions."""

    units: dict[str, str] = field(default_factory=dict)
    values: dict[tuple[str, int], list[float]] = field(default_factory=dict)

    def add(self, name: str, streams: int, unit: str, value: float) -> None:
        self.units[name] = unit
        self.values.setdefault((name, streams), []).append(value)

    def figures(self) -> list[Figure]:
        """What was measured, then what follows from it, pair by pair."""
        measured = [Figure(name, streams, self.units[name], tuple(values)) for (name, streams), values in self.values.items()]
        counts = sorted({streams for _, streams in self.values})
        pairs = [(f"{a}/{b}", a, b) for a, b in RATIOS] + [("step_ratio", "plain_step", "small_step")]
        return measured + [
            figure for streams in counts for name, a, b in pairs if (figure := self._ratio(name, a, b, streams)) is not None
        ]

    def _ratio(self, name: str, over: str, under: str, streams: int) -> Figure | None:
        a, b = self.values.get((over, streams)), self.values.get((under, streams))
        if not a or not b:
            return None
        return Figure(name, streams, "ratio", tuple(x / y for x, y in zip(a, b, strict=True)))


def write_json(path: Path, figures: Iterable[Figure], machine: Mapping[str, Any]) -> None:
    """A list with one object per figure; each also says on which machine it was taken."""
    path.write_text(json.dumps([figure.as_json() | {"machine": dict(machine)} for figure in figures], indent=2) + "\n")


def show(console: Console, figures: Sequence[Figure], machine: Mapping[str, Any], notes: Iterable[str]) -> None:
    """The table, what must be known about it, and loudly what is wrong with it."""
    console.print(", ".join(f"{name} {value}" for name, value in machine.items()), highlight=False)
    console.print(_table(figures))
    for note in notes:
        console.print(f"- {note}", highlight=False)
    for warning in warnings(figures, machine):
        console.print(warning, style="bold red", highlight=False)


def warnings(figures: Iterable[Figure], machine: Mapping[str, Any]) -> list[str]:
    """Why figures must not be believed."""
    found = []
    if (load := machine.get("load_before", 0.0)) > QUIET:
        found.append(f"THE MACHINE WAS NOT QUIET before the start (load {load}): other processes are in these figures.")
    for figure in figures:
        if figure.name == "missed" and any(figure.values):
            found.append(f"{sum(figure.values):g} TOKENS WERE NOT STEERED at {figure.streams} streams: (c) is not comparable.")
        if figure.name == "step_ratio" and figure.streams == 1 and figure.median < MIN_STEP_RATIO:
            found.append(f"THE SMALL MODEL IS TOO LARGE: a step of the large one takes {figure.median:.1f} times as long, "
                         f"not {MIN_STEP_RATIO:g} times.")  # fmt: skip
    return found


def _table(figures: Iterable[Figure]) -> Table:
    by_name = {(figure.name, figure.streams): figure for figure in figures}
    counts = sorted({streams for _, streams in by_name})
    table = Table(title="median (minimum-maximum)")
    table.add_column("")
    for streams in counts:
        table.add_column(f"{streams} stream{'s' * (streams > 1)}", justify="right")
    for section, rows in TABLE.items():
        table.add_row(section, style="bold")
        for name, title in rows.items():
            table.add_row(f"  {title}", *(str(by_name.get((name, streams), "")) for streams in counts))
        table.add_section()
    return table


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 or value == 0 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
