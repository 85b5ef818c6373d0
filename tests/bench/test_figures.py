"""Statistics, paired ratios, targets, the layout of the JSON file, and the warnings."""

import json
from pathlib import Path

import pytest

from costeer_vllm.bench.figures import EIGHT, ONE, TARGETS, Figure, Samples, warnings, write_json

MACHINE = {"cores": 2, "cpu": "an abacus"}


@pytest.fixture
def samples() -> Samples:
    samples = Samples()
    for streams, factor in ((1, 1.0), (8, 5.0)):
        for plain, idle, steered, serial in ((20, 19, 16, 8), (10, 10, 9, 5), (40, 36, 36, 9)):
            for name, value in (("plain", plain), ("idle", idle), ("steered", steered)):
                samples.add(name, "tokens/s", value * factor, streams=streams)
            samples.add("serial", "tokens/s", serial, streams=streams)
            samples.add("plain_step", "ms", 50.0, streams=streams)
            samples.add("small_step", "ms", 5.0, streams=streams)
            samples.add("steered_missed", "tokens", 0, streams=streams)
    return samples


def figure(samples: Samples, name: str, **at: int) -> Figure:
    (found,) = (figure for figure in samples.figures() if (figure.name, dict(figure.at)) == (name, at))
    return found


def test_a_figure_is_the_median_of_its_repetitions() -> None:
    assert Figure("plain", "tokens/s", (3.0, 1.0, 10.0, 4.0), EIGHT).as_json() == {
        "name": "plain", "streams": 8, "value": 3.5, "unit": "tokens/s",
        "repetitions": 4, "minimum": 1.0, "median": 3.5, "maximum": 10.0,
    }  # fmt: skip


def test_ratios_are_paired_by_repetition(samples: Samples) -> None:
    assert figure(samples, "steered/plain", streams=1).values == (0.8, 0.9, 0.9)
    assert figure(samples, "steered/plain", streams=8).values == pytest.approx((0.8, 0.9, 0.9))
    assert figure(samples, "idle/plain", streams=1).median == 0.95
    assert figure(samples, "steered/serial", streams=8).median == 10.0
    assert figure(samples, "step_ratio", streams=1).values == (10.0, 10.0, 10.0)


def test_the_last_value_is_that_of_the_circumstances(samples: Samples) -> None:
    assert samples.last("steered", streams=8) == 180.0


def test_what_was_not_measured_has_no_ratio() -> None:
    samples = Samples()
    samples.add("plain", "tokens/s", 2.0, streams=1)
    samples.add("idle", "tokens/s", 2.0, streams=8)
    assert [figure.name for figure in samples.figures()] == ["plain", "idle"]


def test_a_repetition_that_was_cut_off_costs_only_itself(samples: Samples) -> None:
    samples.add("plain", "tokens/s", 1000.0, streams=1)
    assert figure(samples, "steered/plain", streams=1).values == (0.8, 0.9, 0.9)
    assert len(figure(samples, "plain", streams=1).values) == 4


@pytest.mark.parametrize(("value", "met"), [(0.96, True), (0.95, True), (0.94, False)])
def test_a_target_is_met_at_its_bound(value: float, met: bool) -> None:
    row = Figure("steered/plain", "ratio", (value,), ONE).as_json()
    assert (row["target"], row["met"]) == ("≥ 0.95", met)


@pytest.mark.parametrize(("value", "met"), [(0.0, True), (1.0, False)])
def test_some_targets_are_met_from_below(value: float, met: bool) -> None:
    row = Figure("hub_lost", "deltas", (value,), (("edges", 1000),)).as_json()
    assert (row["target"], row["met"]) == ("≤ 0", met)


def test_circumstances_without_a_target_have_none() -> None:
    assert "target" not in Figure("steered/plain", "ratio", (0.5,), (("streams", 32),)).as_json()
    assert len({(target.name, target.at) for target in TARGETS}) == len(TARGETS)


def test_the_json_file_is_a_list_of_figures_with_their_machine(samples: Samples, tmp_path: Path) -> None:
    figures = samples.figures()
    write_json(tmp_path / "bench.json", figures, MACHINE)
    rows = json.loads((tmp_path / "bench.json").read_text())
    assert len(rows) == len(figures) == 2 * (7 + 4)
    keys = {"name", "streams", "value", "unit", "repetitions", "minimum", "median", "maximum", "machine"}
    assert all(set(row) - {"target", "met"} == keys and row["machine"] == MACHINE for row in rows)
    assert {row["name"] for row in rows if "met" in row} == {"idle/plain", "steered/plain", "steered/serial"}


def test_a_file_of_nothing_is_still_json(tmp_path: Path) -> None:
    write_json(tmp_path / "bench.json", [], MACHINE)
    assert json.loads((tmp_path / "bench.json").read_text()) == []


def test_nothing_is_wrong_with_good_figures(samples: Samples) -> None:
    assert warnings(samples.figures(), MACHINE | {"load_before": 0.1}) == []


def test_missed_tokens_are_shouted(samples: Samples) -> None:
    samples.values["steered_missed", EIGHT][1] = 3
    (warning,) = warnings(samples.figures(), MACHINE)
    assert warning.startswith("3 TOKENS WERE NOT STEERED")
    assert "8 streams" in warning


def test_other_answers_with_look_ahead_are_shouted(samples: Samples) -> None:
    samples.add("other_answers", "answers", 1, round_trip_ms=50)
    (warning,) = warnings(samples.figures(), MACHINE)
    assert warning.startswith("1 ANSWERS DIFFER")


def test_a_small_model_that_is_not_small_is_shouted(samples: Samples) -> None:
    samples.values["small_step", ONE][:] = [12.0, 12.0, 12.0]
    (warning,) = warnings(samples.figures(), MACHINE)
    assert "TOO LARGE" in warning
    assert "4.2 times" in warning


def test_a_busy_machine_is_shouted(samples: Samples) -> None:
    (warning,) = warnings(samples.figures(), MACHINE | {"load_before": 1.7})
    assert "NOT QUIET" in warning
