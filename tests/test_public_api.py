"""What users may build on: the version, the commands and their options, the entry points, the words of a request."""

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

import costeer_vllm
from costeer_vllm.cli import app
from costeer_vllm.request import FIELDS

COMMANDS = {
    "serve": ["model", "hub", "hub-host", "hub-port", "attach-key"],
    "hub": ["host", "port", "engine-endpoint", "attach-key", "exit-with-parent"],
    "edge": [
        "hub",
        "name",
        "model",
        "context",
        "contexts",
        "context-tokens",
        "reranker",
        "template",
        "key",
        "attach-key",
        "delta",
        "dtype",
        "device",
        "max-streams",
        "look-ahead",
        "threads",
        "tokens-only",
        "max-bits",
        "ledger",
        "no-ledger",
        "gateway",
        "server",
        "gateway-key",
        "server-key",
    ],
    "demo": ["T", "profiles", "rows", "json", "export"],
}


def test_the_version_is_the_distributions() -> None:
    assert costeer_vllm.__version__ == importlib.metadata.version("costeer-vllm")


def test_the_package_exports_nothing_but_its_version() -> None:
    source = Path(costeer_vllm.__file__).read_text(encoding="utf-8")
    assert re.findall(r"^[^\"\n].*", source, re.MULTILINE) == [f'__version__ = "{costeer_vllm.__version__}"']


def test_the_fields_of_a_request() -> None:
    assert FIELDS[:4] == ("worker", "key", "context_ref", "fusion")
    assert FIELDS[4:11] == ("T", "alpha", "beta", "lambda", "eta", "strength", "confidence")
    assert FIELDS[11:] == ("candidates", "rounding", "max_bits", "on_missing", "deadline_ms")


def test_the_commands() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert set(commands) == {*COMMANDS, "bench"}
    for name, options in COMMANDS.items():
        given = [max(parameter.opts, key=len).lstrip("-") for parameter in commands[name].params]
        assert given == options, name


def test_help_names_every_command() -> None:
    shown = subprocess.run([sys.executable, "-m", "costeer_vllm.cli", "--help"], capture_output=True, text=True, check=True)
    for command in (*COMMANDS, "bench"):
        assert re.search(rf"^\W*{command} ", shown.stdout, re.MULTILINE), command


@pytest.mark.parametrize(
    ("group", "value"),
    [("console_scripts", "costeer_vllm.cli:main"), ("vllm.general_plugins", "costeer_vllm.engine.hooks:install")],
)
def test_the_entry_points(group: str, value: str) -> None:
    (entry,) = (
        entry for entry in importlib.metadata.entry_points(group=group) if entry.dist and entry.dist.name == "costeer-vllm"
    )
    assert (entry.name, entry.value) == ("costeer", value)
    assert callable(entry.load())


def test_there_is_no_logits_processor_that_every_server_would_build() -> None:
    """vLLM builds what stands in this group in every server of the environment, and twice where it is named as well."""
    entries = importlib.metadata.entry_points(group="vllm.logits_processors")
    assert not [entry for entry in entries if entry.dist and entry.dist.name == "costeer-vllm"]


def test_an_error_of_ours_is_one_sentence_and_no_traceback() -> None:
    command = [sys.executable, "-m", "costeer_vllm.cli", "hub", "--port", "99999"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 1
    assert "port is 99999" in " ".join(run.stderr.split())
    assert "Traceback" not in run.stderr
