"""The contract of ``steer_inplace``: torch here, Triton when ``test_triton_kernel.py`` runs this file with its interpreter."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from costeer_vllm.kernels import Backend, Deltas, DenseDeltas, SparseDeltas, steer_inplace
from costeer_vllm.steering import SteeringParams

from .ftrl import personalized_log_policy

BACKEND: Backend = "triton" if os.environ.get("TRITON_INTERPRET") == "1" else "torch"
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
EPSILON = 2.0**-23  # one unit in the last place of x is at most EPSILON * |x|

PAPER = SteeringParams()
LIGHT = SteeringParams(T=1)
STEEP = SteeringParams(T=12, alpha=3.0, beta=-0.7, player_lambda=1.5, eta=0.3)

with_backend = pytest.mark.parametrize("backend", [BACKEND])


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int32)


def random_case(seed: int, num_rows: int, n: int, vocab: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """``logits [num_rows, vocab]``, shuffled ``rows [n]`` and ``values [n, width]``, of the size that language models show."""
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(num_rows, vocab, generator=generator)
    rows = torch.randperm(num_rows, generator=generator)[:n]
    values = (2 * torch.randn(n, width, generator=generator)).to(dtype)
    return logits, rows, values


def entries_of(values: Tensor, chosen: Tensor) -> tuple[SparseDeltas, DenseDeltas]:
    """The ``chosen [n, width]`` entries of ``values [n, width]``: sparse, and dense with zeros elsewhere."""
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), chosen.sum(1).cumsum(0)])
    sparse = SparseDeltas(offsets, chosen.nonzero()[:, 1].contiguous(), values[chosen])
    return sparse, DenseDeltas(torch.where(chosen, values, torch.zeros_like(values)))


def widened(values: Tensor, vocab: int) -> Tensor:
    """``values [n, width]`` as ``[n, vocab]`` float64: cut, or filled with zeros."""
    wide = torch.zeros(values.shape[0], vocab, dtype=torch.float64)
    width = min(values.shape[1], vocab)
    wide[:, :width] = values[:, :width].double()
    return wide


def steered(logits: Tensor, rows: Tensor, strength: Tensor, deltas: Deltas, backend: Backend) -> Tensor:
    after = logits.clone()
    steer_inplace(after, rows, strength, deltas, backend)
    return after


def assert_is_algorithm_1(
    before: Tensor, after: Tensor, values: Tensor, params: SteeringParams, forbidden: Tensor | None = None
) -> None:
    """softmax of ``after [n, vocab]`` is pi_T for ``before``, up to three float32 roundings of its largest term.

    The mask ``forbidden [n, vocab]``, already in ``after`` as -inf, is applied to pi_T after the iterations.
    """
    expected = personalized_log_policy(before, values, params)
    if forbidden is not None:
        expected = expected.masked_fill(forbidden, -torch.inf).log_softmax(-1)
    actual = after.double().log_softmax(-1)
    largest = before.abs().max().double() + abs(params.strength) * values.abs().max().double()
    torch.testing.assert_close(actual, expected, rtol=0, atol=3 * EPSILON * largest.item())


def assert_is_definition(before: Tensor, after: Tensor, rows: Tensor, strength: Tensor, wide: Tensor) -> None:
    """``after`` is the loop of the operation's docstring, up to rounding product and sum; ``wide [n, vocab]`` are the deltas."""
    product = strength.double()[:, None] * wide
    expected = before[rows].double() + product
    error = (after[rows].double() - expected).abs().nan_to_num(nan=torch.inf)
    error[after[rows] == expected] = 0  # both -inf
    assert bool((error <= EPSILON * (product.abs() + expected.abs())).all()), error.max()
    others = torch.ones(len(before), dtype=torch.bool)
    others[rows] = False
    assert torch.equal(bits(after[others]), bits(before[others]))
    without_delta = wide == 0
    assert torch.equal(after[rows][without_delta], before[rows][without_delta])


