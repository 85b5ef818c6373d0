"""Algorithm 1 on the device: base policy and delta are fused, one of the candidates is drawn, and what it told is counted.

    log pi(y) = log pi_0(y) + c * delta(y) + const              over the candidates y; pi_0: base policy, pi: personalized policy
    q = sampler(pi)                                             temperature, min_p, top_k, top_p, in vLLM's order
    p = pi_0 at the same temperature (greedy: at temperature 1)
    r = (1 - e) * sampler(pi_0) + e * p                         what somebody expects who does not know the context
    bits(y) = log2 q(y) / r(y)                                  what y tells, at the most, about the private context

Where nothing is cut off, sampler(pi_0) is p, and so is r. Greedy, or with top_k, top_p or min_p, q may draw what would have been
cut off without the context; e, above 0, is the share of such tokens that is expected, and depends on the text so far alone.

A token that is drawn at strength 0 is drawn without the context and tells nothing of it. With ``bits_left`` the strength is
lowered until no token that could be drawn would tell more. Nothing here has a state; all arithmetic is float64.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from costeer_vllm.candidates import BasePolicy
from costeer_vllm.protocol.messages import Sampling

GREEDY_BELOW = 1e-5  # temperature, as in vLLM
_HALVINGS = 40  # of the interval in which a strength is searched

LogProbs: TypeAlias = npt.NDArray[np.float64]  # [k], nats; -inf: cannot be drawn


@dataclass(frozen=True, slots=True)
class Drawn:
    """A token and how it came about."""

    token: int
    log_p: float  # nats, without the context: in the base policy, among the candidates
    log_q: float  # nats, as it was drawn
    log_r: float  # nats, as it was to be expected
    log_pi: float  # nats, in the personalized policy before the sampler: what log_p becomes by the context
    is_cut: bool  # the sampler would have cut it off without the context
    strength: float  # c_T, or less for want of budget; 0: drawn without the context

    @property
    def bits(self) -> float:
        """What the token told; negative where the context made it less likely."""
        return (self.log_q - self.log_r) / math.log(2) if self.strength else 0.0


def draw(
    base: BasePolicy,
    delta: npt.NDArray[np.floating],
    strength: float,
    sampling: Sampling,
    uniform: float,
    bits_left: float = math.inf,
    share_cut: float = 1.0,
) -> Drawn:
    """Draw one of the k candidates.

    Args:
        base: the candidates.
        delta: ``[k]``, theirs, nats, finite.
        strength: c_T, unitless.
        sampling: of the request.
        uniform: a random number in [0, 1).
        bits_left: what the token may tell at the most, whichever of them is drawn.
        share_cut: e, above 0.
    """
    scores, delta = base.log_probs.astype(np.float64), delta.astype(np.float64)
    temperature = sampling.temperature if _is_random(sampling) else 1.0
    log_p = _log_softmax(scores / temperature)

    log_s = sampler(scores, sampling)
    log_r = np.logaddexp(log_s + _log(1 - share_cut), log_p + math.log(share_cut)) if _cuts(sampling) else log_p

    def most_bits(c: float) -> float:
        log_q = sampler(scores + c * delta, sampling)
        return float(np.where(log_q > -np.inf, log_q - log_r, -np.inf).max()) / math.log(2)

    strength = _strength_within(bits_left, strength, most_bits)
    personal = scores + strength * delta
    log_q, log_pi = sampler(personal, sampling), _log_softmax(personal / temperature)
    chosen = _inverse_cdf(np.exp(log_q), uniform)
    return Drawn(
        token=int(base.ids[chosen]),
        log_p=float(log_p[chosen]),
        log_q=float(log_q[chosen]),
        log_r=float(log_r[chosen]),
        log_pi=float(log_pi[chosen]),
        is_cut=bool(log_s[chosen] == -np.inf),
        strength=strength,
    )


def sampler(scores: LogProbs, sampling: Sampling) -> LogProbs:
    """Log-probabilities ``[k]`` up to a constant -> those with which the request draws."""
    if not _is_random(sampling):
        greedy = np.full(len(scores), -np.inf)
        greedy[scores.argmax()] = 0.0
        return greedy
    log_q = _log_softmax(scores / sampling.temperature)
    if sampling.min_p > 0:
        log_q[log_q < log_q.max() + math.log(sampling.min_p)] = -np.inf
    if 0 < sampling.top_k < len(log_q):
        log_q[log_q < np.partition(log_q, -sampling.top_k)[-sampling.top_k]] = -np.inf
    if sampling.top_p < 1:
        log_q = _log_softmax(log_q)
        order = np.argsort(log_q, kind="stable")
        is_cut = np.cumsum(np.exp(log_q[order])) <= 1 - sampling.top_p
        is_cut[-1] = False
        log_q[order[is_cut]] = -np.inf
    return _log_softmax(log_q)


def _strength_within(bits_left: float, strength: float, most_bits: Callable[[float], float]) -> float:
    """The strength nearest to ``strength`` at which no token tells more than ``bits_left``; 0 if there is none."""
    if bits_left == math.inf or strength == 0 or most_bits(strength) <= bits_left:
        return strength
    low, high = 0.0, strength
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if most_bits(middle) <= bits_left else (low, middle)
    return low


def _inverse_cdf(q: npt.NDArray[np.float64], uniform: float) -> int:
    sums = np.cumsum(q)
    return int(np.searchsorted(sums, uniform * sums[-1], side="right").clip(max=np.flatnonzero(q)[-1]))


def _is_random(sampling: Sampling) -> bool:
    return sampling.temperature >= GREEDY_BELOW


def _cuts(sampling: Sampling) -> bool:
    return not _is_random(sampling) or sampling.min_p > 0 or sampling.top_k > 0 or sampling.top_p < 1


def _log(share: float) -> float:
    return math.log(share) if share > 0 else -math.inf


def _log_softmax(scores: LogProbs) -> LogProbs:
    shifted = scores - scores.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))
