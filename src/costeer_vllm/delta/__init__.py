"""The delta of one position, from a small model's log-probabilities to bytes and back.

    delta(a) = log P_SLM(a | query, context, s) - log P_SLM(a | query, s)        [vocab], nats

Two encodings. *Lossless* carries every entry as float32. *Sparse* carries the entries without which the personalized policy would
be another one (``choice``), on a grid, and nothing for all others: they share one delta, the tail. A constant added to a whole
row vanishes in the softmax, so the entries travel and are applied relative to the tail and no pass over the vocabulary is needed.

    payload := kind:u8  count  rest                                               little-endian
        kind 1, lossless: count:u32  values f32[count]; entry i belongs to id i
        kind 2, sparse:   count:u16, and unless it is 0:
            low_width:u8  width:u8  first:f32  step:f32  lows  levels  marks
            lows    low_width bits for each id
            marks   the rest of the ids, see ``bits``
            levels  width bits for each entry, whose delta is first + step * level, nats
    each of lows, levels and marks fills whole bytes, the first bit being the lowest.
"""

import struct
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from costeer_vllm.delta import bits
from costeer_vllm.delta.choice import WORTH, choose
from costeer_vllm.errors import InvalidDelta

MAX_NATS = 10_000.0  # no entry is larger: times any allowed strength it is finite in float32
MAX_ENTRIES = 4096  # of a sparse delta
STEP = 0.005  # nats of the steered logit, strength * delta: the grid of a sparse delta's entries

_LOSSLESS, _SPARSE = 1, 2
_COUNT_32, _COUNT_16 = struct.Struct("<BI"), struct.Struct("<BH")
_GRID = struct.Struct("<BBff")
_MAX_WIDTH = 16  # bits of a level
_MAX_LOW_WIDTH = 31

Floats: TypeAlias = npt.NDArray[np.floating]
Ids: TypeAlias = npt.NDArray[np.int64]
LogProbs: TypeAlias = npt.NDArray[np.float32]  # [vocab], nats


@dataclass(frozen=True, slots=True)
class DenseDelta:
    """Every entry: ``values[i]`` belongs to id i; ids beyond it have delta 0."""

    values: Floats  # [width] float32, nats


@dataclass(frozen=True, slots=True)
class SparseDelta:
    """Chosen entries relative to the tail; every other id has delta 0 up to the row's constant."""

    ids: Ids  # [count] strictly increasing
    values: Floats  # [count] float32, nats


def encode_lossless(delta: npt.NDArray[np.float32]) -> bytes:
    """``delta [vocab]`` in nats, float32 -> payload; NaN (an id neither row can produce) becomes 0, the rest is clamped."""
    values = finite(delta).astype("<f4", copy=False)
    return _COUNT_32.pack(_LOSSLESS, len(values)) + values.tobytes()


def encode_sparse(
    with_context: LogProbs,
    without_context: LogProbs,
    strength: float,
    worth: float = WORTH,
    max_entries: int = MAX_ENTRIES,
) -> bytes:
    """Log-probabilities ``[vocab]`` of both rows, and what their delta will be multiplied with -> payload.

    An entry travels if leaving it out would cost about ``worth`` nats of KL divergence, up to ``max_entries`` of the dearest. Its
    ``strength * delta`` is within ``STEP / 2`` nats, or within 2 ** -17 of the entries' range where that is more: where a context
    makes possible what was not, or the strength is in the hundreds. NaN counts as no probability.
    """
    assert 0 < max_entries <= MAX_ENTRIES, max_entries
    ids, moves = choose(with_context, without_context, strength, worth, max_entries)
    if not len(ids) or not strength:
        return _COUNT_16.pack(_SPARSE, 0)
    moves = np.clip(moves, -MAX_NATS / 2 * abs(strength), MAX_NATS / 2 * abs(strength))
    step = max(STEP, float(np.ptp(moves)) / (2**_MAX_WIDTH - 1))
    levels = np.rint((moves - moves.min()) / step).astype(np.int64)
    width, low_width = int(levels.max()).bit_length(), bits.low_width(ids)
    grid = _GRID.pack(low_width, width, float(moves.min()) / strength, step / strength)
    body = bits.pack(ids, low_width) + bits.pack(levels, width) + bits.marks(ids, low_width)
    return _COUNT_16.pack(_SPARSE, len(ids)) + grid + body


