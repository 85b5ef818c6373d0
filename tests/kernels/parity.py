"""The two backends side by side; ``test_triton_kernel.py`` runs this file in a process with Triton's interpreter."""

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from costeer_vllm.kernels import Deltas, DenseDeltas

from .test_steer_inplace import EPSILON, cases, entries_of, random_case, steered, widened


def assert_parity(logits: Tensor, rows: Tensor, strength: Tensor, deltas: Deltas, wide: Tensor) -> None:
    """Equal but for the rounding of the product, which torch fuses with the sum: half a unit of it, and one of the result."""
    by_torch = steered(logits, rows, strength, deltas, "torch")
    by_triton = steered(logits, rows, strength, deltas, "triton")
    allowed = torch.zeros(logits.shape, dtype=torch.float64)
    allowed[rows] = EPSILON * ((strength.double()[:, None] * wide).abs() / 2 + by_torch[rows].double().abs().nan_to_num(posinf=0))
    difference = (by_torch.double() - by_triton.double()).abs()
    difference[by_torch == by_triton] = 0  # both -inf
    assert bool((difference <= allowed).all()), difference.max()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=cases())
def test_any_case(case: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]) -> None:
    logits, rows, strength, values, chosen = case
    sparse, zero_filled = entries_of(values, chosen)
    assert_parity(logits, rows, strength, DenseDeltas(values), widened(values, logits.shape[1]))
    assert_parity(logits, rows, strength, sparse, widened(zero_filled.values, logits.shape[1]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_full_vocabulary(dtype: torch.dtype) -> None:
    logits, rows, values = random_case(7, 5, 3, 152_064, 151_936, dtype)
    assert_parity(logits, rows, torch.tensor([1.783257, -0.476, 2.5]), DenseDeltas(values), widened(values, 152_064))


def test_products_that_float32_holds_are_equal_bit_for_bit() -> None:
    logits, rows, values = random_case(8, 9, 8, 3000, 3000, torch.float16)
    strength = 2.0 ** torch.arange(-4, 4)
    for deltas in (DenseDeltas(values), entries_of(values, values > 0)[0]):
        by_torch, by_triton = (steered(logits, rows, strength, deltas, backend) for backend in ("torch", "triton"))
        assert torch.equal(by_torch, by_triton)
