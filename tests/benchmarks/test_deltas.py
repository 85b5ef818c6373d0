"""The measurement of coded deltas: its figures are right where they can be known, and the page shows its table."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.deltas.__main__ import markdown, write
from benchmarks.deltas.measures import STRENGTHS, TOP_512, WORTHS, Exact, Point, measure, top_512
from benchmarks.deltas.ngrams import Models, NGrams, Sample, split, train_tokenizer, unigrams
from benchmarks.deltas.triples import Triple, neural_like
from costeer_vllm.delta import SparseDelta
from costeer_vllm.delta.choice import WORTH

DOCS = Path(__file__).parents[2] / "docs"
NOTHING = SparseDelta(np.empty(0, np.int64), np.empty(0, np.float32))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


@pytest.mark.parametrize("strength", STRENGTHS)
def test_divergence_and_greedy_token_are_those_of_the_whole_policies(strength: float) -> None:
    rng = np.random.default_rng(0)
    for triple in neural_like(800, 5):
        exact = Exact(triple, strength)
        ids = np.sort(rng.choice(800, 30, replace=False))
        delta = SparseDelta(ids, rng.normal(0, 2, 30).astype(np.float32))
        moves = strength * (triple.with_context - triple.without_context).astype(float)
        policy = log_softmax(triple.base.astype(float) + moves)
        logits = triple.base.astype(float)
        logits[ids] += strength * delta.values.astype(float)
        coded = log_softmax(logits)
        assert exact.divergence(delta) == pytest.approx((np.exp(policy) * (policy - coded)).sum(), abs=1e-9)
        assert exact.is_changed(delta) == (policy.argmax() != coded.argmax())


def test_a_whole_delta_costs_nothing_and_none_costs_what_steering_does() -> None:
    cost_of_nothing = 0.0
    for triple in neural_like(400, 5):
        exact = Exact(triple, 1.0)
        everything = SparseDelta(np.arange(400), triple.with_context - triple.without_context)
        assert exact.divergence(everything) == pytest.approx(0, abs=1e-9)
        assert not exact.is_changed(everything)
        cost_of_nothing += exact.divergence(NOTHING)
    assert cost_of_nothing > 0.1


def test_the_reference_is_what_it_says() -> None:
    p_with = np.full(70_000, 1e-9, np.float32)
    p_without = p_with.copy()
    p_with[[3, 69_999]], p_without[[3, 5]] = [0.8, 0.19995], [0.5, 0.49995]
    size, delta = top_512(np.log(p_with), np.log(p_without))
    assert delta.ids.tolist() == [3, 5, 69_999]
    assert size == 5 + 3 * 6


def test_every_encoding_is_measured_at_every_strength() -> None:
    points = measure("made up", neural_like(2000, 4), lambda: None)
    assert {(p.strength, p.code) for p in points} == {(c, code) for c in STRENGTHS for code in (*WORTHS, TOP_512)}
    assert {(p.vocab, p.positions) for p in points} == {(2000, 4)}
    for strength in STRENGTHS:
        sizes = [p.bytes_mean for p in points if p.strength == strength and p.code != TOP_512]
        assert sizes == sorted(sizes)  # the less an entry must be worth, the more travel


def test_ngrams_interpolate_from_the_lowest_order_up() -> None:
    """After "0 1" came 2 twice and 3 once; after 1 also 4 once; Witten and Bell leave distinct / (distinct + count)."""
    ids = np.array([0, 1, 2, 0, 1, 2, 0, 1, 3, 5, 1, 4, 5])
    uniform = np.full(6, 1 / 6)
    bigrams = 3 / 7 * uniform + np.array([0, 0, 2, 1, 1, 0]) / 7
    trigrams = 2 / 5 * bigrams + np.array([0, 0, 2, 1, 0, 0]) / 5
    np.testing.assert_allclose(NGrams(ids, 3).interpolate(uniform, np.array([0, 1])), trigrams)
    np.testing.assert_allclose(NGrams(ids, 3).interpolate(uniform, np.array([4, 1])), bigrams)
    assert unigrams(ids, 10).sum() == pytest.approx(1)
    assert unigrams(ids, 10).min() > 0


def test_a_context_makes_its_own_words_likelier() -> None:
    samples = [Sample(f"Name: Kim {i}", "Say hello.", f"Hello, I am number {i}. Nice day!") for i in range(20)]
    training, held_out = split(samples)
    assert len(training) == 16
    assert not {s.context for s in training} & {s.context for s in held_out}
    tokenizer = train_tokenizer([f"{s.context} {s.query} {s.answer}" for s in samples], 300)
    vocab = tokenizer.get_vocab_size()
    sample = Sample("Signs as Zora.", "Say hello.", "Hello, I am Zora. Nice day!")
    triples = list(Models(tokenizer, training, vocab).triples(sample, every=1))
    (zora,) = set(tokenizer.encode("Z").ids)
    for triple in triples:
        for row in (triple.base, triple.with_context, triple.without_context):
            assert row.shape == (vocab,)
            assert np.exp(row.astype(float)).sum() == pytest.approx(1, abs=1e-5)
    first: Triple = triples[0]
    assert first.with_context[zora] > first.without_context[zora] + 1


def test_table_figures_and_plots_are_written_and_the_page_shows_the_table(tmp_path: Path) -> None:
    points = [Point(**point) for point in json.loads((DOCS / "deltas.json").read_text())]
    write(points, tmp_path)
    assert (tmp_path / "deltas.md").read_text() == markdown(points)
    assert markdown(points) in (DOCS / "deltas.md").read_text()
    assert [Point(**point) for point in json.loads((tmp_path / "deltas.json").read_text())] == points
    assert (tmp_path / "deltas-kl.png").stat().st_size > 20_000
    assert (tmp_path / "deltas-greedy.png").stat().st_size > 20_000
    assert {point.code for point in points} == {*WORTHS, TOP_512}
    assert WORTH in WORTHS
