"""The written-out iterations against the collapsed strength, and the loop around them on models of a few numbers."""

from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from costeer_vllm.demo.algorithm1 import algorithm1, personalize
from costeer_vllm.errors import InvalidParameter
from costeer_vllm.steering import SteeringParams


def finite(low: float, high: float) -> Any:
    return st.floats(low, high, allow_nan=False, allow_infinity=False)


@st.composite
def steering_params(draw: st.DrawFn) -> SteeringParams:
    T, alpha, beta = draw(st.integers(0, 40)), draw(finite(0, 3)), draw(finite(-3, 3))
    try:  # lambda is kept away from 0, where the iterations multiply rounding errors by alpha * eta each
        return SteeringParams(T, alpha, beta, draw(finite(1, 5)), draw(finite(0.05, 50)))
    except InvalidParameter:  # the strength overflows
        assume(False)
        raise


@given(steering_params(), st.integers(0, 2**32 - 1))
def test_iterations_equal_the_collapsed_strength(params: SteeringParams, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    base, delta = (3 * torch.randn(2, 50, generator=generator, dtype=torch.float64) for _ in range(2))
    collapsed = (base + params.strength * delta).log_softmax(-1)
    torch.testing.assert_close(personalize(base, delta, params), collapsed, rtol=1e-9, atol=1e-9)


def test_one_iteration_by_hand() -> None:
    base, delta = torch.tensor([0.5, 0.3, 0.2]).double().log(), torch.tensor([-1.0, 0.0, 2.0]).double()
    expected = (base + delta / (2 + 0.1)).exp()  # u_0 = beta delta; weights lambda and 1 / eta both stand on log pi_0
    log_pi = personalize(base, delta, SteeringParams(T=1))
    torch.testing.assert_close(log_pi.exp(), expected / expected.sum())


def test_two_iterations_by_hand() -> None:
    base, delta = torch.tensor([0.5, 0.3, 0.2]).double().log(), torch.tensor([-1.0, 0.0, 2.0]).double()
    c_1 = 1 / 2.1
    c_2 = (2 * c_1 + 2 + c_1 / 10) / 4.1
    log_pi = personalize(base, delta, SteeringParams(T=2))
    torch.testing.assert_close(log_pi, (base + c_2 * delta).log_softmax(-1))


def test_no_iteration_leaves_the_base_policy() -> None:
    base = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    log_pi = personalize(base, torch.ones(3, 7), SteeringParams(T=0))
    assert log_pi.dtype == torch.float64
    torch.testing.assert_close(log_pi, base.double().log_softmax(-1))


class Script:
    """A model that knows what follows each token: logits = table[last token]; as its cache it counts the tokens read."""

    device = "cpu"

    def __init__(self, table: list[list[float]], eos: int | list[int] | None = 3) -> None:
        self.table = torch.tensor(table)
        self.generation_config = SimpleNamespace(eos_token_id=eos)
        self.calls: list[tuple[list[int], Any]] = []

    def __call__(self, input_ids: torch.Tensor, past_key_values: Any, **_: Any) -> SimpleNamespace:
        self.calls.append((input_ids[0].tolist(), past_key_values))
        num_read = (past_key_values or 0) + input_ids.shape[1]
        return SimpleNamespace(logits=self.table[input_ids][:, -1:], past_key_values=num_read)


UP = [[0.0, 9.0, 1.0, 1.0], [0.0, 0.0, 9.0, 1.0], [0.0, 0.0, 0.0, 9.0], [9.0, 0.0, 0.0, 0.0]]  # 0 -> 1 -> 2 -> 3
FLAT = [[0.0] * 4] * 4


def test_it_stops_at_the_end_of_sequence_and_includes_it() -> None:
    assert algorithm1(Script(UP), Script(FLAT), [0], [0], [0], SteeringParams(), 10) == [1, 2, 3]


def test_it_stops_at_max_new_tokens() -> None:
    assert algorithm1(Script(UP), Script(FLAT), [0], [0], [0], SteeringParams(), 2) == [1, 2]
    assert algorithm1(Script(UP, eos=None), Script(FLAT), [0], [0], [0], SteeringParams(), 6) == [1, 2, 3, 0, 1, 2]


def test_without_steering_only_the_large_model_speaks() -> None:
    small = Script([[0.0, 0.0, 0.0, 50.0]] * 4)
    assert algorithm1(Script(UP), small, [0], [1], [2], SteeringParams(T=0), 10) == [1, 2, 3]


def test_the_delta_is_with_minus_without_context() -> None:
    small = Script([[0.0] * 4, [0.0, 0.0, 0.0, 50.0], [0.0] * 4, [0.0] * 4])  # after token 1 it wants to end, else anything
    steer = SteeringParams(T=20)
    assert algorithm1(Script(UP), small, [0], [1], [2], steer, 1) == [3]
    assert algorithm1(Script(UP), small, [0], [2], [1], steer, 1) == [1]
    assert algorithm1(Script(UP), small, [0], [1], [1], steer, 1) == [1]


def test_every_policy_reads_its_prompt_and_then_each_token_once() -> None:
    large, small = Script(UP), Script(FLAT)
    algorithm1(large, small, [2, 0], [3, 3, 0], [0], SteeringParams(), 10)
    assert large.calls == [([2, 0], None), ([1], 2), ([2], 3)]
    assert small.calls == [([3, 3, 0], None), ([0], None), ([1], 3), ([1], 1), ([2], 4), ([2], 2)]
