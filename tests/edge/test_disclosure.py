"""What a request has told, and the budget that no server can raise."""

import math

import numpy as np
import pytest

from costeer_vllm.candidates import BasePolicy
from costeer_vllm.edge import disclosure
from costeer_vllm.edge.disclosure import Disclosure, Disclosures, Promise
from costeer_vllm.protocol.messages import Sampling

BASE = BasePolicy(np.array([0, 1, 2]), np.log([0.5, 0.3, 0.2]), 0.0)
DELTA = np.array([0.0, 2.0, -1.0])
GREEDY = Sampling(temperature=0.0)


def test_bits_add_up_and_a_token_that_the_context_made_less_likely_gives_some_back() -> None:
    told = Disclosure()
    weights = np.array([0.5, 0.3, 0.2]) * np.exp(DELTA)
    expected = np.log2(weights / weights.sum() / [0.5, 0.3, 0.2])
    uniforms = np.cumsum(weights / weights.sum()) - 1e-9  # of each token in turn
    for token, uniform in enumerate(uniforms):
        drawn = told.draw(BASE, DELTA, 1.0, Sampling(), uniform)
        assert (drawn.token, drawn.bits) == (token, pytest.approx(expected[token]))
    assert expected.min() < 0 < expected.max()
    assert told.bits == pytest.approx(expected.sum())
    assert told.bits_left == math.inf
    assert [drawn.token for drawn in told.drawn] == [0, 1, 2]


def test_a_token_that_would_have_been_drawn_anyway_costs_little_and_another_its_surprise() -> None:
    """Greedy; by the estimate of one such token among sixteen, one among seventeen, two among eighteen."""
    told = Disclosure()
    same = told.draw(BASE, np.zeros(3), 1.0, GREEDY, 0.5)
    assert (same.token, same.bits) == (0, pytest.approx(-math.log2(15 / 16 + 0.5 / 16)))
    other = told.draw(BASE, DELTA, 1.0, GREEDY, 0.5)
    assert (other.token, other.bits) == (1, pytest.approx(-math.log2(0.3 / 17)))
    again = told.draw(BASE, DELTA, 1.0, GREEDY, 0.5)
    assert (again.token, again.bits) == (1, pytest.approx(-math.log2(0.3 * 2 / 18)))
    assert told.bits == pytest.approx(same.bits + other.bits + again.bits)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(top_k=1), Sampling(top_p=0.4), Sampling(min_p=0.9)])
def test_all_that_cut_are_counted_alike(sampling: Sampling) -> None:
    told, greedy = Disclosure(), Disclosure()
    for delta in (np.zeros(3), 9 * DELTA):
        found, expected = told.draw(BASE, delta, 1.0, sampling, 0.5), greedy.draw(BASE, delta, 1.0, GREEDY, 0.5)
        assert (found.token, found.bits) == (expected.token, pytest.approx(expected.bits, abs=1e-9))


def test_a_token_that_had_to_do_without_the_context_spends_the_budget_for_good() -> None:
    told = Disclosure(max_bits=0.0)
    assert told.draw(BASE, np.array([0.0, 1.0, 2.0]), 1.0, Sampling(), 0.0).strength < 1e-9
    assert told.is_spent
    assert told.draw(BASE, np.zeros(3), 1.0, Sampling(), 0.0).strength == 0
    assert told.bits == 0


def test_what_is_not_to_be_steered_spends_nothing() -> None:
    told = Disclosure(max_bits=0.0)
    told.draw(BASE, DELTA, 0.0, Sampling(), 0.9)
    told.draw(BASE, DELTA, 1.0, Sampling(confidence=0.5), 0.9)
    assert not told.is_spent
    assert told.bits == 0


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


def test_a_promise_holds_the_streams_of_its_request_while_it_lasts() -> None:
    found = Disclosures()
    with found.promise("r1", Promise("edge", 4.0, "scope")) as told:
        assert found.is_allowed("r1", "edge")
        assert not found.is_allowed("r1", "cloud")
        assert found.is_allowed("other", "cloud")
        assert found.is_allowed(None, "cloud")
        assert found.of("a", "r1", 9.0) is found.of("b", "r1") is told, "whatever the server calls the request"
        assert told.max_bits == 4.0
        assert (found.scope("r1"), found.scope("other"), found.scope(None)) == ("scope", "other", None)
        for i in range(disclosure.MAX_REMEMBERED + 1):
            found.of(f"other {i}", None)
        assert found.of("a", "r1", 2.0) is told
        assert told.max_bits == 2.0
        assert not told.is_over
    assert told.is_over
    assert found.of("a", "r1") is not told


def test_a_request_with_open_streams_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disclosure, "MAX_REMEMBERED", 3)
    found = Disclosures()
    told = found.of("a", None)
    told.begun()
    for name in "bcdef":
        found.of(name, None)
    assert found.of("a", None) is told
    assert len(found._by_request) == 3
    told.ended(for_good=True)
    for name in "ghi":
        found.of(name, None)
    assert found.of("a", None) is not told


def test_choices_are_forgotten_when_a_request_is_over_for_good() -> None:
    told = Disclosure()
    for for_good, kept in ((False, {b"question": 7}), (True, {})):
        told.choices[b"question"] = 7
        told.begun()
        told.begun()
        told.ended(for_good)
        assert told.choices == {b"question": 7}
        told.ended(for_good)
        assert (told.choices, told.num_over) == (kept, int(for_good))


def test_of_the_tokens_only_the_newest_are_kept() -> None:
    told = Disclosure()
    for _ in range(disclosure.MAX_DRAWN_KEPT + 5):
        told.draw(BASE, DELTA, 1.0, Sampling(), 0.9)
    assert (len(told.drawn), told.num_drawn) == (disclosure.MAX_DRAWN_KEPT, disclosure.MAX_DRAWN_KEPT + 5)
