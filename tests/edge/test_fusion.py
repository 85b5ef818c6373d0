"""The fusion on the device against references of its own: vLLM's sampler, Algorithm 1 written out, and sums by hand."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

from costeer_vllm.candidates import BasePolicy
from costeer_vllm.demo.algorithm1 import personalize
from costeer_vllm.edge.fusion import Drawn, draw, sampler
from costeer_vllm.protocol.messages import Sampling
from costeer_vllm.steering import SteeringParams

FloatArray = np.ndarray


def log_softmax(scores: FloatArray) -> FloatArray:
    shifted = np.asarray(scores, np.float64) - np.max(scores)
    return shifted - np.log(np.exp(shifted).sum())


def base_policy(scores: FloatArray, ids: list[int] | None = None, left: float = 0.0) -> BasePolicy:
    """That of ``scores``, of which ``left`` lies outside the candidates."""
    return BasePolicy(np.arange(len(scores)) if ids is None else np.array(ids), log_softmax(scores) + math.log(1 - left), left)


def random_pair(seed: int, size: int = 30) -> tuple[BasePolicy, FloatArray]:
    rng = np.random.default_rng(seed)
    return base_policy(rng.normal(0, 3, size)), rng.normal(0, 2, size)


def intervals(base: BasePolicy, delta: FloatArray, strength: float, sampling: Sampling, bits_left: float) -> dict[int, Drawn]:
    """Everything that could be drawn: ``draw`` at the middle of each step of its inverse distribution function."""
    probe = draw(base, delta, strength, sampling, 0.0, bits_left)
    edges = np.cumsum([0.0, *np.exp(sampler(base.log_probs + probe.strength * delta, sampling))])
    middles = [(low + high) / 2 for low, high in pairwise(edges) if high > low]
    drawn = [draw(base, delta, strength, sampling, min(uniform, 1 - 2**-53), bits_left) for uniform in middles]
    return {one.token: one for one in drawn}


samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]) | st.floats(0.05, 5),
    top_p=st.just(1.0) | st.floats(0.05, 1),
    top_k=st.sampled_from([0, 0, 1, 2, 5, 100]),
    min_p=st.just(0.0) | st.floats(0, 1),
)


# The sampler


def vllms_own(scores: FloatArray, sampling: Sampling) -> FloatArray:
    """The probabilities with which vLLM draws: temperature, min_p (V1's argmax-invariant processor), top_k and top_p."""
    logits = torch.from_numpy(scores / sampling.temperature)[None]
    if sampling.min_p > 0:
        probabilities = logits.softmax(-1)
        logits = logits.masked_fill(probabilities < sampling.min_p * probabilities.max(), -math.inf)
    top_k = torch.tensor([sampling.top_k]) if 0 < sampling.top_k < len(scores) else None
    top_p = torch.tensor([sampling.top_p], dtype=torch.float64) if sampling.top_p < 1 else None
    kept: Any = apply_top_k_top_p(logits.clone(), top_k, top_p)
    return kept.softmax(-1)[0].numpy()


@settings(max_examples=300)
@given(st.integers(0, 2**32 - 1), st.integers(1, 80), samplings)
def test_temperature_min_p_top_k_and_top_p_mean_what_they_mean_in_vllm(seed: int, size: int, sampling: Sampling) -> None:
    assume(sampling.temperature > 0)
    scores = np.random.default_rng(seed).normal(0, 3, size)
    before = scores.copy()
    found = np.exp(sampler(scores, sampling))
    np.testing.assert_allclose(found, vllms_own(scores, sampling), rtol=1e-9, atol=1e-15)
    assert scores.tolist() == before.tolist()


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(), [0, 1, 2, 3]),
        (Sampling(top_k=2), [0, 1]),
        (Sampling(top_k=4), [0, 1, 2, 3]),
        (Sampling(top_k=-1), [0, 1, 2, 3]),
        (Sampling(top_p=0.45), [0]),
        (Sampling(top_p=0.65), [0, 1]),
        (Sampling(top_p=0.0), [0]),
        (Sampling(min_p=0.5), [0, 1]),
        (Sampling(min_p=1.0), [0]),
        (Sampling(min_p=0.5, temperature=2.0), [0, 1, 2]),  # of the tempered probabilities
        (Sampling(top_p=0.65, top_k=2), [0, 1]),
        (Sampling(top_p=0.6, top_k=2), [0]),  # of what top_k left: 0.5 of 0.8 is 0.625
        (Sampling(temperature=0.0), [0]),
        (Sampling(temperature=9e-6), [0]),
    ],
)
def test_what_is_kept_by_hand(sampling: Sampling, kept: list[int]) -> None:
    log_q = sampler(np.log([0.5, 0.3, 0.15, 0.05]), sampling)
    assert np.flatnonzero(log_q > -np.inf).tolist() == kept
    assert np.exp(log_q).sum() == pytest.approx(1)


