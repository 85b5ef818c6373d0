"""The figures as pictures, PNG; needs matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from costeer_vllm.bench.figures import TARGETS, Figure
from costeer_vllm.bench.report import PHASES
from costeer_vllm.errors import Unsupported

COLORS = ("#666666", "#0072b2", "#009e73", "#d55e00", "#cc79a7", "#e69f00")  # of Okabe and Ito, in the order of the phases
MET, MISSED = "#009e73", "#d55e00"


def draw(figures: Sequence[Figure], folder: Path) -> None:
    """``performance-phases.png``, ``performance-round-trips.png`` and ``performance-targets.png``, of what was measured.

    Raises:
        Unsupported: if matplotlib is not there.
    """
    check()
    folder.mkdir(parents=True, exist_ok=True)
    by_key = {(figure.name, dict(figure.at).get("streams")): figure for figure in figures}
    for name, picture in (("phases", _phases(by_key)), ("round-trips", _round_trips(figures)), ("targets", _targets(figures))):
        if picture is not None:
            picture.savefig(folder / f"performance-{name}.png")


def check() -> None:
    """Before all that time is spent on figures that cannot be drawn.

    Raises:
        Unsupported: if matplotlib is not there.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise Unsupported("costeer: plots need matplotlib: pip install '.[eval]', or leave --plots out") from None


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure as Picture

    picture = Picture(figsize=(width, height), dpi=110, layout="constrained")
    axes = picture.subplots()
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return picture, axes


def _phases(by_key: dict[tuple[str, int | None], Figure]) -> Any:
    counts = sorted({streams for name, streams in by_key if name in PHASES and streams is not None})
    if not counts:
        return None
    picture, axes = _figure(8, 4.8)
    width = 0.8 / len(PHASES)
    for i, (name, title) in enumerate(PHASES.items()):
        shown = [(at, by_key[name, streams]) for at, streams in enumerate(counts) if (name, streams) in by_key]
        places = [at + (i - (len(PHASES) - 1) / 2) * width for at, _ in shown]
        drawn = [figure for _, figure in shown]
        axes.bar(places, [figure.median for figure in drawn], 0.9 * width, color=COLORS[i], label=title)
        axes.errorbar(places, [figure.median for figure in drawn], _ranges(drawn), fmt="none", ecolor="black", capsize=2, lw=0.8)
    axes.set_xticks(range(len(counts)), [f"{streams} stream{'s' * (streams > 1)}" for streams in counts])
    axes.set_ylabel("tokens per second, all streams")
    axes.set_title("Medians; thin bars: minimum to maximum", fontsize=10)
    picture.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return picture


def _round_trips(figures: Sequence[Figure]) -> Any:
    lines = {"waiting": ("without look-ahead", MISSED, "o"), "look_ahead": ("with look-ahead", MET, "s")}
    if not any(figure.name in lines for figure in figures):
        return None
    picture, axes = _figure(6.5, 4.2)
    for name, (title, color, marker) in lines.items():
        shown = sorted((figure for figure in figures if figure.name == name), key=lambda figure: figure.at)
        if shown:
            places = [dict(figure.at)["round_trip_ms"] for figure in shown]
            medians = [figure.median for figure in shown]
            axes.errorbar(places, medians, _ranges(shown), color=color, marker=marker, markersize=5, capsize=3, label=title)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("round trip between the edge worker and the hub (ms)")
    axes.set_ylabel("tokens per second")
    axes.set_title("One stream of the demo pair, T = 1", fontsize=10)
    axes.legend(frameon=False, fontsize=9)
    return picture


def _targets(figures: Sequence[Figure]) -> Any:
    """How far each median is beyond its bound, as a factor: 1 is on it, to the right is better."""
    found = [(figure.target, figure) for figure in figures if figure.target is not None and figure.target.bound]
    found.sort(key=lambda pair: -TARGETS.index(pair[0]) if pair[0] else 0)
    if not found:
        return None
    picture, axes = _figure(8, 1.2 + 0.4 * len(found))
    for place, (target, figure) in enumerate(found):
        assert target is not None
        factor = figure.median / target.bound if target.at_least else target.bound / max(figure.median, 1e-9)
        axes.barh(place, factor, 0.6, color=MET if target.is_met(figure.median) else MISSED)
        axes.annotate(f"{figure.median:.3g}", (max(1.0, factor), place), (4, -3), textcoords="offset points", fontsize=8)
    axes.axvline(1, color="black", linewidth=0.9)
    axes.set_yticks(range(len(found)), [f"{target.title}, {target}" for target, _ in found if target], fontsize=8)
    axes.set_xlabel("median relative to its target")
    axes.set_title("At the line or to its right a target is met; figures: medians", fontsize=10)
    axes.set_xlim(0, max(2.0, axes.get_xlim()[1]))
    return picture


def _ranges(figures: Sequence[Figure]) -> list[list[float]]:
    """Down to the minimum, up to the maximum."""
    down = [figure.median - min(figure.values) for figure in figures]
    return [down, [max(figure.values) - figure.median for figure in figures]]
