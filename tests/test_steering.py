"""The strength c_T against Algorithm 1 written out, the table of known values, and what validation lets through."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from costeer_vllm.errors import CoSteerError, InvalidParameter
from costeer_vllm.steering import MAX_ITERATIONS, MAX_STRENGTH, SteeringParams, check_finite, check_strength

TABLE = {1: 0.476190, 2: 0.731707, 5: 1.125616, 10: 1.448781, 20: 1.783257, 50: 2.234015, 100: 2.578105}


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def iterated(base: np.ndarray, delta: np.ndarray, T: int, alpha: float, beta: float, player_lambda: float, eta: float) -> Any:
    """log pi_T by Eq. 7, every sum written out; ``base`` is log pi_0."""
    policies = [base]
    utilities: list[np.ndarray] = []
    for t in range(1, T + 1):
        utilities.append(alpha * (policies[-1] - base) + beta * delta)
        numerator = sum(utilities) + t * player_lambda * base + policies[-1] / eta
        policies.append(log_softmax(numerator / (t * player_lambda + 1 / eta)))
    return policies[-1]


hyperparameters = {
    "T": st.integers(0, 60),
    "alpha": st.floats(0, 3),
    "beta": st.floats(-2, 2),
    "player_lambda": st.floats(0.05, 4),
    "eta": st.floats(0.05, 100),
}


@settings(max_examples=200)
@given(seed=st.integers(0, 2**32 - 1), vocab=st.integers(2, 40), **hyperparameters)
@example(seed=0, vocab=40, T=20, alpha=2.0, beta=1.0, player_lambda=2.0, eta=10.0)
def test_strength_is_the_iterations_of_eq_7_in_one_scalar(seed: int, vocab: int, **values: Any) -> None:
    rng = np.random.default_rng(seed)
    base = log_softmax(rng.normal(0, 3, vocab))
    delta = log_softmax(rng.normal(0, 2, vocab)) - log_softmax(rng.normal(0, 2, vocab))
    try:
        strength = SteeringParams(**values).strength
        growth = SteeringParams(**{**values, "beta": 1.0}).strength  # of a rounding error, as of beta * delta
    except InvalidParameter:
        return  # alpha so far above lambda that the strength overflows: not for this test
    collapsed = log_softmax(base + strength * delta)
    expected = iterated(base, delta, **values)
    scale = (1 + growth) * (1 + np.abs(delta).max()) * (1 + values["T"])
    np.testing.assert_allclose(collapsed, expected, rtol=0, atol=1e-13 * scale)


@pytest.mark.parametrize(("T", "expected"), TABLE.items())
def test_known_strengths(T: int, expected: float) -> None:
    assert SteeringParams(T=T).strength == pytest.approx(expected, abs=5e-7)


def test_defaults_are_the_papers() -> None:
    assert SteeringParams() == SteeringParams(T=20, alpha=2.0, beta=1.0, player_lambda=2.0, eta=10.0)
    assert SteeringParams(T=0).strength == 0.0


def test_strength_grows_or_converges_as_alpha_and_lambda_say() -> None:
    assert SteeringParams(T=100, alpha=5).strength == pytest.approx(246.8, abs=0.05)
    assert SteeringParams(T=10_000, alpha=1, beta=3).strength == pytest.approx(3.0, rel=1e-2)  # beta / (lambda - alpha)
    # With alpha = lambda it grows like log T: each factor of ten adds the same.
    c = [SteeringParams(T=10**n).strength for n in (2, 3, 4)]
    assert c[2] - c[1] == pytest.approx(c[1] - c[0], rel=0.02)


@given(beta=st.floats(-2, 2), T=st.integers(0, 50))
def test_strength_is_linear_in_beta(beta: float, T: int) -> None:
    assert SteeringParams(T=T, beta=beta).strength == pytest.approx(beta * SteeringParams(T=T).strength, rel=1e-12, abs=1e-300)


def test_lambda_zero_and_integers_are_allowed() -> None:
    assert SteeringParams(T=1, alpha=0, beta=1, player_lambda=0, eta=1).strength == 1.0
    assert SteeringParams(beta=-1).strength == -SteeringParams().strength


REFUSED: list[tuple[str, Any, str]] = [
    ("T", True, "integer"),
    ("T", False, "integer"),
    ("T", -1, "0 to 10000"),
    ("T", MAX_ITERATIONS + 1, "0 to 10000"),
    ("T", 20.0, "integer"),
    ("T", "20", "integer"),
    ("T", None, "integer"),
    ("alpha", True, "finite number"),
    ("alpha", -0.1, "0 or more"),
    ("alpha", math.nan, "finite number"),
    ("alpha", math.inf, "finite number"),
    ("alpha", "2", "finite number"),
    ("alpha", [2.0], "finite number"),
    ("beta", False, "finite number"),
    ("beta", math.nan, "finite number"),
    ("beta", -math.inf, "finite number"),
    ("beta", 10**400, "finite number"),
    ("beta", 1j, "finite number"),
    ("lambda", True, "finite number"),
    ("lambda", -1e-9, "0 or more"),
    ("lambda", math.nan, "finite number"),
    ("eta", True, "finite number"),
    ("eta", 0, "above 0"),
    ("eta", -1, "above 0"),
    ("eta", math.inf, "finite number"),
    ("eta", None, "finite number"),
]


@pytest.mark.parametrize(("field", "value", "allowed"), REFUSED)
def test_a_refusal_names_field_value_and_what_is_allowed(field: str, value: Any, allowed: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        SteeringParams(**{"player_lambda" if field == "lambda" else field: value})
    message = str(caught.value)
    assert caught.value.field == field
    assert caught.value.value is value
    assert f"costeer: {field} is " in message
    assert allowed in message
    assert repr(value)[:70] in message
    assert len(message) < 200


@pytest.mark.parametrize("field", ["T", "alpha", "beta"])
def test_an_integer_that_python_will_not_print_is_refused_like_any_other(field: str) -> None:
    with pytest.raises(InvalidParameter, match=f"{field} is of type int and too large to show; it must be"):
        SteeringParams(**{field: 10**5000})


@pytest.mark.parametrize(
    "values",
    [
        {"T": 100, "alpha": 500.0},
        {"T": 10_000, "alpha": 1e308, "player_lambda": 1e-300},
        {"beta": 1e308},
        {"beta": -1e6},
        {"T": 1, "beta": 1.0, "player_lambda": 0.0, "eta": 1e300},
    ],
)
def test_a_strength_that_overflows_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(InvalidParameter, match="strength"):
        SteeringParams(**values)


def test_the_error_is_a_value_error_and_one_of_ours() -> None:
    with pytest.raises(ValueError, match="eta") as caught:
        SteeringParams(eta=0)
    assert isinstance(caught.value, CoSteerError)


def test_every_strength_that_is_let_through_is_usable() -> None:
    assert check_strength("strength", MAX_STRENGTH) == MAX_STRENGTH
    assert check_strength("strength", -1000) == -1000.0
    for value in (MAX_STRENGTH + 0.001, -1001, 1e300):
        with pytest.raises(InvalidParameter, match=r"strength is .* from -1000 to 1000"):
            check_strength("strength", value)


@settings(max_examples=300)
@given(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.complex_numbers(), st.text(), st.lists(st.floats())))
def test_check_finite_returns_finite_floats_only(value: object) -> None:
    try:
        number = check_finite("x", value)
    except InvalidParameter:
        assert isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(float(value))
    else:
        assert type(number) is float
        assert math.isfinite(number)
        assert number == float(value)


@given(
    T=st.one_of(st.integers(-2, 300), st.integers()),
    alpha=st.floats(),
    beta=st.floats(),
    player_lambda=st.floats(),
    eta=st.floats(),
)
@settings(max_examples=300)
def test_whatever_is_given_the_strength_is_finite_and_bounded(**values: Any) -> None:
    try:
        params = SteeringParams(**values)
    except InvalidParameter:
        return
    assert abs(params.strength) <= MAX_STRENGTH