@with_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("params", [PAPER, LIGHT, STEEP], ids=["paper", "light", "steep"])
@pytest.mark.parametrize(("n", "vocab"), [(1, 7), (17, 7), (3, 454), (17, 1000), (2, 4096)])
def test_policy_is_algorithm_1(backend: Backend, dtype: torch.dtype, params: SteeringParams, n: int, vocab: int) -> None:
    logits, rows, values = random_case(n + vocab, n + 3, n, vocab, vocab, dtype)
    after = steered(logits, rows, torch.full((n,), params.strength), DenseDeltas(values), backend)
    assert_is_algorithm_1(logits[rows], after[rows], values, params)


@with_backend
@pytest.mark.parametrize("width", [151_936, 152_064])
def test_policy_is_algorithm_1_at_full_vocabulary(backend: Backend, width: int) -> None:
    logits, rows, values = random_case(width, 4, 2, 152_064, width, torch.float32)
    after = steered(logits, rows, torch.full((2,), PAPER.strength), DenseDeltas(values), backend)
    assert_is_algorithm_1(logits[rows], after[rows], widened(values, 152_064), PAPER)
    assert torch.equal(bits(after[:, width:]), bits(logits[:, width:]))


@with_backend
@pytest.mark.parametrize("params", [PAPER, STEEP], ids=["paper", "steep"])
def test_a_mask_before_steering_is_a_mask_after_algorithm_1(backend: Backend, params: SteeringParams) -> None:
    logits, rows, values = random_case(1, 5, 4, 1000, 1000, torch.float32)
    forbidden = torch.rand(4, 1000, generator=torch.Generator().manual_seed(1)) < 0.5
    masked = logits.clone()
    masked[rows] = masked[rows].masked_fill(forbidden, -torch.inf)
    after = steered(masked, rows, torch.full((4,), params.strength), DenseDeltas(values), backend)
    assert torch.equal(after[rows] == -torch.inf, forbidden)
    assert_is_algorithm_1(logits[rows], after[rows], values, params, forbidden)


@with_backend
def test_strengths_belong_to_their_rows(backend: Backend) -> None:
    logits, rows, values = random_case(2, 4, 3, 100, 100, torch.float32)
    settings_of_rows = [PAPER, LIGHT, STEEP]
    strength = torch.tensor([params.strength for params in settings_of_rows])
    after = steered(logits, rows, strength, DenseDeltas(values), backend)
    for i, params in enumerate(settings_of_rows):
        assert_is_algorithm_1(logits[rows[i : i + 1]], after[rows[i : i + 1]], values[i : i + 1], params)


@with_backend
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_row_views_change_nothing_outside_them(backend: Backend, sparse: bool) -> None:
    _, rows, values = random_case(3, 6, 5, 1030, 1030, torch.float16)
    storage = torch.randn(13, 1100)
    view = storage[1:13:2, 30:1060]  # [6, 1030], row stride 2200
    outside = storage.clone()
    expected = view.clone()
    deltas_view = torch.zeros(5, 2000, dtype=torch.float16)[:, 100:1130].copy_(values)  # row stride 2000
    deltas = entries_of(values, values > 0)[0] if sparse else DenseDeltas(deltas_view)
    strength = torch.linspace(-2, 2, 5)
    steer_inplace(expected, rows, strength, deltas, backend)
    steer_inplace(view, rows, strength, deltas, backend)
    assert torch.equal(bits(view), bits(expected))
    outside[1:13:2, 30:1060] = expected
    assert torch.equal(bits(storage), bits(outside))


