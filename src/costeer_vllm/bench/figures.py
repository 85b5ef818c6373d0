"""From samples to figures: medians of repetitions and of paired ratios, what they should be, and what must not be believed."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

QUIET = 0.5  # load average
MIN_STEP_RATIO = 5.0  # below it the small model is no small model, and steering cannot hide behind the large one's step

At: TypeAlias = tuple[tuple[str, int], ...]  # under which circumstances: streams, round_trip_ms, threads, edges; sorted

RATIOS = {  # name: numerator, denominator; taken repetition by repetition
    "idle/plain": ("idle", "plain"),
    "steered/plain": ("steered", "plain"),
    "edge_fused/plain": ("edge_fused", "plain"),
    "steered/beside": ("steered", "beside"),
    "beside/plain": ("beside", "plain"),
    "steered/serial": ("steered", "serial"),
    "step_ratio": ("plain_step", "small_step"),
    "look_ahead/waiting": ("look_ahead", "waiting"),
    "beside_slow/beside_fast": ("beside_slow", "beside_fast"),
}


@dataclass(frozen=True, slots=True)
class Target:
    """What a median should be."""

    title: str
    name: str
    at: At
    bound: float
    at_least: bool = True

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.bound:g}"

    def is_met(self, median: float) -> bool:
        return median >= self.bound if self.at_least else median <= self.bound


ONE, EIGHT = (("streams", 1),), (("streams", 8),)
HUB = (("edges", 1000),)
TARGETS = (
    Target("idle / plain, 1 stream", "idle/plain", ONE, 0.99),
    Target("idle / plain, 8 streams", "idle/plain", EIGHT, 0.99),
    Target("steered / plain, 1 stream", "steered/plain", ONE, 0.95),
    Target("steered / plain, 8 streams", "steered/plain", EIGHT, 0.95),
    Target("steered / the paper's serial loop, 1 stream", "steered/serial", ONE, 2.0),
    Target("seven beside a slow edge / beside a fast one", "beside_slow/beside_fast", (), 0.95),
    Target("look-ahead / without, 50 ms round trip", "look_ahead/waiting", (("round_trip_ms", 50),), 2.0),
    Target("hub, 1,000 edges: latency through it, p99 (ms)", "hub_p99", HUB, 5.0, at_least=False),
    Target("hub, 1,000 edges: deltas lost", "hub_lost", HUB, 0.0, at_least=False),
    Target("steer_inplace / copy, float32, 1 thread", "steer/copy float32", (("threads", 1),), 0.7),
    Target("steer_inplace / copy, float32, 2 threads", "steer/copy float32", (("threads", 2),), 0.7),
)


@dataclass(frozen=True, slots=True)
class Figure:
    """One quantity with its value in every repetition."""

    name: str
    unit: str
    values: tuple[float, ...]
    at: At = ()

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def target(self) -> Target | None:
        return next((target for target in TARGETS if (target.name, target.at) == (self.name, self.at)), None)

    def __str__(self) -> str:
        if min(self.values) == max(self.values):
            return _short(self.median)
        return f"{_short(self.median)} ({_short(min(self.values))}-{_short(max(self.values))})"

    def as_json(self) -> dict[str, Any]:
        """What ``--json`` writes of it; ``value`` is the median."""
        row: dict[str, Any] = {
            "name": self.name,
            **dict(self.at),
            "value": self.median,
            "unit": self.unit,
            "repetitions": len(self.values),
            "minimum": min(self.values),
            "median": self.median,
            "maximum": max(self.values),
        }
        if (target := self.target) is not None:
            row |= {"target": str(target), "met": target.is_met(self.median)}
        return row


@dataclass(slots=True)
class Samples:
    """All that was measured: per quantity and circumstances one value per repetition, in the order of repetitions."""

    units: dict[str, str] = field(default_factory=dict)
    values: dict[tuple[str, At], list[float]] = field(default_factory=dict)

    def add(self, name: str, unit: str, value: float, **at: int) -> None:
        self.units[name] = unit
        self.values.setdefault((name, tuple(sorted(at.items()))), []).append(value)

    def last(self, name: str, **at: int) -> float:
        """The newest value."""
        return self.values[name, tuple(sorted(at.items()))][-1]

    def figures(self) -> list[Figure]:
        """What was measured, then what follows from it, pair by pair."""
        found = [Figure(name, self.units[name], tuple(values), at) for (name, at), values in self.values.items()]
        return found + [
            self._ratio(ratio, at) for ratio in RATIOS for name, at in self.values if self._has_ratio(ratio, name, at)
        ]

    def _has_ratio(self, ratio: str, name: str, at: At) -> bool:
        over, under = RATIOS[ratio]
        return name == over and (under, at) in self.values

    def _ratio(self, ratio: str, at: At) -> Figure:
        over, under = (self.values[name, at] for name in RATIOS[ratio])
        # Not strict: what ended in the middle of a repetition leaves one more of the first.
        return Figure(ratio, "ratio", tuple(x / y for x, y in zip(over, under, strict=False)), at)


def write_json(path: Path, figures: Iterable[Figure], machine: Mapping[str, Any]) -> None:
    """A list with one object, and one line, per figure; each also says on which machine it was taken."""
    rows = [json.dumps(figure.as_json() | {"machine": dict(machine)}) for figure in figures]
    path.write_text("[\n" + ",\n".join(rows) + "\n]\n")


def warnings(figures: Sequence[Figure], machine: Mapping[str, Any]) -> list[str]:
    """Why figures must not be believed."""
    found = []
    if (load := machine.get("load_before", 0.0)) > QUIET:
        found.append(f"THE MACHINE WAS NOT QUIET before the start (load {load}): other processes are in these figures.")
    for figure in figures:
        where = ", ".join(f"{value} {name}" for name, value in figure.at)
        if figure.name.endswith("missed") and any(figure.values):
            found.append(f"{sum(figure.values):g} TOKENS WERE NOT STEERED ({figure.name}, {where}): not comparable.")
        if figure.name == "other_answers" and any(figure.values):
            found.append(f"{sum(figure.values):g} ANSWERS DIFFER with and without look-ahead ({where}): they must not.")
        if figure.name == "step_ratio" and figure.at == ONE and figure.median < MIN_STEP_RATIO:
            found.append(f"THE SMALL MODEL IS TOO LARGE: a step of the large one takes {figure.median:.1f} times as long, "
                         f"not {MIN_STEP_RATIO:g} times.")  # fmt: skip
    return found


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 or value == 0 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
