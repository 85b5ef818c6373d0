"""How well an attacker did, with intervals, against the number of tokens that it had seen.

Three numbers of bits are compared. N is the number of candidates, and all of them are equally likely beforehand.

    gain      log2 N - H(posterior)               how sure the attacker has become, rightly or not
    true      log2 (posterior(truth) * N)         how much of that speaks for the true context
    ledger    sum_t log2 q(y_t) / p(y_t)          what the device has counted

The means of ``gain`` and ``true`` both estimate I(context; text), since the posterior is exact. With pure temperature sampling
the mean of the ledger is KL(q_c || p) averaged over c, which is that information and KL(mean of q_c || p) on top: never less.
With greedy or truncated sampling the ledger also counts the surprise of tokens that the large model itself would have chosen.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.privacy.attackers import posteriors
from benchmarks.privacy.mechanism import Transcript
from benchmarks.privacy.suspects import Floats

NUM_TOKENS = (1, 2, 4, 8, 16, 32, 64)
Z = 1.959964  # of a 95 % interval


@dataclass(frozen=True, slots=True)
class Share:
    """A share of ``num`` trials, and its 95 % interval by Wilson."""

    value: float
    low: float
    high: float
    num: int


@dataclass(frozen=True, slots=True)
class Point:
    """The attack after ``tokens`` tokens, or after the whole answer where that is shorter."""

    tokens: int
    accuracy: Share
    gain: float | None = None  # bits, mean; None where there is no posterior
    true: float | None = None  # bits, mean
    ledger: float | None = None  # bits, mean
    most: float | None = None  # bits, the highest ledger at any token so far


def wilson(successes: float, num: int) -> Share:
    """The interval is rather too wide than too narrow here: the contexts and queries are fixed, only texts are drawn."""
    share = float(successes) / num
    middle = (share + Z**2 / (2 * num)) / (1 + Z**2 / num)
    half = Z / (1 + Z**2 / num) * math.sqrt(share * (1 - share) / num + Z**2 / (4 * num**2))
    return Share(share, max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half)), num)


def by_tokens(found: Sequence[Transcript], num_tokens: Sequence[int] = NUM_TOKENS) -> list[Point]:
    """The attack on the tokens."""
    posterior = [posteriors(one.log_q) for one in found]
    return [_point(found, posterior, num) for num in num_tokens]


def by_distance(found: Sequence[tuple[int, Floats]], is_exact: bool) -> list[Point]:
    """The attack on deltas: ``(truth, distances [tokens, contexts])``.

    ``is_exact``: the attacker's arithmetic is the device's, so the candidates at distance 0 are equally likely and no others are.
    """
    points = []
    for num in NUM_TOKENS:
        at = [(truth, distance[min(num, len(distance)) - 1]) for truth, distance in found]
        nearest = [(truth, row == row.min()) for truth, row in at]
        accuracy = wilson(sum(tied[truth] / tied.sum() for truth, tied in nearest), len(nearest))
        bits = float(np.mean([math.log2(len(tied) / tied.sum()) for _, tied in nearest])) if is_exact else None
        points.append(Point(num, accuracy, bits, bits))
    return points


def _point(found: Sequence[Transcript], posterior: Sequence[Floats], num: int) -> Point:
    last = [min(num, len(one.tokens)) - 1 for one in found]
    at = [rows[i] for rows, i in zip(posterior, last, strict=True)]
    truths = [one.truth for one in found]
    return Point(
        tokens=num,
        accuracy=wilson(sum(_guessed(row, truth) for row, truth in zip(at, truths, strict=True)), len(found)),
        gain=float(np.mean([math.log2(len(row)) - _entropy(row) for row in at])),
        true=float(np.mean([math.log2(row[truth] * len(row)) for row, truth in zip(at, truths, strict=True)])),
        ledger=float(np.mean([one.bits[i] for one, i in zip(found, last, strict=True)])),
        most=float(max(one.bits[: i + 1].max() for one, i in zip(found, last, strict=True))),
    )


def _guessed(posterior: Floats, truth: int) -> float:
    """How often the likeliest context is the true one, ties broken at random; what differs by rounding alone is a tie."""
    tied = posterior >= posterior.max() * (1 - 1e-9)
    return float(tied[truth] / tied.sum())


def _entropy(posterior: Floats) -> float:
    likely = posterior[posterior > 0]
    return float(-(likely * np.log2(likely)).sum())
