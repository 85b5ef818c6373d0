"""The performance report: its parts one after the other, and what each leaves behind even if it, or the next one, fails."""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from costeer_vllm.bench import alone, machine, neighbors, phases, plots, report, round_trips
from costeer_vllm.bench.bench import Bench
from costeer_vllm.bench.figures import Samples, write_json
from costeer_vllm.bench.settings import BenchSettings
from costeer_vllm.errors import CoSteerError


class PartsFailed(CoSteerError):
    """Parts of the report are missing or not whole; all that was measured was shown and written."""


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of the report that stands alone."""

    num_steps: Callable[[Bench], int]  # calls of Bench.say
    measure: Callable[[Bench], None]
    notes: Callable[[Bench], list[str]]


PARTS = {
    "phases": Part(phases.num_steps, phases.measure, phases.notes),
    "round-trips": Part(round_trips.num_steps, round_trips.measure, round_trips.notes),
    "neighbors": Part(neighbors.num_steps, neighbors.measure, neighbors.notes),
    "hub": Part(alone.hub_steps, alone.measure_hub, alone.hub_notes),
    "kernel": Part(alone.kernel_steps, alone.measure_kernel, alone.kernel_notes),
}


@dataclass(frozen=True, slots=True)
class Outputs:
    """Where the report goes, besides the terminal."""

    json: Path | None = None  # as it grows
    markdown: Path | None = None
    plots: Path | None = None  # a folder


def run_bench(settings: BenchSettings, names: Sequence[str], outputs: Outputs) -> None:
    """Measure the parts named, print tables and notes, and write what ``outputs`` asks for.

    Raises:
        Unsupported: if plots are asked for and cannot be drawn.
        PartsFailed: at the end, if anything did not work.
    """
    if outputs.plots is not None:
        plots.check()
    console, facts = Console(), machine.facts() | {"load_before": machine.load()}
    samples, failures, notes = Samples(), [], list[str]()
    with tempfile.TemporaryDirectory(prefix="costeer-bench-") as name, Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=0)

        def on_step(what: str) -> None:
            progress.update(task, description=what, advance=1)
            if not console.is_terminal:  # a log has no progress bar
                console.print(f"{time.strftime('%H:%M:%S')} {what}", highlight=False)
            _save(outputs.json, samples, facts)

        benches = {part: _bench(settings, Path(name) / part, on_step, samples) for part in names}
        progress.update(task, total=sum(PARTS[part].num_steps(bench) for part, bench in benches.items()))
        for part, bench in benches.items():
            notes += PARTS[part].notes(bench)
            if (failure := _attempt(part, bench)) is not None:
                console.print(failure, style="bold red", markup=False, highlight=False)
                failures.append(failure.splitlines()[0])
    _publish(console, outputs, samples, facts, notes + [f"MISSING, or not whole: {failure}" for failure in failures])
    if failures:
        raise PartsFailed(f"costeer bench: {len(failures)} of {len(names)} parts failed:\n" + "\n".join(failures))


def _bench(settings: BenchSettings, folder: Path, on_step: Callable[[str], None], samples: Samples) -> Bench:
    folder.mkdir()
    return Bench(settings, machine.choose_cores(), folder, on_step, samples)


def _attempt(part: str, bench: Bench) -> str | None:
    """Measure; what went wrong, whatever it was, for it must not cost the figures of the other parts."""
    try:
        PARTS[part].measure(bench)
        return None
    except Exception as error:
        return f"{part}: {type(error).__name__}: {error}"


def _save(path: Path | None, samples: Samples, facts: dict[str, Any]) -> None:
    if path is not None:
        write_json(path, samples.figures(), facts)


def _publish(console: Console, outputs: Outputs, samples: Samples, facts: dict[str, Any], notes: list[str]) -> None:
    figures = samples.figures()
    report.show(console, figures, facts, notes)
    _save(outputs.json, samples, facts)
    if outputs.markdown is not None:
        report.write_markdown(outputs.markdown, report.markdown(figures, facts, notes))
    if outputs.plots is not None:
        plots.draw(figures, outputs.plots)
