"""The documentation says what is so: commands, fields, numbers and files that it names exist."""

import re
from pathlib import Path
from typing import get_args

import pytest
from typer.testing import CliRunner

from costeer_vllm.cli import app
from costeer_vllm.request import DEFAULT_DEADLINE_MS, FIELDS, LEASE_MS, OnMissing, parse_options
from costeer_vllm.steering import SteeringParams

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_readme_shows_the_example_as_it_is() -> None:
    assert (ROOT / "examples" / "chat.py").read_text() in README


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist_with_their_options(page: Path) -> None:
    for line in re.findall(r"^\s*(costeer [^\n`]+)$", page.read_text(), re.MULTILINE):
        words = line.split()
        shown = CliRunner().invoke(app, [words[1], "--help"], env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"})
        assert shown.exit_code == 0, line
        for option in (word for word in words if word.startswith("--")):
            assert option in shown.output, (option, line)


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^make ([a-z]+)", README, re.MULTILINE)) == {"demo", "test"}
    assert {"demo", "test"} <= targets


def test_the_table_of_fields_is_complete() -> None:
    table = README[README.index("| field |") : README.index("Anything wrong is HTTP 400")]
    assert set(re.findall(r"`([A-Za-z_]+)`", table)) - {"user", "COSTEER_KEY", *get_args(OnMissing)} == set(FIELDS)
    assert f"| {LEASE_MS:.0f} for `wait`, else {DEFAULT_DEADLINE_MS:.0f} |" in table
    assert f"| {parse_options({}).strength:.3f} |" in table


def test_the_table_of_strengths_is_right() -> None:
    strengths = [float(number) for number in re.findall(r"[\d.]+", README.split("| strength |")[1].splitlines()[0])]
    iterations = [int(number) for number in re.findall(r"\d+", README.split("| T, the rest")[1].splitlines()[0])]
    assert strengths == [round(SteeringParams(T=T).strength, 3) for T in iterations]
