"""The paper on one page: FTRL steering of a base policy by a delta, collapsed to one scalar.

CoSteer (Eq. 7) personalizes the base policy pi_0 in T iterations with the utilities

    u_i = alpha * (log pi_i - log pi_0) + beta * delta
    log pi_t = (sum_{i<t} u_i + t * lambda * log pi_0 + log pi_{t-1} / eta) / (t * lambda + 1 / eta) + const

where ``delta = log P_SLM(. | query, context, s) - log P_SLM(. | query, s)``. With ``x_t = log pi_t - log pi_0`` the recursion
is linear in delta and starts at zero, so ``x_t = c_t * delta`` exactly, with

    c_0 = 0,    c_t = (alpha * sum_{i<t} c_i + t * beta + c_{t-1} / eta) / (t * lambda + 1 / eta)

and the personalized policy is ``softmax(base_logits + c_T * delta)``. ``c_T`` is the steering strength.
"""

import math
from dataclasses import dataclass, fields

from costeer_vllm.errors import InvalidParameter

MAX_ITERATIONS = 10_000
MAX_STRENGTH = 1_000.0  # |c * delta| stays far inside float32 for every delta that the codec lets through


@dataclass(frozen=True, slots=True)
class SteeringParams:
    """The paper's hyperparameters (Eq. 3-7); all but ``T`` are real and unitless.

    Raises:
        InvalidParameter: if a value is not a finite number, lies outside its range, or the resulting strength overflows.
    """

    T: int = 20
    alpha: float = 2.0
    beta: float = 1.0
    player_lambda: float = 2.0
    eta: float = 10.0

    def __post_init__(self) -> None:
        if isinstance(self.T, bool) or not isinstance(self.T, int) or not 0 <= self.T <= MAX_ITERATIONS:
            raise InvalidParameter("T", self.T, f"an integer from 0 to {MAX_ITERATIONS}")
        for field in fields(self)[1:]:
            name = "lambda" if field.name == "player_lambda" else field.name
            value = getattr(self, field.name)
            check_finite(name, value)
            if name in ("alpha", "lambda") and value < 0:
                raise InvalidParameter(name, value, "a finite number, 0 or more")
            if name == "eta" and value <= 0:
                raise InvalidParameter(name, value, "a finite number above 0")
        check_strength("strength (from T, alpha, beta, lambda and eta)", self.strength)

    @property
    def strength(self) -> float:
        """c_T, the scalar on the delta (unitless); ``inf`` or ``nan`` only while validation is still to reject it."""
        total = previous = 0.0
        for t in range(1, self.T + 1):
            denominator = t * self.player_lambda + 1.0 / self.eta
            current = (self.alpha * total + t * self.beta + previous / self.eta) / denominator if denominator else math.inf
            total += current
            previous = current
            if not math.isfinite(total):
                return total
        return previous


def check_finite(name: str, value: object) -> float:
    """``value`` as a float; raises InvalidParameter unless it is a finite real number (booleans are not numbers here)."""
    try:
        number = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise InvalidParameter(name, value, "a finite number")
    return number


def check_strength(name: str, value: object) -> float:
    """``value`` as a steering strength; raises InvalidParameter if it is not finite or exceeds MAX_STRENGTH in magnitude."""
    strength = check_finite(name, value)
    if abs(strength) > MAX_STRENGTH:
        raise InvalidParameter(name, value, f"a finite number from -{MAX_STRENGTH:g} to {MAX_STRENGTH:g}")
    return strength
