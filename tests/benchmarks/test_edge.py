"""The benchmark of the edge worker runs, and its figures are what they are called."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import edge
from costeer_vllm.demo.export import MODELS


def test_a_figure_is_one_row() -> None:
    assert edge.Figure("a", "ms", [3.0, 1.0, 2.5]).row() == {
        "name": "a",
        "unit": "ms",
        "repetitions": 3,
        "minimum": 1.0,
        "median": 2.5,
        "maximum": 3.0,
    }


def test_a_step_is_measured_with_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge, "STEPS", 2)
    context = tmp_path / "me.md"
    context.write_text("I am Wilhelmina.")
    turn, model, rest = edge.times_of_steps("demo", MODELS / "small", context, 2, 3)
    assert all(len(figure.values) == 3 for figure in (turn, model, rest))
    assert min(turn.values) >= min(model.values) > 0
    assert [figure.name for figure in (turn, model, rest)] == [
        "turn; demo",
        "of it the small model; demo",
        "of it all else; demo",
    ]


def test_the_result_is_a_list_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge, "PARTS", {"step": lambda repetitions: iter([edge.Figure("a", "ms", [1.0] * repetitions)])})
    monkeypatch.setattr(sys, "argv", ["edge", "--only", "step", "--repetitions", "7", "--json", str(tmp_path / "edge.json")])
    edge.main()
    (row,) = json.loads((tmp_path / "edge.json").read_text())
    assert (row["name"], row["repetitions"]) == ("a", 7)


def test_an_unknown_part_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["edge", "--only", "warm,sponge"])
    with pytest.raises(SystemExit):
        edge.main()
    assert "--only sponge: choose from warm, step, variants, guesses" in capsys.readouterr().err
