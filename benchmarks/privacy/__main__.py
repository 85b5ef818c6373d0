"""``python -m benchmarks.privacy --out DIR [--quick]``: run the attack, write privacy.md, privacy.json and three plots."""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import msgspec
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.privacy.cases import SETS
from benchmarks.privacy.experiments import (
    BUDGETS,
    QUICK,
    SETTINGS,
    Advance,
    Found,
    Size,
    attack_deltas,
    attack_tokens,
    keep_ledgers,
    look_outside,
    spend_budgets,
)
from benchmarks.privacy.report import markdown
from costeer_vllm.demo.export import export
from costeer_vllm.demo.scores import load_pair


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.privacy", description=str(__doc__).partition(": ")[2])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="few queries and candidates: to see that it runs")
    parser.add_argument(
        "--pair", type=Path, metavar="DIR", help="a folder as `costeer demo --export` writes; default: the demo's"
    )
    parser.add_argument("--again", type=Path, metavar="JSON", help="draw table and plots anew from an earlier privacy.json")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    if options.again:
        found = msgspec.json.decode(options.again.read_bytes(), type=Found)
    else:
        with tempfile.TemporaryDirectory() as folder:
            found = run(options.pair or export(folder), QUICK if options.quick else Size())
    write(found, options.out)
    sys.exit(0 if found.holds else 1)


def run(folder: Path, size: Size) -> Found:
    """All experiments with the pair below ``folder``."""
    pair = load_pair(folder)
    columns = TextColumn("{task.description:8}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:

        def bar(name: str, total: int | None) -> Advance:
            task = progress.add_task(name, total=total)
            return lambda: progress.advance(task)

        tokens, answered = attack_tokens(pair, folder, size, bar("tokens", len(SETS) * len(SETTINGS) * size.num_queries))
        deltas = attack_deltas(pair, answered, size, bar("deltas", len(SETS) * size.num_fewer * size.num_contexts))
        budgets = spend_budgets(pair, folder, answered, size, bar("budgets", len(SETS) * len(BUDGETS) * size.num_fewer))
        ledgers = keep_ledgers(pair, folder, size, bar("ledgers", None))
        return Found(size, tokens, deltas, budgets, ledgers, look_outside(pair, folder, size, bar("top k", None)))


def write(found: Found, folder: Path) -> None:
    """Table, figures and plots."""
    from benchmarks.privacy.plots import plot

    (folder / "privacy.md").write_text(markdown(found), encoding="utf-8")
    (folder / "privacy.json").write_text(json.dumps(asdict(found), indent=1) + "\n", encoding="utf-8")
    plot(found, folder)
    print(markdown(found))


if __name__ == "__main__":
    main()
