"""The settings refuse what cannot be measured, and say what they would take."""

from typing import Any

import pytest

from costeer_vllm.bench.settings import QUICK, BenchSettings, parse_parts, parse_streams
from costeer_vllm.errors import InvalidParameter

PARTS = ["phases", "hub", "kernel"]


def test_streams_are_read_from_text() -> None:
    assert parse_streams("8, 1,8") == (1, 8)


@pytest.mark.parametrize("text", ["", "1,", "one", "-1", "1;8"])
def test_streams_that_are_no_numbers_are_refused(text: str) -> None:
    with pytest.raises(InvalidParameter, match="streams"):
        parse_streams(text)


@pytest.mark.parametrize(
    "wrong", [{"streams": (0,)}, {"streams": (65,)}, {"streams": ()}, {"tokens": 1}, {"tokens": 10_000}, {"repetitions": 0}]
)
def test_settings_that_cannot_be_measured_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidParameter, match=next(iter(wrong))):
        BenchSettings(**wrong)


def test_many_streams_have_fewer_tokens_each() -> None:
    assert [BenchSettings().tokens_of(streams) for streams in (1, 8, 32, 64)] == [64, 64, 20, 10]
    assert QUICK.tokens_of(64) == QUICK.tokens


def test_parts_are_run_in_their_own_order() -> None:
    assert parse_parts("kernel, phases", PARTS) == ("phases", "kernel")
    assert parse_parts(None, PARTS) == tuple(PARTS)


@pytest.mark.parametrize("text", ["", "hubs", "hub,,kernel"])
def test_parts_that_are_not_known_are_refused(text: str) -> None:
    with pytest.raises(InvalidParameter, match="phases, hub, kernel"):
        parse_parts(text, PARTS)
