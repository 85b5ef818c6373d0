"""The base policy at one position, cut to its likeliest tokens: what the engine shows an edge worker that fuses.

payload := count:u16  step:f32  left:f32  ids:u32[count]  values       ids strictly increasing, all little-endian
    step 0: values f32[count], log-probabilities over the whole vocabulary, nats
    else:   values u16[count], the same in steps of ``step`` nats below 0; the lowest value stands for all below it too
    left:   the probability of all other tokens together
"""

import struct
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from costeer_vllm.errors import InvalidCandidates
from costeer_vllm.protocol.messages import MAX_CANDIDATES, MAX_ROUNDING

_HEADER = struct.Struct("<Hff")
_LOWEST = 2**16 - 1  # steps

Floats: TypeAlias = npt.NDArray[np.floating]
Ids: TypeAlias = npt.NDArray[np.integer]


@dataclass(frozen=True, slots=True)
class BasePolicy:
    """log pi_0 of the likeliest tokens."""

    ids: Ids  # [k] strictly increasing
    log_probs: Floats  # [k] nats
    mass_left: float  # the probability of all other tokens


def encode_candidates(base: BasePolicy, rounding: float = 0.0) -> bytes:
    """``rounding`` is the step in nats to which log-probabilities are rounded; 0 keeps them as float32."""
    assert 0 < len(base.ids) <= MAX_CANDIDATES, len(base.ids)
    step = float(np.float32(rounding))
    values = _in_steps(base.log_probs, step) if step else base.log_probs.astype("<f4")
    return b"".join((_HEADER.pack(len(base.ids), step, base.mass_left), base.ids.astype("<u4").tobytes(), values.tobytes()))


def decode_candidates(payload: bytes) -> BasePolicy:
    """Payload -> BasePolicy; trusts nothing.

    Raises:
        InvalidCandidates: on a wrong length, ids out of order, or a value that is not a log-probability.
    """
    if len(payload) < _HEADER.size:
        raise InvalidCandidates(f"candidates of {len(payload)} bytes have no header")
    count, step, left = _HEADER.unpack_from(payload)
    kind = "<u2" if step else "<f4"
    expected = _HEADER.size + count * (4 + np.dtype(kind).itemsize)
    if not 0 < count <= MAX_CANDIDATES or len(payload) != expected:
        raise InvalidCandidates(
            f"{count} candidates in {len(payload)} bytes, where it must be 1 to {MAX_CANDIDATES} in {expected}"
        )
    ids = np.frombuffer(payload, "<u4", count, _HEADER.size).astype(np.int64)
    values = np.frombuffer(payload, kind, count, _HEADER.size + 4 * count)
    if np.any(ids[1:] <= ids[:-1]):
        raise InvalidCandidates("candidates whose ids do not increase strictly")
    if not (0 <= step <= MAX_ROUNDING and 0 <= left <= 1):
        raise InvalidCandidates("candidates with a step or a mass that cannot be")
    with np.errstate(invalid="ignore"):  # a signaling NaN
        log_probs = values * -np.float64(step) if step else values.astype(np.float64)
    if not (np.all(np.isfinite(log_probs)) and log_probs.max() <= 1e-3):  # rounded above 0 by a device's arithmetic
        raise InvalidCandidates("candidates with a value that is no log-probability")
    return BasePolicy(ids, log_probs, left)


def _in_steps(log_probs: Floats, step: float) -> Ids:
    return np.asarray(np.clip(np.rint(log_probs.astype(np.float64) / -step), 0, _LOWEST), "<u2")