def test_ties_at_top_k_are_kept_as_in_vllm() -> None:
    scores = np.log([0.4, 0.2, 0.2, 0.2])
    found = np.exp(sampler(scores, Sampling(top_k=2)))
    np.testing.assert_allclose(found, vllms_own(scores, Sampling(top_k=2)))
    assert (found > 0).all()


@given(st.integers(0, 2**32 - 1), st.floats(-5, 5), samplings, st.floats(0, 1, exclude_max=True))
def test_greedy_is_the_largest_of_base_plus_strength_times_delta(
    seed: int, strength: float, sampling: Sampling, uniform: float
) -> None:
    base, delta = random_pair(seed)
    greedy = Sampling(0.0, sampling.top_p, sampling.top_k, sampling.min_p)
    drawn = draw(base, delta, strength, greedy, uniform)
    assert drawn.token == int((base.log_probs + strength * delta).argmax())
    assert drawn.log_q == 0.0


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_greedy_takes_the_first_of_equals(uniform: float) -> None:
    """As torch.argmax on a CPU."""
    assert draw(base_policy(np.zeros(5)), np.zeros(5), 1.0, Sampling(0.0), uniform).token == 0


# What is drawn

T20 = SteeringParams()


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1))
def test_at_temperature_1_the_distribution_is_that_of_algorithm_1(seed: int) -> None:
    base, delta = random_pair(seed)
    reference = personalize(torch.from_numpy(base.log_probs), torch.from_numpy(delta), T20).numpy()
    np.testing.assert_allclose(sampler(base.log_probs + T20.strength * delta, Sampling()), reference, rtol=1e-9, atol=1e-9)
    for uniform in (0.0, 0.3, 0.999):
        drawn = draw(base, delta, T20.strength, Sampling(), uniform)
        assert drawn.log_q == pytest.approx(reference[drawn.token], abs=1e-9)


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(0.5), Sampling(top_p=0.8), Sampling(top_k=3), Sampling(1.5, 0.9, 10, 0.02)]
)
def test_every_token_is_drawn_as_often_as_its_probability_says(sampling: Sampling) -> None:
    """Uniforms on a grid: an exact integral instead of chance."""
    base, delta = random_pair(5, 12)
    num = 20_000
    tokens = [draw(base, delta, 0.7, sampling, (i + 0.5) / num).token for i in range(num)]
    frequencies = np.bincount(tokens, minlength=12) / num
    expected = vllms_own(base.log_probs + 0.7 * delta, sampling)
    np.testing.assert_allclose(frequencies, expected, atol=2 / num)
    assert not frequencies[expected == 0].any()


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("sampling", [Sampling(top_k=1), Sampling(top_k=2), Sampling(0.01)])
def test_at_the_ends_of_the_uniforms_nothing_impossible_is_drawn(sampling: Sampling, uniform: float) -> None:
    for seed in range(20):
        base, delta = random_pair(seed)
        drawn = draw(base, delta, 1.0, sampling, uniform)
        assert drawn.log_q > -np.inf


def test_ids_are_the_candidates_own() -> None:
    base = base_policy(np.log([0.1, 0.9]), ids=[17, 4000])
    assert [draw(base, np.zeros(2), 1.0, Sampling(), uniform).token for uniform in (0.05, 0.5)] == [17, 4000]


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_extreme_numbers_stay_numbers() -> None:
    base = BasePolicy(np.arange(3), np.array([-3.4e38, -1000.0, 0.0]), 0.0)
    delta = np.array([10_000.0, -10_000.0, 0.0])
    for temperature in (0.0, 1e-5, 1.0, 1e300):
        for strength in (1000.0, -1000.0, 0.0):
            drawn = draw(base, delta, strength, Sampling(temperature), 0.5)
            assert not math.isnan(drawn.log_q)
            assert not math.isnan(drawn.bits)


# What it tells


def test_bits_by_hand() -> None:
    base = base_policy(np.log([0.5, 0.25, 0.25]))
    delta = np.log([1.0, 4.0, 1.0])  # q = 0.5, 1, 0.25 / 1.75
    told = {token: draw(base, delta, 1.0, Sampling(), uniform).bits for token, uniform in ((0, 0.1), (1, 0.5), (2, 0.99))}
    less = math.log2(1 / 1.75)
    assert told == pytest.approx({0: less, 1: math.log2(4 / 1.75), 2: less})


