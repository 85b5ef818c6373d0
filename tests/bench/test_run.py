"""One part that fails costs no other its figures, and what was measured is on the disk before the end."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from costeer_vllm.bench import run
from costeer_vllm.bench.bench import Bench
from costeer_vllm.bench.run import PARTS, Outputs, Part, PartsFailed, run_bench
from costeer_vllm.bench.settings import QUICK
from costeer_vllm.cli import app


def rows(path: Path) -> dict[str, Any]:
    return {row["name"]: row for row in json.loads(path.read_text())}


def part(measure: Any) -> Part:
    return Part(lambda bench: 2, measure, lambda bench: [f"{bench.folder.name} was measured"])


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Part]:
    """Of which the middle one fails, after one repetition of two."""

    def good(bench: Bench) -> None:
        for label in bench.repetitions():
            bench.say(label)
            bench.samples.add(f"of {bench.folder.name}", "ms", 1.0)

    def bad(bench: Bench) -> None:
        bench.say("the first")
        bench.samples.add("half", "ms", 2.0)
        bench.say("the second")
        seen.update(rows(tmp_path / "bench.json"))
        raise KeyError("no such thing")

    seen: dict[str, Any] = {}
    parts = {"first": part(good), "broken": part(bad), "last": part(good)}
    monkeypatch.setattr(run, "PARTS", parts)
    with pytest.raises(PartsFailed, match="1 of 3 parts failed:\nbroken: KeyError: 'no such thing'"):
        run_bench(QUICK, list(parts), Outputs(tmp_path / "bench.json", tmp_path / "bench.md", tmp_path / "plots"))
    assert {"of first", "half"} <= seen.keys()  # before it failed
    return parts


def test_what_fails_costs_only_itself(parts: dict[str, Part], tmp_path: Path) -> None:
    assert set(rows(tmp_path / "bench.json")) == {"of first", "half", "of last"}


def test_the_report_says_what_is_missing(parts: dict[str, Part], tmp_path: Path) -> None:
    text = (tmp_path / "bench.md").read_text()
    assert "* last was measured" in text
    assert "* MISSING, or not whole: broken: KeyError" in text


def test_the_quick_report_of_what_needs_no_server(tmp_path: Path) -> None:
    """The command as a user gives it; the other parts want vLLM for minutes."""
    found = tmp_path / "bench.json"
    command = ["bench", "--quick", "--only", "kernel,hub", "--json", str(found), "--markdown", str(tmp_path / "bench.md")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    figures = rows(found)
    assert figures["hub_lost"]["value"] == 0
    assert figures["hub_p99"]["edges"] == QUICK.edges
    assert {"steer/copy float32", "steer/copy float16", "steer/copy bfloat16"} <= figures.keys()
    assert "the hub alone" in (tmp_path / "bench.md").read_text()


def test_every_part_says_what_a_reader_must_know(tmp_path: Path) -> None:
    bench = Bench(QUICK, run.machine.choose_cores(), tmp_path, print)
    for name, part in PARTS.items():
        assert part.num_steps(bench) > 0, name
        assert all(note.endswith(".") for note in part.notes(bench)), name
