"""Statistics, paired ratios, the layout of the JSON file, and the warnings."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from costeer_vllm.bench.report import Figure, Samples, show, warnings, write_json

MACHINE = {"cores": 2, "cpu": "an abacus"}


@pytest.fixture
def samples() -> Samples:
    samples = Samples()
    for streams, factor in ((1, 1.0), (8, 5.0)):
        for plain, idle, steered, serial in ((20, 19, 16, 8), (10, 10, 9, 5), (40, 36, 36, 9)):
            for name, value in (("plain", plain), ("idle", idle), ("steered", steered)):
                samples.add(name, streams, "tokens/s", value * factor)
            samples.add("serial", streams, "tokens/s", serial)
            samples.add("plain_step", streams, "ms", 50.0)
            samples.add("small_step", streams, "ms", 5.0)
            samples.add("missed", streams, "tokens", 0)
    return samples


def by_name(samples: Samples) -> dict[tuple[str, int], Figure]:
    return {(figure.name, figure.streams): figure for figure in samples.figures()}


def test_a_figure_is_the_median_of_its_repetitions() -> None:
    figure = Figure("plain", 1, "tokens/s", (3.0, 1.0, 10.0, 4.0))
    assert figure.as_json() == {
        "name": "plain", "streams": 1, "value": 3.5, "unit": "tokens/s",
        "repetitions": 4, "minimum": 1.0, "median": 3.5, "maximum": 10.0,
    }  # fmt: skip


def test_ratios_are_paired_by_repetition(samples: Samples) -> None:
    figures = by_name(samples)
    assert figures["steered/plain", 1].values == (0.8, 0.9, 0.9)
    assert figures["steered/plain", 8].values == pytest.approx((0.8, 0.9, 0.9))
    assert figures["idle/plain", 1].median == 0.95
    assert figures["steered/serial", 8].median == 10.0
    assert figures["step_ratio", 1].values == (10.0, 10.0, 10.0)


def test_what_was_not_measured_has_no_ratio() -> None:
    samples = Samples()
    samples.add("plain", 1, "tokens/s", 2.0)
    assert [figure.name for figure in samples.figures()] == ["plain"]


def test_repetitions_that_do_not_pair_are_a_bug(samples: Samples) -> None:
    samples.add("plain", 1, "tokens/s", 2.0)
    with pytest.raises(ValueError, match="zip"):
        samples.figures()


def test_the_json_file_is_a_list_of_figures_with_their_machine(samples: Samples, tmp_path: Path) -> None:
    figures = samples.figures()
    write_json(tmp_path / "bench.json", figures, MACHINE)
    rows = json.loads((tmp_path / "bench.json").read_text())
    assert len(rows) == len(figures) == 2 * (7 + 4)
    keys = {"name", "streams", "value", "unit", "repetitions", "minimum", "median", "maximum", "machine"}
    assert all(set(row) == keys and row["machine"] == MACHINE for row in rows)
    names = {row["name"] for row in rows}
    assert names >= {"plain", "idle", "steered", "serial", "idle/plain", "steered/plain", "steered/serial", "step_ratio"}


def test_the_table_shows_every_ratio_and_the_notes(samples: Samples) -> None:
    console = Console(width=80, record=True)
    show(console, samples.figures(), MACHINE, ["a note"])
    text = console.export_text()
    assert "an abacus" in text
    assert "- a note" in text
    assert "0.95 (0.90-1.00)" in text
    assert "(a) / small model" in text
    assert "NOT STEERED" not in text


def test_missed_tokens_are_shouted(samples: Samples) -> None:
    samples.values["missed", 8][1] = 3
    (warning,) = warnings(samples.figures(), MACHINE)
    assert warning.startswith("3 TOKENS WERE NOT STEERED at 8 streams")


def test_a_small_model_that_is_not_small_is_shouted(samples: Samples) -> None:
    samples.values["small_step", 1][:] = [12.0, 12.0, 12.0]
    (warning,) = warnings(samples.figures(), MACHINE)
    assert "TOO LARGE" in warning
    assert "4.2 times" in warning


def test_a_busy_machine_is_shouted(samples: Samples) -> None:
    (warning,) = warnings(samples.figures(), MACHINE | {"load_before": 1.7})
    assert "NOT QUIET" in warning