def test_bits_are_counted_against_the_base_policy_among_the_candidates() -> None:
    for left in (0.0, 0.5):
        drawn = draw(base_policy(np.log([0.8, 0.2]), left=left), np.array([0.0, 1.0]), 1.0, Sampling(), 0.9)
        assert math.exp(drawn.log_p) == pytest.approx(0.2)
        assert math.exp(drawn.log_q) == pytest.approx(0.2 * math.e / (0.8 + 0.2 * math.e))


def test_bits_at_a_temperature_are_those_of_the_tempered_policies() -> None:
    base, delta = base_policy(np.log([0.8, 0.2])), np.array([0.0, 1.0])
    drawn = draw(base, delta, 1.0, Sampling(2.0), 0.999)
    assert drawn.token == 1
    log_p, log_q = log_softmax(base.log_probs / 2)[1], log_softmax((base.log_probs + delta) / 2)[1]
    assert drawn.bits == pytest.approx((log_q - log_p) / math.log(2))


def test_a_greedy_token_tells_as_much_as_it_was_unlikely() -> None:
    drawn = draw(base_policy(np.log([0.75, 0.25])), np.array([0.0, 5.0]), 1.0, Sampling(0.0), 0.3)
    assert (drawn.token, drawn.bits) == (1, pytest.approx(2.0))


@given(st.integers(0, 2**32 - 1), samplings, st.floats(0, 1, exclude_max=True))
def test_without_strength_nothing_is_told(seed: int, sampling: Sampling, uniform: float) -> None:
    base, delta = random_pair(seed)
    drawn = draw(base, delta, 0.0, sampling, uniform)
    assert drawn.bits == 0.0
    assert drawn == draw(base, -delta, 0.0, sampling, uniform)


# The budget


@settings(max_examples=300)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.integers(1, 40),
    strength=st.floats(-4, 4),
    sampling=samplings,
    bits_left=st.floats(-1, 8) | st.just(math.inf),
)
def test_no_token_that_could_be_drawn_tells_more_than_is_left(
    seed: int, size: int, strength: float, sampling: Sampling, bits_left: float
) -> None:
    base, delta = random_pair(seed, size)
    could = intervals(base, delta, strength, sampling, bits_left)
    (lowered,) = {one.strength for one in could.values()}  # it depends on no token
    assert abs(lowered) <= abs(strength)
    assert lowered * strength >= 0
    # Independent of ``Drawn.bits``: the two distributions, by their definitions.
    temperature = sampling.temperature or 1.0
    log_p, log_q = log_softmax(base.log_probs / temperature), sampler(base.log_probs + lowered * delta, sampling)
    told = {token: (log_q[token] - log_p[token]) / math.log(2) for token in could}
    assert set(np.flatnonzero(np.exp(log_q) > 1e-13)) <= set(could)
    if lowered:
        assert max(told.values()) <= bits_left + 1e-9
        assert {token: one.bits for token, one in could.items()} == pytest.approx(told, abs=1e-9)
    else:
        assert all(one.bits == 0 for one in could.values())
    full = sampler(base.log_probs + strength * delta, sampling)
    most = float((full - log_p)[full > -np.inf].max()) / math.log(2)
    if most <= bits_left - 1e-9:
        assert lowered == strength
    elif most > bits_left + 1e-9:
        assert lowered != strength or strength == 0


@pytest.mark.parametrize("strength", [2.0, -2.0])
def test_a_strength_is_lowered_no_further_than_it_must(strength: float) -> None:
    base, delta = random_pair(3)
    drawn = draw(base, delta, strength, Sampling(), 0.5, bits_left=0.5)
    assert 0 < drawn.strength / strength < 1

    def most_bits(c: float) -> float:
        return float((log_softmax(base.log_probs + c * delta) - log_softmax(base.log_probs)).max()) / math.log(2)

    assert most_bits(drawn.strength) == pytest.approx(0.5, abs=1e-9)


@pytest.mark.parametrize("bits_left", [0.0, -0.5])
def test_without_a_budget_the_base_policy_draws(bits_left: float) -> None:
    base, delta = random_pair(4)
    for uniform in np.linspace(0, 1, 50, endpoint=False):
        drawn = draw(base, delta, 2.0, Sampling(), uniform, bits_left)
        assert drawn.token == draw(base, delta, 0.0, Sampling(), uniform).token
        assert drawn.bits == pytest.approx(0, abs=1e-9)