def decode(payload: bytes, vocab_size: int) -> DenseDelta | SparseDelta:
    """Payload -> delta over the large model's ``vocab_size`` logits; trusts nothing.

    A lossless delta may be narrower than the logits (padded vocabularies) or wider (the surplus is cut).

    Raises:
        InvalidDelta: on a wrong length, kind or width, too many entries, an id outside the vocabulary or out of order, or a value
            that is not within +-MAX_NATS.
    """
    kind = payload[0] if payload else None
    if kind == _LOSSLESS and len(payload) >= _COUNT_32.size:
        return _decode_lossless(payload, vocab_size)
    if kind == _SPARSE and len(payload) >= _COUNT_16.size:
        return _decode_sparse(payload, vocab_size)
    if kind in (_LOSSLESS, _SPARSE, None):
        raise InvalidDelta(f"a delta of {len(payload)} bytes has no header")
    raise InvalidDelta(f"a delta of unknown kind {kind}")


def _decode_lossless(payload: bytes, vocab_size: int) -> DenseDelta:
    _, count = _COUNT_32.unpack_from(payload)
    if len(payload) != _COUNT_32.size + count * 4:
        raise InvalidDelta(f"a delta of {len(payload)} bytes where its header announces {_COUNT_32.size + count * 4}")
    values = np.frombuffer(payload, "<f4", count, _COUNT_32.size)[:vocab_size]
    _check_values(values)
    return DenseDelta(values)


def _decode_sparse(payload: bytes, vocab_size: int) -> SparseDelta:
    _, count = _COUNT_16.unpack_from(payload)
    if count > MAX_ENTRIES:
        raise InvalidDelta(f"a sparse delta of {count} entries, more than {MAX_ENTRIES}")
    if count == 0:
        if len(payload) != _COUNT_16.size:
            raise InvalidDelta(f"an empty delta of {len(payload)} bytes, not {_COUNT_16.size}")
        return SparseDelta(np.empty(0, np.int64), np.empty(0, np.float32))
    if len(payload) < _COUNT_16.size + _GRID.size:
        raise InvalidDelta(f"a sparse delta of {len(payload)} bytes does not say where its entries lie")
    low_width, width, first, step = _GRID.unpack_from(payload, _COUNT_16.size)
    if low_width > _MAX_LOW_WIDTH or width > _MAX_WIDTH:
        raise InvalidDelta(f"a sparse delta of {low_width} and {width} bits, more than {_MAX_LOW_WIDTH} and {_MAX_WIDTH}")
    levels_at = _COUNT_16.size + _GRID.size + bits.size(count, low_width)
    marks_at = levels_at + bits.size(count, width)
    most_marks = bits.size(count + (vocab_size >> low_width), 1)
    if not marks_at < len(payload) <= marks_at + most_marks:
        allowed = f"{marks_at + 1} to {marks_at + most_marks}"
        raise InvalidDelta(f"a delta of {len(payload)} bytes where its header announces {allowed}")
    highs = bits.highs(payload[marks_at:])
    if len(highs) != count:
        raise InvalidDelta(f"a delta with {len(highs)} marks for {count} entries")
    ids = highs << low_width | bits.unpack(payload[_COUNT_16.size + _GRID.size : levels_at], count, low_width)
    if ids[-1] >= vocab_size or np.any(ids[1:] <= ids[:-1]):
        raise InvalidDelta(f"a delta whose ids do not increase strictly below {vocab_size}")
    with np.errstate(over="ignore", invalid="ignore"):  # what a stranger's numbers do is checked next
        values = np.float32(first) + np.float32(step) * bits.unpack(payload[levels_at:marks_at], count, width).astype(np.float32)
    _check_values(values)
    return SparseDelta(ids, values)


def finite(delta: LogProbs) -> LogProbs:
    """NaN (an id neither row can produce) becomes 0, the rest is clamped to +-MAX_NATS."""
    return np.clip(np.nan_to_num(delta, nan=0.0, posinf=MAX_NATS, neginf=-MAX_NATS), -MAX_NATS, MAX_NATS)


def _check_values(values: Floats) -> None:
    # One pass that NaN fails too; abs().max() would need a temporary of the vocabulary's size twice.
    if len(values) and not (values.min() >= -MAX_NATS and values.max() <= MAX_NATS):
        raise InvalidDelta(f"a delta with an entry that is not a number within +-{MAX_NATS:g} nats")
