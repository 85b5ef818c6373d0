"""The tables hold what was measured, on a terminal, as Markdown and in pictures; a page is kept except what its marks enclose."""

import re
from pathlib import Path

import pytest
from rich.console import Console

from costeer_vllm.bench import plots
from costeer_vllm.bench.alone import HUB_FIGURES
from costeer_vllm.bench.figures import RATIOS, TARGETS, Samples
from costeer_vllm.bench.report import BEGIN, END, SECTIONS, grids, markdown, show, write_markdown

MACHINE = {"cores": 2, "cpu": "an abacus"}
PNG = b"\x89PNG\r\n"


@pytest.fixture
def samples() -> Samples:
    samples = Samples()
    for streams in (1, 8):
        for name, values in {"plain": (20, 10, 40), "idle": (19, 10, 36), "steered": (16, 9, 36), "serial": (8, 4, 20)}.items():
            for value in values:
                samples.add(name, "tokens/s", value * streams, streams=streams)
    for round_trip_ms in (0, 50):
        for value in (10, 12):
            samples.add("waiting", "tokens/s", value, round_trip_ms=round_trip_ms)
            samples.add("look_ahead", "tokens/s", 3 * value, round_trip_ms=round_trip_ms)
    samples.add("hub_p99", "ms", 7.0, edges=1000)
    return samples


def cells(samples: Samples) -> dict[str, dict[str, tuple[str, ...]]]:
    """Title of the grid -> name of the row -> its cells."""
    return {grid.title: {row[0]: row[1:] for row in grid.rows} for grid in grids(samples.figures())}


def test_every_section_shows_its_axis(samples: Samples) -> None:
    shown = cells(samples)
    assert shown["ratios, paired"]["(b) / (a)"] == ("0.95 (0.90-1.00)", "0.95 (0.90-1.00)")
    assert shown["tokens per second of one stream, by round trip to the edge"]["ratio"] == ("3.00", "3.00")
    assert shown["the hub alone"] == {"latency through it, p99 (ms)": ("7.00",)}
    assert "tokens per second of seven streams" not in shown  # nothing of it was measured


def test_targets_are_met_missed_or_not_measured(samples: Samples) -> None:
    shown = cells(samples)["targets"]
    assert len(shown) == len(TARGETS)
    assert shown["idle / plain, 1 stream"][2] == "**no**"
    assert shown["look-ahead / without, 50 ms round trip"][1:] == ("3.00", "yes")
    assert shown["hub, 1,000 edges: latency through it, p99 (ms)"] == ("≤ 5", "7.00", "**no**")
    assert shown["hub, 1,000 edges: deltas lost"][1:] == ("not measured", "")


def test_every_ratio_and_every_figure_of_the_hub_has_a_row() -> None:
    rows = {name for section in SECTIONS for name in section.rows}
    assert rows >= {*RATIOS, *HUB_FIGURES}


def test_the_terminal_shows_tables_notes_and_machine(samples: Samples) -> None:
    console = Console(width=120, record=True)
    show(console, samples.figures(), MACHINE, ["a note"])
    text = console.export_text()
    assert "an abacus" in text
    assert "- a note" in text
    assert "0.95 (0.90-1.00)" in text
    assert "**" not in text


def test_markdown_is_made_of_tables_of_even_rows(samples: Samples) -> None:
    text = markdown(samples.figures(), MACHINE, ["a note"])
    for block in text.split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.splitlines()}) == 1
            assert re.fullmatch(r"(\| --- )+\|", block.splitlines()[1])
    assert "* a note" in text
    assert "an abacus" in text


def test_a_page_keeps_what_is_around_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Before\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    write_markdown(page, "new")
    write_markdown(page, "newer")
    assert page.read_text() == f"# Before\n\n{BEGIN}\nnewer\n{END}\n\nafter\n"


def test_a_file_without_marks_is_the_report_alone(tmp_path: Path) -> None:
    write_markdown(tmp_path / "new.md", "text")
    assert (tmp_path / "new.md").read_text() == "text\n"


def test_pictures_are_drawn_of_what_there_is(samples: Samples, tmp_path: Path) -> None:
    plots.draw(samples.figures(), tmp_path / "plots")
    files = sorted((tmp_path / "plots").iterdir())
    assert [file.name for file in files] == [f"performance-{name}.png" for name in ("phases", "round-trips", "targets")]
    assert all(file.read_bytes().startswith(PNG) for file in files)


def test_no_picture_is_drawn_of_nothing(tmp_path: Path) -> None:
    plots.draw([], tmp_path / "plots")
    assert not list((tmp_path / "plots").iterdir())
