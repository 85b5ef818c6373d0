"""Which entries of a delta a sparse one carries: those that move the personalized policy.

The policy is pi(a) ~ P(a) exp(x(a)), for the large model's P, which the edge does not know, and the move x = strength * delta.
Were entry a left at the tail's move t, that is, were its probability q = P(a) exp(t) / Z and not p = P(a) exp(x) / Z, it would
cost p log(p / q) - p + q nats of KL divergence: the terms sum to KL(pi || policy with the coded delta), if both have about the
same Z. In place of P stand the small model's probabilities without context, the small ones lifted, for what a small model hardly
expects a large one may know.
"""

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

WORTH = 5e-6  # nats: an entry travels that is worth so much. docs/deltas.md tells what others cost and bring
LIFT, LIFTED = 0.1, 0.7  # in place of P(a): p + LIFT * p ** LIFTED, p being the small model's without context
FLOOR = -500.0  # nats, the log-probability of what is impossible
ROUNDS = 3  # of the tail's move, and the entries that then travel; more of them change nothing that counts
FEW = 32_768  # ids at the most that are looked at closely: of flat rows the likeliest
SAMPLE = 1024  # ids, evenly spread, whose median move is the first guess of the tail's: no boosted entry can pull it away

LogProbs: TypeAlias = npt.NDArray[np.float32]
Ids: TypeAlias = npt.NDArray[np.int64]
Moves: TypeAlias = npt.NDArray[np.float64]


def choose(
    with_context: LogProbs, without_context: LogProbs, strength: float, worth: float, max_entries: int
) -> tuple[Ids, Moves]:
    """Log-probabilities ``[vocab]`` of both rows -> increasing ids, and their moves less the tail's, nats.

    Of the whole vocabulary only sums are made; the few that could be worth their bytes are then looked at closely.
    """
    log_p, moves = _finite(with_context, without_context, np.float32(strength))
    steered = log_p + moves
    top = float(steered.max())
    plain, steered = np.exp(log_p), np.exp(np.subtract(steered, np.float32(top), out=steered), out=steered)
    total = float(steered.sum())
    least = worth / 20
    while np.count_nonzero(likely := (plain > least) | (steered > least * total)) > FEW:
        least *= 2
    few = np.flatnonzero(likely)
    x, p, base = (row[few].astype(np.float64) for row in (moves, steered, plain))
    # What is left is summed, not taken from the total, where rounding would drown it: a sure row leaves 1e-11, and to an id that
    # only the large model thinks of, the tail is all the delta there is. The floor is for rows that leave nothing at all.
    plain[few] = steered[few] = 0
    p_rest, base_rest = float(steered.sum()) + 1e-30, float(plain.sum()) + 1e-30
    if base_rest + base.sum() < 1e-20:  # a row that expects nothing is none of a language model
        return few[:0], x[:0]
    lift = (1 + LIFT * np.exp((LIFTED - 1) * np.maximum(log_p[few], FLOOR, dtype=np.float64))) / total
    log_ratio = min(float(np.median(moves[:: max(len(moves) // SAMPLE, 1)])) - top, -FLOOR)  # the tail's move, less the top
    for _ in range(ROUNDS):
        from_tail = x - (log_ratio + top)
        costs = lift * (p * (from_tail - 1) + base * np.exp(log_ratio))
        left = costs <= worth
        log_ratio = np.log((p_rest + p[left].sum()) / (base_rest + base[left].sum()))
    chosen = np.flatnonzero(~left)
    if len(chosen) > max_entries:
        chosen = np.sort(chosen[np.argpartition(costs[chosen], -max_entries)[-max_entries:]])
    return few[chosen], from_tail[chosen]


def _finite(with_context: LogProbs, without_context: LogProbs, strength: np.float32) -> tuple[LogProbs, LogProbs]:
    """The row without context and the moves; ids that a row cannot produce (-inf or NaN) stand at FLOOR in it."""
    with np.errstate(invalid="ignore", over="ignore"):  # -inf - -inf
        moves = (with_context - without_context) * strength
        if np.isfinite(moves @ moves):  # one cheap pass; rows beyond any language model's fail it too, to no harm
            return without_context, moves
    without_context = np.fmax(without_context, np.float32(FLOOR))
    return without_context, (np.fmax(with_context, np.float32(FLOOR)) - without_context) * strength
