"""The measured attack: it simulates the mechanism exactly, its figures are right where they can be known, the page shows them."""

import itertools
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from benchmarks.privacy.__main__ import run, write
from benchmarks.privacy.attackers import CHANNELS, along, distances, payloads, posteriors
from benchmarks.privacy.cases import SETS, Case, all_rows, cases, queries
from benchmarks.privacy.experiments import Found, Setting, Size, answers, bound_of, greedy, sampled
from benchmarks.privacy.measures import by_distance, by_tokens, wilson
from benchmarks.privacy.mechanism import transcripts
from benchmarks.privacy.outside import TOP_KS, outside
from benchmarks.privacy.reader import prompts_of
from benchmarks.privacy.report import markdown
from benchmarks.privacy.suspects import Suspects, log_expected, log_policy
from costeer_vllm.candidates import BasePolicy
from costeer_vllm.demo.export import export
from costeer_vllm.demo.scores import Pair, load_pair
from costeer_vllm.edge.disclosure import Disclosure
from costeer_vllm.protocol.messages import Sampling

DOCS = Path(__file__).parents[2] / "docs"


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def pair(folder: Path) -> Iterator[Pair]:
    with one_thread():
        yield load_pair(folder)


def few(folder: Path, candidates: str, num_contexts: int = 4, num_queries: int = 1) -> list[Case]:
    return cases(candidates, queries(folder, num_queries), num_contexts)


def none() -> None:
    """Nobody looks at the progress."""


# The simulation


@pytest.mark.parametrize("max_bits", [None, 0.0, 0.3, 2.0])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_the_simulated_mechanism_is_the_device_s(temperature: float, max_bits: float | None) -> None:
    """Whichever context is the true one: strengths, ledgers and likelihoods are those of ``draw`` and ``Disclosure``."""
    rng, k, strength = np.random.default_rng(0), 7, 1.8
    sampling = Sampling(temperature=temperature, max_bits=max_bits)
    for truth in range(3):
        ledger, suspects = Disclosure(max_bits), Suspects.of(1, 3)
        for _ in range(12):
            base = BasePolicy(np.arange(k), np.log(rng.dirichlet(np.ones(k))), 0.0)
            deltas = rng.normal(0, 2, (3, k)).astype(np.float32)
            drawn = ledger.draw(base, deltas[truth], strength, sampling, rng.random())
            chosen = np.array([drawn.token])
            log_q = suspects.heard(np.array([0]), base.log_probs[None], deltas[None], chosen, strength, sampling)
            assert log_q[0, truth] == pytest.approx(drawn.log_q, abs=1e-9)
            assert suspects.bits[0, truth] == pytest.approx(ledger.bits, abs=1e-9)
            assert suspects.is_spent[0, truth] == ledger.is_spent


# The bound, exactly: all texts of three tokens are gone through


def summed_over_texts(sampling: Sampling, seed: int) -> tuple[float, float]:
    """sum_text max_c q_c(text), and the largest q_c(text) / r(text), over a random tree of base policies and deltas."""
    rng, k, num_contexts, length = np.random.default_rng(seed), 4, 5, 3
    prefixes = [prefix for n in range(length) for prefix in itertools.product(range(k), repeat=n)]
    scores = {prefix: np.log(rng.dirichlet(np.ones(k))) for prefix in prefixes}
    deltas = {prefix: rng.normal(0, 2, (num_contexts, k)).astype(np.float32) for prefix in prefixes}
    total, worst = 0.0, 0.0
    for text in itertools.product(range(k), repeat=length):
        suspects, log_q, log_r = Suspects.of(1, num_contexts), np.zeros(num_contexts), 0.0
        for n, token in enumerate(text):
            at = scores[text[:n]][None]
            log_r += float(log_expected(at, suspects.share_cut, sampling)[0, token])
            log_q += suspects.heard(np.array([0]), at, deltas[text[:n]][None], np.array([token]), 1.8, sampling)[0]
        total += math.exp(log_q.max())
        worst = max(worst, math.exp(log_q.max() - log_r))
    return total, worst


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("max_bits", [0.0, 0.2, 1.0])
def test_no_text_tells_more_than_the_budget(max_bits: float, seed: int) -> None:
    total, worst = summed_over_texts(Sampling(max_bits=max_bits), seed)
    assert total <= 2**max_bits * (1 + 1e-9)
    assert worst <= 2**max_bits * (1 + 1e-9)
    assert summed_over_texts(Sampling(), seed)[0] > 2**max_bits  # it is the budget that does it


