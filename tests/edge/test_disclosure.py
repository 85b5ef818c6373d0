"""What a request has told, and the budget that no server can raise."""

import math

import pytest

from costeer_vllm.edge import disclosure
from costeer_vllm.edge.disclosure import Disclosure, Disclosures
from costeer_vllm.edge.fusion import Drawn


def drawn(bits: float, strength: float = 1.0) -> Drawn:
    return Drawn(7, -3.0, -3.0 + bits * math.log(2), strength)


def test_bits_add_up_and_a_token_that_the_context_made_less_likely_gives_some_back() -> None:
    told = Disclosure(max_bits=5.0)
    for bits, left in ((2.0, 3.0), (-1.0, 4.0), (3.5, 0.5)):
        told.add(drawn(bits), 1.0)
        assert told.bits_left == pytest.approx(left)
    assert told.bits == pytest.approx(4.5)
    assert [one.bits for one in told.drawn] == pytest.approx([2.0, -1.0, 3.5])
    assert not told.is_spent


def test_without_a_budget_any_number_of_bits_is_left() -> None:
    told = Disclosure()
    told.add(drawn(100.0), 1.0)
    assert told.bits_left == math.inf
    assert told.bits == pytest.approx(100.0)


@pytest.mark.parametrize(
    ("strength", "wanted", "is_spent"),
    [(0.0, 1.5, True), (0.0, -1.5, True), (0.0, 0.0, False), (0.1, 1.5, False), (1.5, 1.5, False)],
)
def test_it_is_spent_when_a_token_had_to_do_without_the_context(strength: float, wanted: float, is_spent: bool) -> None:
    told = Disclosure(max_bits=1.0)
    told.add(drawn(0.5, strength), wanted)
    assert told.is_spent is is_spent
    assert told.bits == pytest.approx(0.5 if strength else 0.0)
    told.add(drawn(0.1), 1.0)
    assert told.is_spent is is_spent, "for good"


def test_each_request_and_context_has_its_own() -> None:
    found = Disclosures()
    told = found.of("r", None)
    assert found.of("r", None) is told
    assert found.of("other", None) is not told
    assert found.of("r", "ann") is not told
    assert found.of("r", "ann") is found.of("r", "ann")


@pytest.mark.parametrize(
    ("own", "asked", "least"),
    [
        (None, [None], None),
        (None, [3.0], 3.0),
        (2.0, [None], 2.0),
        (2.0, [3.0], 2.0),
        (2.0, [1.0], 1.0),
        (2.0, [0.0], 0.0),
        (0.0, [5.0], 0.0),
        (None, [3.0, 5.0], 3.0),
        (None, [3.0, None], 3.0),
        (None, [5.0, 3.0, 4.0], 3.0),
        (None, [None, 4.0], 4.0),
        (2.0, [1.0, None, 9.0], 1.0),
    ],
)
def test_the_smaller_budget_holds_and_a_later_one_cannot_raise_it(
    own: float | None, asked: list[float | None], least: float | None
) -> None:
    found = Disclosures(own)
    for max_bits in asked:
        told = found.of("r", None, max_bits)
    assert told.max_bits == least
    assert found.of("another", None).max_bits == own


def test_those_of_the_last_requests_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disclosure, "MAX_REMEMBERED", 3)
    found = Disclosures()
    first, second = found.of("a", None), found.of("b", None)
    for name in ("c", "a", "d", "a", "e"):
        found.of(name, None)
    assert found.of("a", None) is first
    assert found.of("b", None) is not second
    assert len(found._by_request) == 3
