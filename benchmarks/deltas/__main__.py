"""``python -m benchmarks.deltas --out DIR [--data DIR] [--quick]``: measure coded deltas, write a table, figures and two plots.

Without ``--data`` the families of real text are left out.
"""

import argparse
import json
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.deltas.measures import STRENGTHS, TOP_512, Point, measure
from benchmarks.deltas.triples import Triple, neural_like, of_the_demo_pair
from costeer_vllm.delta.choice import WORTH
from costeer_vllm.demo.scores import load_pair
from costeer_vllm.demo.task import held_out

VOCABS = (32_000, 151_936)
WIDENED_BY = 60_000_000  # characters of Python source: the rows alone do not have 152k different tokens
QUERIES = 40  # of the demo
EVERY = 11  # of the positions of a real answer


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.deltas", description=str(__doc__).partition(": ")[2])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of the evaluation's data sets: see docs/evaluation.md")
    parser.add_argument("--positions", type=int, default=2000, help="of each family, at most")
    parser.add_argument("--quick", action="store_true", help="few positions: to see that it runs")
    parser.add_argument("--again", type=Path, metavar="JSON", help="draw table and plots anew from an earlier deltas.json")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    if options.again:
        points = [Point(**point) for point in json.loads(options.again.read_text(encoding="utf-8"))]
    else:
        points = run(options.data, 20 if options.quick else options.positions)
    write(points, options.out)


def run(data: Path | None, positions: int) -> list[Point]:
    """All families, ``positions`` of each."""
    points: list[Point] = []
    columns = TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        for family, triples in families(data, positions):
            task = progress.add_task(family, total=positions)
            points += measure(family, islice(triples(), positions), lambda task=task: progress.advance(task))  # type: ignore[misc]
            progress.update(task, total=points[-1].positions)
    return points


def families(data: Path | None, positions: int) -> Iterator[tuple[str, Callable[[], Iterable[Triple]]]]:
    """By name; nothing is made before its turn."""
    yield "demo pair (neural, real)", lambda: of_the_demo_pair(load_pair(), held_out(QUERIES), STRENGTHS)
    for vocab in VOCABS if data else ():
        yield f"n-grams of real text, {vocab / 1000:.0f}k", lambda vocab=vocab: real_text(data, vocab)  # type: ignore[misc]
    for vocab in VOCABS:
        yield f"neural-like, {vocab / 1000:.0f}k", lambda vocab=vocab: neural_like(vocab, positions)  # type: ignore[misc]


def real_text(data: Path, vocab: int) -> Iterator[Triple]:
    from benchmarks.deltas.ngrams import Models, read_samples, split, train_tokenizer

    training, held_out_samples = split(read_samples(data))
    texts = [f"{sample.context}\n{sample.query}\n{sample.answer}" for sample in training]
    tokenizer = train_tokenizer(texts if vocab < 100_000 else [*texts, *_python_sources(WIDENED_BY)], vocab)
    models = Models(tokenizer, training, vocab)
    for sample in held_out_samples:
        yield from models.triples(sample, EVERY)


def _python_sources(length: int) -> Iterator[str]:
    """``length`` characters of the sources installed here."""
    for path in sorted(Path(sysconfig.get_path("purelib")).rglob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        yield text
        length -= len(text)
        if length < 0:
            return


def write(points: list[Point], folder: Path) -> None:
    """Table, figures and plots."""
    from benchmarks.deltas.plots import plot

    (folder / "deltas.md").write_text(markdown(points), encoding="utf-8")
    (folder / "deltas.json").write_text(json.dumps([asdict(point) for point in points], indent=1) + "\n", encoding="utf-8")
    plot(points, folder)
    print(markdown(points))


def markdown(points: list[Point]) -> str:
    """The default and what was before, at every strength."""
    columns = "positions", "strength", "bytes: median", "mean", "p99", "KL: mean", "p99", "greedy changed", "near ties"
    lines = [f"| {' | '.join(columns)} | before: bytes | KL | greedy |", "|---|" + "---:|" * 11]
    for point in points:
        if point.code == WORTH:
            (old,) = (p for p in points if (p.family, p.strength, p.code) == (point.family, point.strength, TOP_512))
            lines.append(
                f"| {point.family} | {point.strength:g} "
                f"| {point.bytes_median:.0f} | {point.bytes_mean:.0f} | {point.bytes_p99:.0f} "
                f"| {point.kl_mean:.1e} | {point.kl_p99:.1e} | {point.greedy_changed:.2%} | {point.greedy_near:.1%} "
                f"| {old.bytes_median:.0f} | {old.kl_mean:.1e} | {old.greedy_changed:.2%} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