@pytest.mark.parametrize("seed", range(4))
def test_greedy_the_bound_is_wider_by_the_moments_at_which_the_budget_can_be_spent(seed: int) -> None:
    for max_bits in (0.0, 0.5, 1.0, 2.0):
        total, _ = summed_over_texts(Sampling(temperature=0, max_bits=max_bits), seed)
        assert total <= (3 + 1) * 2**max_bits * (1 + 1e-9)


def test_the_bound_is_a_probability() -> None:
    assert bound_of(1.0, 16) == 2 / 16
    assert bound_of(9.0, 16) == bound_of(None, 16) == 1.0


# The mechanism, on the demo pair


GREEDY_6_BITS = Setting(1.8, Sampling(temperature=0, max_bits=6.0))


@pytest.mark.parametrize(("setting", "used"), [(sampled(20, 2.0), 0.9), (GREEDY_6_BITS, 0.5)])
def test_a_ledger_never_exceeds_its_budget(pair: Pair, folder: Path, setting: Setting, used: float) -> None:
    asked = [Case((row,)) for row in all_rows(folder)[::10]]
    found = transcripts(pair, asked, setting, 1, 64, np.random.default_rng(0))
    assert setting.sampling.max_bits is not None
    assert len(found) == 20
    assert max(one.bits.max() for one in found) <= setting.sampling.max_bits + 1e-9
    assert max(one.bits.max() for one in found) > used * setting.sampling.max_bits


def test_the_bound_holds_and_is_not_kept_without_a_budget(pair: Pair, folder: Path) -> None:
    asked = few(folder, "people", num_contexts=8)
    [point] = by_tokens(answers(pair, asked, sampled(20, 1.0), 3, none), (64,))
    assert point.accuracy.low <= bound_of(1.0, 8)
    assert point.most is not None
    assert point.most <= 1.0 + 1e-9
    [free] = by_tokens(answers(pair, asked, sampled(20), 3, none), (64,))
    assert free.accuracy.low > bound_of(1.0, 8)


def test_a_posterior_is_a_distribution_and_learns(pair: Pair, folder: Path) -> None:
    found = answers(pair, few(folder, "people"), sampled(20), 2, none)
    for one in found:
        posterior = posteriors(one.log_q)
        assert posterior.shape == (len(one.tokens), 4)
        assert (posterior >= 0).all()
        assert posterior.sum(-1) == pytest.approx(np.ones(len(one.tokens)))
    first, *_, last = by_tokens(found)
    assert first.true is not None
    assert last.true is not None
    assert last.ledger is not None
    assert first.true < last.true == pytest.approx(2.0, abs=0.05)
    assert last.true <= last.ledger


def test_greedy_tokens_do_not_depend_on_the_secret(pair: Pair, folder: Path) -> None:
    [case] = few(folder, "people")
    one, other = (transcripts(pair, [case], greedy(20), 1, 64, np.random.default_rng(seed)) for seed in (1, 2))
    assert [text.tokens for text in one] == [text.tokens for text in other]
    assert {float(x) for text in one for x in text.log_q[:, text.truth]} == {0.0}
    drawn = [transcripts(pair, [case], sampled(20), 1, 64, np.random.default_rng(seed)) for seed in (1, 2)]
    assert [text.tokens for text in drawn[0]] != [text.tokens for text in drawn[1]]


# Deltas


