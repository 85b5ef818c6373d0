"""The figures as tables: on a terminal, and as Markdown for a page that has a place for them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from costeer_vllm.bench.figures import RATIOS, TARGETS, Figure, warnings

BEGIN, END = "<!-- costeer bench: begin -->", "<!-- costeer bench: end -->"  # what lies between is replaced

PHASES = {
    "plain": "(a) plain vLLM",
    "idle": "(b) plugin loaded, idle",
    "steered": "(c) steered, cloud fusion",
    "edge_fused": "(d) steered, edge fusion",
    "serial": "(e) the paper's serial loop",
    "beside": "(f) plain vLLM, the small model at work beside it",
}


def _over(name: str) -> str:
    over, under = RATIOS[name]
    return f"{PHASES[over][:3]} / {PHASES[under][:3]}"


@dataclass(frozen=True, slots=True)
class Section:
    """One table: a row per quantity, a column per value of ``axis``, such as the number of streams."""

    title: str
    axis: str | None
    column: str  # how a value of the axis is called
    rows: Mapping[str, str]


SECTIONS = (
    Section("tokens per second, all streams", "streams", "{} at a time", PHASES),
    Section(
        "ratios, paired",
        "streams",
        "{} at a time",
        {
            name: _over(name)
            for name in ("idle/plain", "steered/plain", "edge_fused/plain", "steered/serial", "beside/plain", "steered/beside")
        },
    ),
    Section(
        "milliseconds per step",
        "streams",
        "{} at a time",
        {
            **{f"{phase}_step": PHASES[phase] for phase in ("plain", "idle", "steered", "edge_fused", "beside")},
            "small_step": "small model, both rows of every stream",
            "step_ratio": "(a) / small model",
            "encode": "deltas to bytes",
            "serial_large": "(e) large model",
            "serial_small": "(e) small model, twice",
            "serial_iterations": "(e) iterations of Eq. 7",
        },
    ),
    Section(
        "tokens per second of one stream, by round trip to the edge",
        "round_trip_ms",
        "{} ms",
        {"waiting": "without look-ahead", "look_ahead": "with look-ahead", "look_ahead/waiting": "ratio"},
    ),
    Section(
        "tokens per second of seven streams",
        None,
        "",
        {
            "beside_fast": "beside an eighth whose edge is as fast as theirs",
            "beside_slow": "beside an eighth whose edge answers in 500 ms",
            "beside_slow/beside_fast": "ratio",
        },
    ),
    Section(
        "the hub alone",
        "edges",
        "{} edges",
        {
            "hub_rate": "deltas per second",
            "hub_p50": "latency through it, median (ms)",
            "hub_p99": "latency through it, p99 (ms)",
            "hub_max": "latency through it, longest (ms)",
            "hub_lost": "lost",
            "hub_share": "share of its core",
            "load_share": "the load's share of another",
            "load_late_p99": "the load's own delay, p99 (ms)",
        },
    ),
    Section(
        "steer_inplace / copy of the same bytes, 64 rows of 152,064, dense deltas",
        "threads",
        "threads: {}",
        {f"steer/copy {kind}": kind for kind in ("float32", "float16", "bfloat16")},
    ),
)


@dataclass(frozen=True, slots=True)
class Grid:
    """A table ready to be shown; the first cell of each row is its name."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def grids(figures: Sequence[Figure]) -> list[Grid]:
    """The targets, then every section of which something was measured."""
    return [targets(figures), *(grid for section in SECTIONS if (grid := _grid(section, figures)).rows)]


def targets(figures: Iterable[Figure]) -> Grid:
    """What was to be reached, and what was."""
    by_key = {(figure.name, figure.at): figure for figure in figures}
    rows = []
    for target in TARGETS:
        figure = by_key.get((target.name, target.at))
        measured, met = "not measured", ""
        if figure is not None:
            measured, met = str(figure), "yes" if target.is_met(figure.median) else "**no**"
        rows.append((target.title, str(target), measured, met))
    return Grid("targets", ("target", "median (minimum-maximum)", "met"), tuple(rows))


def _grid(section: Section, figures: Iterable[Figure]) -> Grid:
    shown = {
        (figure.name, dict(figure.at).get(section.axis or "", 0)): str(figure)
        for figure in figures
        if figure.name in section.rows
    }
    columns = sorted({value for _, value in shown})
    rows = [(title, *(shown.get((name, value), "") for value in columns)) for name, title in section.rows.items()]
    return Grid(
        section.title, tuple(section.column.format(value) for value in columns), tuple(row for row in rows if any(row[1:]))
    )


def show(console: Console, figures: Sequence[Figure], machine: Mapping[str, Any], notes: Iterable[str]) -> None:
    """The tables, what must be known about them, and loudly what is wrong with them."""
    console.print(_machine(machine), highlight=False)
    for grid in grids(figures):
        table = Table(title=grid.title, title_justify="left")
        table.add_column("")
        for column in grid.head:
            table.add_column(column, justify="right")
        for row in grid.rows:
            table.add_row(*(cell.replace("**", "") for cell in row))
        console.print(table)
    for note in notes:
        console.print(f"- {note}", highlight=False)
    for warning in warnings(figures, machine):
        console.print(warning, style="bold red", highlight=False)


def markdown(figures: Sequence[Figure], machine: Mapping[str, Any], notes: Iterable[str]) -> str:
    """The same as text for a page."""
    parts = [_markdown(grid) for grid in grids(figures)]
    parts.append("\n".join(f"* {note}" for note in (*notes, f"Machine: {_machine(machine)}.")))
    parts += [f"**{warning}**" for warning in warnings(figures, machine)]
    return "\n\n".join(parts)


def write_markdown(path: Path, text: str) -> None:
    """Between the marks of a page that has them, else as a file of its own."""
    if path.exists() and BEGIN in (page := path.read_text()) and END in page:
        before, after = page.partition(BEGIN)[0], page.partition(END)[2]
        text = f"{before}{BEGIN}\n{text}\n{END}{after}"
    else:
        text += "\n"
    path.write_text(text)


def _markdown(grid: Grid) -> str:
    lines = [("**" + grid.title + "**", *grid.head), ("---",) * (1 + len(grid.head)), *grid.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _machine(machine: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in machine.items())
