"""The delta of one position, from a small model's log-probabilities to bytes and back.

    delta(a) = log P_SLM(a | query, context, s) - log P_SLM(a | query, s)        [vocab], nats

Two encodings. *Lossless* carries every entry as float32. *Sparse* carries the entries that can move probability mass, as float16,
and one number for all others: the tail, the log-ratio of the mass that both rows leave outside those entries. A constant added
to a whole row vanishes in the softmax, so the entries travel and are applied relative to the tail and no pass over the
vocabulary is needed.

    payload := kind:u8  count:u32  [ids]  values
        kind 1: lossless, values f32[count], entry i belongs to id i
        kind 2: sparse with u16 ids;  kind 3: sparse with u32 ids; values f16[count], ids strictly increasing
    all little-endian.
"""

import struct
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from costeer_vllm.errors import InvalidDelta

MAX_NATS = 10_000.0  # entries are clamped to +-MAX_NATS: finite in float16 and, times any allowed strength, in float32

_HEADER = struct.Struct("<BI")
_LOSSLESS, _SPARSE_16, _SPARSE_32 = 1, 2, 3

Floats: TypeAlias = npt.NDArray[np.floating]
Ids: TypeAlias = npt.NDArray[np.integer]


@dataclass(frozen=True, slots=True)
class DenseDelta:
    """Every entry: ``values[i]`` belongs to id i; ids beyond it have delta 0."""

    values: Floats  # [width] float32, nats


@dataclass(frozen=True, slots=True)
class SparseDelta:
    """Chosen entries relative to the tail; every other id has delta 0 up to the row's constant."""

    ids: Ids  # [count] strictly increasing
    values: Floats  # [count] float16, nats


def encode_lossless(delta: npt.NDArray[np.float32]) -> bytes:
    """``delta [vocab]`` in nats, float32 -> payload; NaN (an id neither row can produce) becomes 0, the rest is clamped."""
    values = finite(delta).astype("<f4", copy=False)
    return _HEADER.pack(_LOSSLESS, len(values)) + values.tobytes()


def encode_sparse(
    with_context: npt.NDArray[np.float32],
    without_context: npt.NDArray[np.float32],
    max_entries: int = 512,
    mass_left: float = 1e-3,
) -> bytes:
    """Log-probabilities ``[vocab]`` of both rows -> payload with at most ``max_entries`` entries.

    Entries are taken by the larger of their two probabilities until each row leaves at most ``mass_left`` of its mass outside.
    NaN counts as no probability; the delta of an id that neither row can produce is that of the tail.
    """
    assert max_entries > 0, max_entries
    p_with, p_without = np.fmax(np.exp(with_context), 0), np.fmax(np.exp(without_context), 0)
    weight = np.maximum(p_with, p_without)
    count = min(max_entries, len(weight))
    top = np.argpartition(weight, -count)[-count:] if count < len(weight) else np.arange(len(weight))
    top = top[np.argsort(-weight[top], kind="stable")]
    left = np.maximum(1 - np.cumsum(p_with[top], dtype=np.float64), 1 - np.cumsum(p_without[top], dtype=np.float64))
    enough = np.flatnonzero(left <= mass_left)
    ids = np.sort(top[: enough[0] + 1] if len(enough) else top)
    # What is left is summed, not taken from 1, where rounding would drown it: a sure row leaves 1e-11, and to an id that only
    # the large model thinks of, the tail is all the delta there is. The floor is for rows that leave nothing at all.
    p_with[ids] = p_without[ids] = 0
    rest_with, rest_without = (max(float(p.sum(dtype=np.float64)), 1e-30) for p in (p_with, p_without))
    tail = np.log(rest_with / rest_without)
    with np.errstate(invalid="ignore"):  # -inf - -inf
        values = finite(with_context[ids] - without_context[ids] - np.float32(tail)).astype("<f2")
    wide = len(with_context) > 2**16
    kind, width = (_SPARSE_32, "<u4") if wide else (_SPARSE_16, "<u2")
    return _HEADER.pack(kind, len(ids)) + ids.astype(width).tobytes() + values.tobytes()


def decode(payload: bytes, vocab_size: int) -> DenseDelta | SparseDelta:
    """Payload -> delta over the large model's ``vocab_size`` logits; trusts nothing.

    A lossless delta may be narrower than the logits (padded vocabularies) or wider (the surplus is cut).

    Raises:
        InvalidDelta: on a wrong length or kind, an id outside the vocabulary or out of order, or a value that is not finite.
    """
    if len(payload) < _HEADER.size:
        raise InvalidDelta(f"a delta of {len(payload)} bytes has no header")
    kind, count = _HEADER.unpack_from(payload)
    if kind == _LOSSLESS:
        _expect_length(payload, count * 4)
        dense = np.frombuffer(payload, "<f4", count, _HEADER.size)[:vocab_size]
        _check_values(dense)
        return DenseDelta(dense)
    if kind not in (_SPARSE_16, _SPARSE_32):
        raise InvalidDelta(f"a delta of unknown kind {kind}")
    width = 2 if kind == _SPARSE_16 else 4
    _expect_length(payload, count * (width + 2))
    ids = np.frombuffer(payload, f"<u{width}", count, _HEADER.size).astype(np.int64)
    values = np.frombuffer(payload, "<f2", count, _HEADER.size + count * width)
    if count and (ids[-1] >= vocab_size or np.any(ids[1:] <= ids[:-1])):
        raise InvalidDelta(f"a delta whose ids do not increase strictly below {vocab_size}")
    _check_values(values)
    return SparseDelta(ids, values)


def finite(delta: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """NaN (an id neither row can produce) becomes 0, the rest is clamped to +-MAX_NATS."""
    return np.clip(np.nan_to_num(delta, nan=0.0, posinf=MAX_NATS, neginf=-MAX_NATS), -MAX_NATS, MAX_NATS)


def _expect_length(payload: bytes, body: int) -> None:
    if len(payload) != _HEADER.size + body:
        raise InvalidDelta(f"a delta of {len(payload)} bytes where its header announces {_HEADER.size + body}")


def _check_values(values: Floats) -> None:
    # One pass that NaN fails too; abs().max() would need a temporary of the vocabulary's size twice.
    if len(values) and not (values.min() >= -MAX_NATS and values.max() <= MAX_NATS):
        raise InvalidDelta(f"a delta with an entry that is not a number within +-{MAX_NATS:g} nats")