@with_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [600, 1300, 2000], ids=["narrow", "equal", "surplus"])
def test_sparse_deltas_are_dense_ones_with_zeros_elsewhere(backend: Backend, dtype: torch.dtype, width: int) -> None:
    n, vocab = 9, 1300
    logits, rows, values = random_case(width, 12, n, vocab, width, dtype)
    share = torch.linspace(0, 1, n)[:, None]  # the first row has no entry, the last one all
    chosen = torch.rand(n, width, generator=torch.Generator().manual_seed(4)) < share
    sparse, dense = entries_of(values, chosen)
    strength = torch.linspace(-3, 3, n)
    wide = widened(dense.values, vocab)
    after_sparse = steered(logits, rows, strength, sparse, backend)
    after_dense = steered(logits, rows, strength, dense, backend)
    assert_is_definition(logits, after_sparse, rows, strength, wide)
    difference = (after_sparse - after_dense).abs()[rows].double()
    product = strength.double()[:, None] * wide
    rounding = 0 if backend == "triton" else EPSILON * (product.abs() + after_dense[rows].abs())
    assert bool((difference <= rounding).all())


@with_backend
def test_a_sparse_row_longer_than_every_program_of_its_row(backend: Backend) -> None:
    logits, rows, values = random_case(5, 2, 2, 20_000, 20_000, torch.float16)
    chosen = torch.rand(2, 20_000, generator=torch.Generator().manual_seed(5)) < torch.tensor([[0.9], [0.001]])
    sparse, dense = entries_of(values, chosen)
    strength = torch.tensor([1.7, -0.3])
    after = steered(logits, rows, strength, sparse, backend)
    assert_is_definition(logits, after, rows, strength, widened(dense.values, 20_000))


@with_backend
def test_rows_not_named_keep_their_bits(backend: Backend) -> None:
    logits = torch.randn(6, 300)
    logits[[0, 3, 5], ::7] = torch.tensor(torch.nan)
    logits[0, 1], logits[3, 1], logits[5, 1] = -0.0, torch.inf, 1e-42
    values = torch.randn(3, 300)
    rows = torch.tensor([4, 1, 2])
    for deltas in (DenseDeltas(values), entries_of(values, values > 0)[0]):
        after = steered(logits, rows, torch.ones(3), deltas, backend)
        assert torch.equal(bits(after[[0, 3, 5]]), bits(logits[[0, 3, 5]]))
        assert not torch.equal(bits(after[rows]), bits(logits[rows]))


@with_backend
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_extremes_are_never_nan_and_minus_infinity_stays(backend: Backend, sparse: bool) -> None:
    logits = torch.tensor([-torch.inf, 3e38, -3e38, 0.0, -torch.inf, 1e-42]).repeat(4, 1)
    values = torch.tensor([[1e4], [-1e4], [1e4], [-1e4]]).expand(4, 6).contiguous()
    strength = torch.tensor([1e3, 1e3, -1e3, 0.0])
    deltas = entries_of(values, values != 0)[0] if sparse else DenseDeltas(values)
    after = steered(logits, torch.arange(4), strength, deltas, backend)
    assert not after.isnan().any()
    assert torch.equal(after == -torch.inf, logits == -torch.inf)
    assert after[:, 3].tolist() == [1e7, -1e7, -1e7, 0.0]


@with_backend
def test_nothing_to_steer(backend: Backend) -> None:
    logits = torch.randn(3, 50)
    no_ids = torch.zeros(0, dtype=torch.int64)
    no_rows = SparseDeltas(torch.zeros(1, dtype=torch.int64), no_ids, torch.zeros(0))
    no_entries = SparseDeltas(torch.zeros(3, dtype=torch.int64), no_ids, torch.zeros(0))
    two_rows = torch.tensor([0, 2])
    for rows, deltas in [
        (no_ids, DenseDeltas(torch.zeros(0, 50))),
        (no_ids, no_rows),
        (two_rows, DenseDeltas(torch.zeros(2, 0))),
        (two_rows, no_entries),
    ]:
        after = steered(logits, rows, torch.ones(len(rows)), deltas, backend)
        assert torch.equal(bits(after), bits(logits))


