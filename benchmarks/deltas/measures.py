"""What a coded delta costs and what it spoils, at many positions."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from benchmarks.deltas.triples import LogProbs, Triple
from costeer_vllm.delta import STEP, SparseDelta, decode, encode_sparse
from costeer_vllm.delta.choice import WORTH

STRENGTHS = (0.476, 1.0, 1.75, 2.6)  # the paper's T = 1, about 4, about 20 and about 100: see steering.py
WORTHS = (1e-4, 3e-5, 1e-5, WORTH, 2e-6, 5e-7)
TOP_512 = "top 512"  # the reference: what was sent before

Code: TypeAlias = float | str  # the worth of an entry in nats, or TOP_512


@dataclass(frozen=True, slots=True)
class Point:
    """One encoding of the deltas of one family of positions, at one strength."""

    family: str
    vocab: int
    strength: float
    code: Code
    positions: int
    bytes_median: float
    bytes_mean: float
    bytes_p99: float
    kl_mean: float  # nats, of the exact policy from the one with the coded delta
    kl_p99: float
    greedy_changed: float  # share of the positions
    greedy_near: float  # share at which the exact policy's two likeliest tokens are within 0.005 nats
    encode_us: float  # medians
    decode_us: float


@dataclass(slots=True)
class _Seen:
    sizes: list[int] = field(default_factory=list)
    kls: list[float] = field(default_factory=list)
    changed: list[bool] = field(default_factory=list)
    near: list[bool] = field(default_factory=list)
    encode_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)


class Exact:
    """The personalized policy by the whole delta: float64, ``log_base`` normalized."""

    def __init__(self, triple: Triple, strength: float) -> None:
        self.strength = strength
        self.log_base = triple.base.astype(np.float64)
        self._log_base_total = _log_total(self.log_base)
        moves = strength * (triple.with_context - triple.without_context).astype(np.float64)
        logits = self.log_base + moves
        self._log_total = _log_total(logits)
        self._policy = np.exp(logits - self._log_total)
        self._mean_move = float(self._policy @ moves)
        self.greedy = int(logits.argmax())
        first, second = np.partition(logits, -2)[[-1, -2]]
        self.is_near = bool(first - second < STEP)

    def divergence(self, delta: SparseDelta) -> float:
        """KL(exact policy || the one with ``delta``), nats. Only the listed ids need a look."""
        moves = self.strength * delta.values.astype(np.float64)
        listed = np.exp(self.log_base[delta.ids] - self._log_base_total)
        top = max(float(moves.max(initial=0)), 0.0)
        log_total = np.log(max(1 - listed.sum(), 0.0) * np.exp(-top) + (listed * np.exp(moves - top)).sum()) + top
        log_total += self._log_base_total
        return float(self._mean_move - self._log_total - self._policy[delta.ids] @ moves + log_total)

    def is_changed(self, delta: SparseDelta) -> bool:
        """Whether the greedy token becomes another one."""
        logits = self.log_base.copy()
        logits[delta.ids] += self.strength * delta.values.astype(np.float64)
        return int(logits.argmax()) != self.greedy


def _log_total(logits: npt.NDArray[np.float64]) -> float:
    top = logits.max()
    return float(np.log(np.exp(logits - top).sum()) + top)


def measure(family: str, triples: Iterable[Triple], advance: Callable[[], None]) -> list[Point]:
    """Every encoding at every strength, over all ``triples``."""
    seen: dict[tuple[float, Code], _Seen] = {}
    vocab = 0
    for triple in triples:
        vocab = len(triple.base)
        for strength in STRENGTHS:
            exact = Exact(triple, strength)
            for code in (*WORTHS, TOP_512):
                _look(seen.setdefault((strength, code), _Seen()), triple, exact, code)
        advance()
    return [_point(family, vocab, strength, code, one) for (strength, code), one in seen.items()]


def _look(seen: _Seen, triple: Triple, exact: Exact, code: Code) -> None:
    if isinstance(code, str):
        size, delta = top_512(triple.with_context, triple.without_context)
    else:
        start = time.perf_counter()
        payload = encode_sparse(triple.with_context, triple.without_context, exact.strength, worth=code)
        encoded = time.perf_counter()
        found = decode(payload, len(triple.base))
        seen.decode_s.append(time.perf_counter() - encoded)
        seen.encode_s.append(encoded - start)
        assert isinstance(found, SparseDelta)
        size, delta = len(payload), found
    seen.sizes.append(size)
    seen.kls.append(exact.divergence(delta))
    seen.changed.append(exact.is_changed(delta))
    seen.near.append(exact.is_near)


def top_512(with_context: LogProbs, without_context: LogProbs) -> tuple[int, SparseDelta]:
    """The reference: by the larger of both probabilities until 1e-3 of the mass is left; ids of 16 or 32 bits, float16 values."""
    p_with, p_without = np.exp(with_context), np.exp(without_context)
    weight = np.maximum(p_with, p_without)
    top = np.argpartition(weight, -512)[-512:]
    top = top[np.argsort(-weight[top])]
    left = np.maximum(1 - np.cumsum(p_with[top], dtype=np.float64), 1 - np.cumsum(p_without[top], dtype=np.float64))
    enough = np.flatnonzero(left <= 1e-3)
    ids = np.sort(top[: enough[0] + 1] if len(enough) else top)
    p_with[ids] = p_without[ids] = 0
    tail = np.log((float(p_with.sum()) + 1e-30) / (float(p_without.sum()) + 1e-30))
    values = (with_context[ids] - without_context[ids] - np.float32(tail)).astype(np.float16)
    return 5 + len(ids) * (6 if len(with_context) > 2**16 else 4), SparseDelta(ids.astype(np.int64), values.astype(np.float32))


def _point(family: str, vocab: int, strength: float, code: Code, seen: _Seen) -> Point:
    def us(seconds: list[float]) -> float:
        return round(1e6 * float(np.median(seconds)), 1) if seconds else 0.0

    return Point(
        family=family,
        vocab=vocab,
        strength=strength,
        code=code,
        positions=len(seen.sizes),
        bytes_median=float(np.median(seen.sizes)),
        bytes_mean=round(float(np.mean(seen.sizes)), 1),
        bytes_p99=round(float(np.percentile(seen.sizes, 99)), 1),
        kl_mean=float(f"{np.mean(seen.kls):.3g}"),
        kl_p99=float(f"{np.percentile(seen.kls, 99):.3g}"),
        greedy_changed=round(float(np.mean(seen.changed)), 5),
        greedy_near=round(float(np.mean(seen.near)), 5),
        encode_us=us(seen.encode_s),
        decode_us=us(seen.decode_s),
    )
