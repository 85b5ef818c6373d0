"""The device's mechanism once more, for all candidate contexts of many texts at once: what an attacker runs for itself.

``edge.fusion.draw`` and ``edge.disclosure`` make one choice by one delta. Here stand the probabilities with which any delta would
have made the choice that was seen, with the ledger that any context would have kept. A test compares the two.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from costeer_vllm.edge.fusion import GREEDY_BELOW
from costeer_vllm.protocol.messages import Sampling

HALVINGS = 40  # as many as edge.fusion makes

Floats = npt.NDArray[np.float64]


@dataclass(slots=True)
class Suspects:
    """For each text, the ledgers that the candidate contexts would have kept."""

    bits: Floats  # [texts, contexts]
    is_spent: npt.NDArray[np.bool_]  # [texts, contexts]

    @classmethod
    def of(cls, num_texts: int, num_contexts: int) -> "Suspects":
        return cls(np.zeros((num_texts, num_contexts)), np.zeros((num_texts, num_contexts), bool))

    def heard(
        self,
        texts: npt.NDArray[np.int64],
        scores: Floats,
        deltas: npt.NDArray[np.float32],
        chosen: npt.NDArray[np.int64],
        strength: float,
        sampling: Sampling,
    ) -> Floats:
        """log q ``[n, contexts]`` of the candidates ``chosen [n]``, which are the next tokens of ``texts [n]``.

        ``scores [n, k]`` are the base policies', ``deltas [n, contexts, k]`` the candidates'.
        """
        shape = deltas.shape[:2]
        left = np.full(shape, math.inf) if sampling.max_bits is None else sampling.max_bits - self.bits[texts]
        wanted = np.where(self.is_spent[texts], 0.0, strength)
        wide = np.broadcast_to(scores[:, None], deltas.shape).reshape(-1, deltas.shape[-1])
        flat = deltas.reshape(wide.shape).astype(np.float64)
        used = strengths_within(left.ravel(), wide, flat, wanted.ravel(), sampling).reshape(shape)
        index = np.repeat(chosen, shape[1])[:, None]
        log_q = np.take_along_axis(log_policy(wide + used.reshape(-1, 1) * flat, sampling), index, -1).reshape(shape)
        log_p = np.take_along_axis(log_base(wide, sampling), index, -1).reshape(shape)
        self.bits[texts] += np.where(used == 0, 0.0, (log_q - log_p) / math.log(2))
        self.is_spent[texts] |= (used == 0) & (wanted != 0)
        return log_q


def strengths_within(left: Floats, scores: Floats, deltas: Floats, wanted: Floats, sampling: Sampling) -> Floats:
    """Row by row what ``edge.fusion`` lowers the strength ``wanted [m]`` to, lest a token tell more than ``left [m]`` bits."""
    log_p = log_base(scores, sampling)

    def is_within(rows: npt.NDArray[np.int64], strengths: Floats) -> npt.NDArray[np.bool_]:
        log_q = log_policy(scores[rows] + strengths[:, None] * deltas[rows], sampling)
        most = (log_q - log_p[rows]).max(-1) / math.log(2)  # log p is finite: no -inf - -inf
        return np.asarray(most <= left[rows])

    strengths = wanted.copy()
    rows = np.flatnonzero(np.isfinite(left) & (wanted != 0))
    rows = rows[~is_within(rows, wanted[rows])] if len(rows) else rows
    if not len(rows):
        return strengths
    low, high = np.zeros(len(rows)), wanted[rows]
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        within = is_within(rows, middle)
        low, high = np.where(within, middle, low), np.where(within, high, middle)
    strengths[rows] = low
    return strengths


def log_policy(scores: Floats, sampling: Sampling) -> Floats:
    """``edge.fusion.sampler`` over the last axis, of temperature alone or greedy."""
    if sampling.temperature < GREEDY_BELOW:
        return np.where(np.arange(scores.shape[-1]) == scores.argmax(-1)[..., None], 0.0, -np.inf)
    return log_softmax(scores / sampling.temperature)


def log_base(scores: Floats, sampling: Sampling) -> Floats:
    """log p, what the ledger compares with; greedy: at temperature 1."""
    return log_softmax(scores / (sampling.temperature if sampling.temperature >= GREEDY_BELOW else 1.0))


def log_softmax(scores: Floats) -> Floats:
    shifted = scores - scores.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))
