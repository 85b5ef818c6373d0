"""What was found, as PNG files: bytes against KL divergence, bytes against changed greedy tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.deltas.measures import STRENGTHS, TOP_512, Point
from costeer_vllm.delta.choice import WORTH

COLORS = dict(zip(STRENGTHS, ("#0072b2", "#009e73", "#cc79a7", "#d55e00"), strict=True))  # of Okabe and Ito
GRAY = "#666666"
BYTES = (30, 100, 300, 1000, 3000)


def plot(points: Sequence[Point], folder: Path) -> None:
    """``deltas-kl.png`` and ``deltas-greedy.png`` in ``folder``."""
    _panels(points, "kl_mean", "KL divergence from the exact policy (nats, mean)", 1e-3).savefig(folder / "deltas-kl.png")
    _panels(points, "greedy_changed", "greedy tokens changed (share)", 1e-3).savefig(folder / "deltas-greedy.png")


def _panels(points: Sequence[Point], measure: str, label: str, target: float) -> Any:
    families = list(dict.fromkeys((p.family, p.vocab, p.positions) for p in points))
    figure = Figure(figsize=(12, 7.6), dpi=110, layout="constrained")
    panels = figure.subplots(2, 3, sharey=True).ravel()
    for axes, (family, vocab, positions) in zip(panels, families, strict=False):
        for strength in STRENGTHS:
            _line(axes, [p for p in points if (p.family, p.strength) == (family, strength)], measure)
        axes.axhline(target, color=GRAY, linewidth=0.8, linestyle="--", label="target")
        axes.axvline(400, color=GRAY, linewidth=0.8, linestyle=":", label="400 bytes")
        axes.set_title(f"{family}\n{vocab:,} tokens, {positions:,} positions", fontsize=10)
        axes.set_xscale("log")
        axes.set_xlim(25, 4500)
        axes.set_xticks(BYTES, [f"{size:,}" for size in BYTES])
        axes.minorticks_off()
        if measure == "greedy_changed":
            axes.set_yscale("symlog", linthresh=1e-4)
            axes.set_ylim(0, 0.2)
        else:
            axes.set_yscale("log")
        axes.set_xlabel("bytes a token (mean)")
        axes.tick_params(labelleft=True)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(label)
    panels[3].set_ylabel(label)
    for axes in panels[len(families) :]:
        axes.set_axis_off()
        axes.legend(*panels[0].get_legend_handles_labels(), loc="center", frameon=False, fontsize=10)
    return figure


def _line(axes: Any, points: Sequence[Point], measure: str) -> None:
    color = COLORS[points[0].strength]
    coded = [p for p in points if p.code != TOP_512]
    axes.plot(
        [p.bytes_mean for p in coded],
        [getattr(p, measure) for p in coded],
        color=color,
        marker="o",
        markersize=3,
        label=f"strength {points[0].strength}",
    )
    default = next(p for p in points if p.code == WORTH)
    last = points[0].strength == STRENGTHS[-1]
    axes.plot(
        default.bytes_mean,
        getattr(default, measure),
        color=color,
        marker="*",
        markersize=13,
        linestyle="",
        clip_on=False,
        label="the default" if last else None,
    )
    before = next(p for p in points if p.code == TOP_512)
    axes.plot(
        before.bytes_mean,
        getattr(before, measure),
        color=color,
        marker="x",
        markersize=8,
        linestyle="",
        label="before: top 512 as float16" if last else None,
    )
