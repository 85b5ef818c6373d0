"""What an edge worker is shown: the base policy's likeliest tokens, with the penalties that the runner will apply."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.model_executor.layers.utils import apply_penalties

from costeer_vllm.candidates import encode_candidates
from costeer_vllm.engine.offers import Penalties, base_policies

VOCAB = 50


def random_logits(seed: int, num_rows: int = 1) -> torch.Tensor:
    return torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


# The likeliest tokens


@settings(max_examples=100)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 70), min_size=1, max_size=5))
def test_every_row_shows_as_many_of_its_likeliest_tokens_as_were_asked_for(seed: int, counts: list[int]) -> None:
    logits = random_logits(seed, len(counts))
    before = logits.clone()
    log_probs = logits.double().log_softmax(-1).numpy()
    for row, (base, count) in enumerate(zip(base_policies(logits, counts), counts, strict=True)):
        assert base is not None
        likeliest = np.sort(np.argsort(-log_probs[row], kind="stable")[:count])  # all of them where there are fewer
        assert base.ids.tolist() == likeliest.tolist()
        np.testing.assert_allclose(base.log_probs, log_probs[row, likeliest], atol=1e-5)
        assert base.mass_left == pytest.approx(1 - np.exp(log_probs[row, likeliest]).sum(), abs=1e-5)
        assert 0 <= base.mass_left <= 1
        encode_candidates(base)
    assert torch.equal(logits, before)


def test_where_a_grammar_allows_few_tokens_they_alone_are_shown() -> None:
    logits = torch.full((3, VOCAB), -torch.inf)
    logits[0, [3, 40]] = torch.tensor([1.0, 2.0])
    logits[1, 7] = -5.0
    logits[2] = 0.0
    few, one, all_ = base_policies(logits, [10, 10, 10])
    assert few is not None
    assert one is not None
    assert all_ is not None
    assert few.ids.tolist() == [3, 40]
    np.testing.assert_allclose(few.log_probs, [-math.log1p(math.e), -math.log1p(1 / math.e)], atol=1e-6)
    assert (one.ids.tolist(), one.log_probs.tolist(), one.mass_left) == ([7], [0.0], 0.0)
    assert len(all_.ids) == 10
    assert all_.mass_left == pytest.approx(0.8, abs=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_no_distribution_is_shown_to_nobody(bad: float) -> None:
    logits = random_logits(1, 4)
    logits[1, 5] = bad
    logits[2] = -torch.inf
    shown = base_policies(logits, [5] * 4)
    assert [base is None for base in shown] == [False, True, True, False]


def test_ids_of_a_large_vocabulary_are_exact() -> None:
    logits = torch.zeros(1, 152_064)
    logits[0, [151_935, 65_537, 152_063]] = 30.0
    (base,) = base_policies(logits, [3])
    assert base is not None
    assert base.ids.tolist() == [65_537, 151_935, 152_063]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_certainty_is_no_probability_above_1(dtype: torch.dtype) -> None:
    logits = torch.full((1, VOCAB), -40.0, dtype=dtype)
    logits[0, 9] = 60.0
    (base,) = base_policies(logits, [3])
    assert base is not None
    assert base.log_probs.max() <= 1e-3
    assert 0 <= base.mass_left < 1e-6
    encode_candidates(base)


# Penalties


def vllms_own(penalties: Penalties, logits: torch.Tensor, output_ids: list[int]) -> torch.Tensor:
    """vLLM pads token ids with the size of the vocabulary."""
    tokens = [torch.tensor([[*ids, VOCAB]], dtype=torch.int64) for ids in (penalties.prompt_ids, output_ids)]
    values = [torch.tensor([value]) for value in (penalties.presence, penalties.frequency, penalties.repetition)]
    applied: Any = apply_penalties(logits[None].clone(), *tokens, *values)
    return applied[0]


token_lists = st.lists(st.integers(0, VOCAB - 1), max_size=12)


@settings(max_examples=200)
@given(
    seed=st.integers(0, 2**32 - 1),
    prompt_ids=token_lists,
    output_ids=token_lists,
    repetition=st.sampled_from([1.0, 1.3, 0.7, 2.0]),
    frequency=st.sampled_from([0.0, 0.5, -1.5, 2.0]),
    presence=st.sampled_from([0.0, 0.25, -2.0]),
)
def test_penalties_are_vllms_own(
    seed: int, prompt_ids: list[int], output_ids: list[int], repetition: float, frequency: float, presence: float
) -> None:
    penalties = Penalties(prompt_ids, repetition, frequency, presence)
    (logits,) = random_logits(seed)
    before = logits.clone()
    applied = penalties.applied(logits, output_ids)
    torch.testing.assert_close(applied, vllms_own(penalties, logits, output_ids), rtol=1e-5, atol=1e-5)
    assert torch.equal(logits, before), "a copy"
    assert penalties.is_neutral == (repetition == 1 and frequency == presence == 0)
    if penalties.is_neutral:
        assert torch.equal(applied, before)


def test_penalties_by_hand() -> None:
    logits = torch.tensor([2.0, -2.0, 2.0, -2.0, 1.0])
    applied = Penalties([0, 1], 2.0, 0.5, 0.25).applied(logits, [2, 3, 3])
    assert applied.tolist() == [1.0, -4.0, 0.25, -5.25, 1.0]


def test_a_prompt_may_hold_ids_beyond_the_logits() -> None:
    """Placeholders of images, and padding."""
    (logits,) = random_logits(2)
    applied = Penalties([VOCAB, VOCAB + 99, -1, 3], 2.0, 0.0, 0.0).applied(logits, [])
    assert (applied != logits).nonzero().tolist() == [[3]]


def test_what_a_grammar_forbids_stays_forbidden() -> None:
    logits = torch.full((VOCAB,), -torch.inf)
    logits[3] = 0.5
    applied = Penalties([3, 4], 1.5, 0.5, 0.5).applied(logits, [3, 4, 4])
    assert applied.isneginf().sum() == VOCAB - 1
    assert applied[3].isfinite()