@with_backend
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_rows_beyond_two_to_the_31_elements(backend: Backend, sparse: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    stride = 2**30
    file = tmp_path_factory.mktemp("far") / "logits"  # a file with holes: only the pages touched take room
    logits = torch.from_file(str(file), shared=True, size=2 * stride + 8).as_strided((3, 8), (stride, 1))
    file.unlink()
    values = logits.new_zeros(1).expand(3, 8) if sparse else logits
    far_row, delta = torch.tensor([2]), torch.arange(8.0)
    if sparse:
        deltas: Deltas = SparseDeltas(torch.tensor([0, 8]), torch.arange(8), delta)
        steer_inplace(logits, far_row, torch.ones(1), deltas, backend)
        assert logits.tolist() == [[0.0] * 8, [0.0] * 8, delta.tolist()]
    else:
        values[2] = delta
        steer_inplace(logits, torch.tensor([0, 1, 2]), torch.ones(3), DenseDeltas(values), backend)
        assert logits.tolist() == [[0.0] * 8, [0.0] * 8, (2 * delta).tolist()]


def test_arguments_that_only_we_can_get_wrong() -> None:
    logits, rows, values = random_case(6, 4, 2, 10, 10, torch.float32)
    good = {"logits": logits, "rows": rows, "strength": torch.ones(2), "deltas": DenseDeltas(values)}
    offsets, ids = torch.tensor([0, 1, 2]), torch.tensor([3, 4])
    entries = torch.ones(2)
    steer_inplace(**good)
    for wrong in (
        {"logits": logits.double()},
        {"logits": logits[0]},
        {"logits": logits.T.contiguous().T},
        {"rows": rows.int()},
        {"rows": rows[:1]},
        {"strength": torch.ones(3)},
        {"strength": torch.ones(2, dtype=torch.float64)},
        {"strength": torch.ones(2, 2)[:, 0]},
        {"deltas": DenseDeltas(values.double())},
        {"deltas": DenseDeltas(values[0])},
        {"deltas": DenseDeltas(values.T.contiguous().T)},
        {"deltas": DenseDeltas(torch.cat([values, values]))},
        {"deltas": SparseDeltas(offsets[:2], ids, entries)},
        {"deltas": SparseDeltas(offsets, ids.int(), entries)},
        {"deltas": SparseDeltas(offsets, ids, entries[:1])},
        {"deltas": SparseDeltas(offsets, ids, entries.to("meta"))},
    ):
        with pytest.raises(AssertionError):
            steer_inplace(**(good | wrong))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``logits, rows, strength, values, chosen``: any sizes, row strides, types and masks."""
    num_rows, vocab, width = draw(st.integers(1, 17)), draw(st.integers(1, 2100)), draw(st.integers(1, 2100))
    n = draw(st.integers(0, num_rows))
    seed = draw(st.integers(0, 2**31))
    logits, rows, values = random_case(seed, num_rows, n, vocab, width, draw(st.sampled_from(DTYPES)))
    rows = rows.sort().values if draw(st.booleans()) else rows  # sorted rows have neighbours
    generator = torch.Generator().manual_seed(seed)
    logits[torch.rand(logits.shape, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))] = -torch.inf
    padded = torch.zeros(num_rows, vocab + draw(st.sampled_from([0, 1, 16])))
    padded[:, :vocab] = logits
    chosen = torch.rand(values.shape, generator=generator) < draw(st.sampled_from([0.0, 0.01, 0.5, 1.0]))
    return padded[:, :vocab], rows, 2 * torch.randn(n, generator=generator), values, chosen


@with_backend
@settings(max_examples=60)
@given(case=cases())
def test_any_case_is_the_definition(backend: Backend, case: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]) -> None:
    logits, rows, strength, values, chosen = case
    sparse, zero_filled = entries_of(values, chosen)
    for deltas, meant in ((DenseDeltas(values), values), (sparse, zero_filled.values)):
        after = steered(logits, rows, strength, deltas, backend)
        assert_is_definition(logits, after, rows, strength, widened(meant, logits.shape[1]))
