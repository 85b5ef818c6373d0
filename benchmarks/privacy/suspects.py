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
    num_cut: npt.NDArray[np.int64]  # [texts] tokens that the sampler would have cut off without a context
    num_heard: npt.NDArray[np.int64]  # [texts]

    @classmethod
    def of(cls, num_texts: int, num_contexts: int) -> "Suspects":
        shape, none = (num_texts, num_contexts), np.zeros(num_texts, np.int64)
        return cls(np.zeros(shape), np.zeros(shape, bool), none, none.copy())

    @property
    def share_cut(self) -> Floats:
        """``[texts]``, as ``edge.disclosure`` estimates it."""
        return np.asarray((self.num_cut + 1) / (self.num_heard + 16))

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
        log_r = np.repeat(log_expected(scores, self.share_cut[texts], sampling), shape[1], axis=0)
        used = strengths_within(left.ravel(), wide, flat, wanted.ravel(), log_r, sampling).reshape(shape)
        index = np.repeat(chosen, shape[1])[:, None]
        log_q = np.take_along_axis(log_policy(wide + used.reshape(-1, 1) * flat, sampling), index, -1).reshape(shape)
        told = log_q - np.take_along_axis(log_r, index, -1).reshape(shape)
        self.bits[texts] += np.where(used == 0, 0.0, told / math.log(2))
        self.is_spent[texts] |= (used == 0) & (wanted != 0)
        plain = np.take_along_axis(log_policy(scores, sampling), chosen[:, None], -1)[:, 0]
        self.num_cut[texts] += plain == -np.inf
        self.num_heard[texts] += 1
        return log_q


def strengths_within(left: Floats, scores: Floats, deltas: Floats, wanted: Floats, log_r: Floats, sampling: Sampling) -> Floats:
    """Row by row what ``edge.fusion`` lowers the strength ``wanted [m]`` to, lest a token tell more than ``left [m]`` bits."""

    def is_within(rows: npt.NDArray[np.int64], strengths: Floats) -> npt.NDArray[np.bool_]:
        log_q = log_policy(scores[rows] + strengths[:, None] * deltas[rows], sampling)
        most = (log_q - log_r[rows]).max(-1) / math.log(2)  # log r is finite: no -inf - -inf
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


def log_expected(scores: Floats, share_cut: Floats, sampling: Sampling) -> Floats:
    """log r ``[n, k]``, what the ledger compares with: see ``edge.fusion``."""
    if sampling.temperature >= GREEDY_BELOW:
        return log_softmax(scores / sampling.temperature)
    shares = share_cut[:, None]
    return np.asarray(np.logaddexp(log_policy(scores, sampling) + np.log(1 - shares), log_softmax(scores) + np.log(shares)))


def log_softmax(scores: Floats) -> Floats:
    shifted = scores - scores.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))
