"""What was found, as PNG files."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.privacy.cases import SETS
from benchmarks.privacy.experiments import MAIN, SEEN, Curve, Found
from benchmarks.privacy.measures import NUM_TOKENS, Share

BLUE, ORANGE, GREEN, PURPLE, GRAY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#666666"  # of Okabe and Ito
TITLES = {name: title.replace(": ", "\n") for name, title in SETS.items()}
SHORT = {"people": "different people", "hobby": "another hobby (stated)", "sister": "another sister (never stated)"}
COLORS = {"people": BLUE, "hobby": ORANGE, "sister": GREEN}
CHANNELS = {  # color, marker, its size, line, label: what is drawn first lies below
    "full deltas": (PURPLE, "s", 9, "-", "full deltas (cloud fusion)"),
    "sparse deltas": (GREEN, "o", 6, "-", "sparse deltas (cloud fusion)"),
    "full deltas, attacker in bfloat16": (PURPLE, "x", 7, ":", "full deltas, attacker in bfloat16"),
    "sparse deltas, attacker in bfloat16": (GREEN, "+", 8, ":", "sparse deltas, attacker in bfloat16"),
    "tokens": (BLUE, "o", 4, "-", "tokens (edge fusion)"),
}


def plot(found: Found, folder: Path) -> None:
    """``privacy-tokens.png``, ``privacy-budget.png`` and ``privacy-ledger.png`` in ``folder``."""
    _tokens(found).savefig(folder / "privacy-tokens.png")
    _budget(found).savefig(folder / "privacy-budget.png")
    _ledger(found).savefig(folder / "privacy-ledger.png")


def _figure(width: float, height: float) -> Any:
    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def _tokens(found: Found) -> Any:
    figure = _figure(12, 4.4)
    panels = figure.subplots(1, len(SETS), sharey=True)
    curves = {(c.candidates, c.channel): c for c in found.tokens + found.deltas if c.sampling == MAIN}
    for axes, (candidates, title) in zip(panels, TITLES.items(), strict=True):
        for channel, (color, marker, size, line, label) in CHANNELS.items():
            style = {"color": color, "marker": marker, "markersize": size, "linestyle": line}
            _line(axes, curves[candidates, channel], label=label, **style)
        axes.axhline(1 / found.size.num_contexts, color=GRAY, linewidth=0.8, linestyle="--", label="a blind guess")
        axes.set_title(title, fontsize=10)
        axes.set_xscale("log", base=2)
        axes.set_xticks(NUM_TOKENS, [str(num) for num in NUM_TOKENS])
        axes.minorticks_off()
        axes.set_xlabel("tokens seen")
        _tidy(axes)
    panels[0].set_ylim(0, 1.08)
    panels[0].set_ylabel("true context guessed (share)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def _line(axes: Any, curve: Curve, **style: Any) -> None:
    at = [point.tokens for point in curve.points]
    low, high = [point.accuracy.low for point in curve.points], [point.accuracy.high for point in curve.points]
    if curve.channel == "tokens":
        axes.fill_between(at, low, high, color=style["color"], alpha=0.2, linewidth=0)
    axes.plot(at, [point.accuracy.value for point in curve.points], **style)


def _budget(found: Found) -> Any:
    figure = _figure(10, 4.2)
    left, right = figure.subplots(1, 2)
    for candidates, name in SHORT.items():
        rows = [one for one in found.budgets if one.candidates == candidates]
        at = range(len(rows))
        aside = 0.08 * (list(SHORT).index(candidates) - 1)  # so that no interval hides another
        left.vlines([x + aside for x in at], *_ends([one.accuracy for one in rows]), color=COLORS[candidates], linewidth=0.8)
        expected = [one.expected for one in rows]
        left.plot([x + aside for x in at], expected, color=COLORS[candidates], marker="o", markersize=4, label=name)
        right.plot(at, [one.shown for one in rows], color=COLORS[candidates], marker="o", markersize=4, label=name)
    left.plot(at, [one.bound for one in rows], color="black", linestyle="--", label="bound on any attacker")
    left.axhline(1 / found.size.num_contexts, color=GRAY, linewidth=0.8, linestyle=":", label="a blind guess")
    left.set_title(
        f"True context guessed from {SEEN} tokens (share, less is better)\ndots: expected; bars: guessed, 95 %", fontsize=10
    )
    right.set_title("Profile shown by the answer\n(share, more is better)", fontsize=10)
    for axes in (left, right):
        axes.set_xticks(at, ["none" if one.max_bits is None else f"{one.max_bits:g}" for one in rows])
        axes.set_xlabel("max_bits")
        axes.set_ylim(0, 1.06)
        _tidy(axes)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    return figure


def _ends(shares: list[Share]) -> tuple[list[float], list[float]]:
    return [share.low for share in shares], [share.high for share in shares]


def _ledger(found: Found) -> Any:
    figure = _figure(7, 4.4)
    axes = figure.subplots()
    for curve in found.tokens:
        if curve.sampling == MAIN:
            ledger, true = zip(*((point.ledger or 0.0, point.true or 0.0) for point in curve.points), strict=True)
            axes.plot(ledger, true, color=COLORS[curve.candidates], marker="o", markersize=4, label=SHORT[curve.candidates])
            aside = (-5, -12) if curve.candidates == "sister" else (-5, 4)
            labelled = -1.0
            for num, x, y in zip(NUM_TOKENS, ledger, true, strict=True):
                if x - labelled > 2:
                    style = {"fontsize": 8, "color": COLORS[curve.candidates], "ha": "center"}
                    axes.annotate(f"{num}", (x, y), aside, textcoords="offset points", **style)
                    labelled = x
    axes.axline((0, 0), slope=1, color=GRAY, linewidth=0.8, linestyle="--", label="all of the ledger")
    axes.set_ylim(-0.4, 4.6)
    axes.set_xlim(left=0)
    axes.set_xlabel("the device's ledger (bits, mean)")
    axes.set_ylabel("for the true context (bits, mean)")
    axes.set_title("What the ledger counts, and what tells the candidates apart\n(figures at the dots: tokens seen)", fontsize=10)
    axes.legend(frameon=False, fontsize=9, loc="center", bbox_to_anchor=(0.45, 0.5))
    _tidy(axes)
    return figure


def _tidy(axes: Any) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