@pytest.mark.parametrize("candidates", SETS)
@pytest.mark.parametrize("channel", CHANNELS)
def test_deltas_tell_the_context_from_the_first_token(pair: Pair, folder: Path, candidates: str, channel: str) -> None:
    """Also what no answer states."""
    [case] = few(folder, candidates)
    prompts = [prompts_of(row, pair.tokenizer) for row in case.rows]
    log_probs = along(pair.small, [*(ids for ids, _ in prompts), prompts[0][1]], [5, 6])
    made = payloads(log_probs, CHANNELS[channel])
    found = [(truth, distances(made[truth], made, log_probs.shape[-1])) for truth in range(len(made))]
    point = by_distance(found, is_exact=True)[0]
    assert point.tokens == 1
    assert point.accuracy.value == 1.0
    assert point.gain == 2.0


def test_a_sister_whom_no_answer_states_is_not_told_by_greedy_tokens(pair: Pair, folder: Path) -> None:
    [point] = by_tokens(answers(pair, few(folder, "sister"), greedy(20), 1, none), (64,))
    assert point.accuracy.value == pytest.approx(1 / 4)
    assert point.gain == pytest.approx(0.0, abs=1e-9)
    assert point.ledger is not None
    assert point.ledger > 10


# Measures and candidates


def test_wilson_is_wilson() -> None:
    share = wilson(8, 10)
    assert (share.low, share.value, share.high) == pytest.approx((0.4902, 0.8, 0.9433), abs=1e-4)
    assert wilson(10, 10).high == 1.0


def test_candidates_differ_in_what_they_should(folder: Path) -> None:
    rows = {name: few(folder, name, 16)[0].rows for name in SETS}
    for name in SETS:
        assert len({row.context for row in rows[name]}) == 16
    for name in ("hobby", "sister"):
        lines = [set(row.context.splitlines()) for row in rows[name]]
        assert all(len(other - lines[0]) == 1 for other in lines[1:])
    assert len({row.items["hobby"] for row in rows["hobby"]}) == 16
    assert len({str(row.items) for row in rows["sister"]}) == 1


def test_temperature_is_that_of_the_device() -> None:
    scores = np.array([[0.0, 1.0]])
    assert log_policy(scores, Sampling(temperature=0.5))[0, 1] == pytest.approx(-math.log(1 + math.exp(-2)))
    expected = log_expected(scores, np.array([0.25]), Sampling(temperature=0.0))
    assert np.exp(expected) == pytest.approx(np.array([[0.25 / (1 + math.e), 0.75 + 0.25 / (1 + 1 / math.e)]]))


def test_the_more_candidates_the_less_is_outside(pair: Pair, folder: Path) -> None:
    found = outside(pair, all_rows(folder)[::25], 1, 64, none)
    assert [one.top_k for one in found] == list(TOP_KS)
    for fewer, more in itertools.pairwise(found):
        assert fewer.num_greedy >= more.num_greedy
        assert fewer.mass > more.mass > 0
    assert found[0].num_greedy > found[-1].num_greedy == 0


# The whole, and the page


def test_all_of_it_runs(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    with one_thread():
        found = run(folder, Size(num_queries=1, num_fewer=1, num_contexts=2, samples=1, num_answers=2))
    write(found, tmp_path)
    assert capsys.readouterr().out == (tmp_path / "privacy.md").read_text() + "\n"
    assert msgspec.json.decode((tmp_path / "privacy.json").read_bytes(), type=Found) == found
    for name in ("tokens", "budget", "ledger"):
        assert (tmp_path / f"privacy-{name}.png").stat().st_size > 10_000


def test_the_page_shows_what_was_found() -> None:
    page = (DOCS / "privacy.md").read_text()
    found = msgspec.json.decode((DOCS / "privacy.json").read_bytes(), type=Found)
    assert found.holds
    for part in markdown(found).split("\n\n"):
        assert part.strip() in page
    for image in re.findall(r"\]\((images/[^)]+)\)", page):
        assert (DOCS / image).stat().st_size < 150_000
