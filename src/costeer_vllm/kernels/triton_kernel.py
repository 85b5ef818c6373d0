"""``steer_inplace`` in Triton: one launch that reads each delta and its logit once and writes the logit once.

Offsets are int64: 2**31 elements are only 14,123 rows of 152,064 logits. The loads are 16 bytes wide where the row strides are
multiples of 16, which Triton sees by itself from the arguments.
"""

import triton
import triton.language as tl
from torch import Tensor

# 8 ids per thread are two 16-byte loads of float32 or one of float16; one row of 152,064 then still makes 149 programs, enough
# to occupy every multiprocessor of a large GPU.
_DENSE_BLOCK = 1024
_SPARSE_BLOCK = 512  # entries: as many as most sparse deltas have, or more
_MAX_PROGRAMS_PER_ROW = 8  # sparse rows differ in length and only the device knows each: programs step through their row
# Memory is the bound, so an unfused sum costs nothing; fused or not by default differs between versions of Triton.
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


def steer_dense(logits: Tensor, rows: Tensor, strength: Tensor, values: Tensor) -> None:
    """``values [n, width]`` is one delta per row and id."""
    width = min(values.shape[1], logits.shape[1])
    grid = (triton.cdiv(width, _DENSE_BLOCK), rows.shape[0])
    where = (logits, logits.stride(0), rows, strength)
    _steer_dense[grid](*where, values, values.stride(0), width, BLOCK=_DENSE_BLOCK, **_OPTIONS)


def steer_sparse(logits: Tensor, rows: Tensor, strength: Tensor, offsets: Tensor, ids: Tensor, values: Tensor) -> None:
    """``offsets [n + 1]`` cuts ``ids [nnz]`` and ``values [nnz]`` into rows."""
    grid = (min(triton.cdiv(ids.shape[0], _SPARSE_BLOCK), _MAX_PROGRAMS_PER_ROW), rows.shape[0])
    where = (logits, logits.stride(0), rows, strength)
    _steer_sparse[grid](*where, offsets, ids, values, logits.shape[1], BLOCK=_SPARSE_BLOCK, **_OPTIONS)


@triton.jit  # type: ignore[untyped-decorator]
def _steer_dense(
    logits_ptr: tl.tensor,  # [num_rows, vocab] float32
    logits_stride: tl.tensor,
    rows_ptr: tl.tensor,  # [n] int64
    strength_ptr: tl.tensor,  # [n] float32
    values_ptr: tl.tensor,  # [n, at least width]
    values_stride: tl.tensor,
    width: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    i = tl.program_id(1).to(tl.int64)
    row = tl.load(rows_ptr + i)
    row_strength = tl.load(strength_ptr + i)
    ids = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = ids < width
    logit_ptrs = logits_ptr + row * logits_stride + ids
    delta = tl.load(values_ptr + i * values_stride + ids, mask=inside).to(tl.float32)
    tl.store(logit_ptrs, tl.load(logit_ptrs, mask=inside) + row_strength * delta, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _steer_sparse(
    logits_ptr: tl.tensor,  # [num_rows, vocab] float32
    logits_stride: tl.tensor,
    rows_ptr: tl.tensor,  # [n] int64
    strength_ptr: tl.tensor,  # [n] float32
    offsets_ptr: tl.tensor,  # [n + 1] int64
    ids_ptr: tl.tensor,  # [nnz] int64, strictly increasing within a row: no two programs meet at one logit
    values_ptr: tl.tensor,  # [nnz]
    vocab: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    i = tl.program_id(1)
    row = tl.load(rows_ptr + i)
    row_strength = tl.load(strength_ptr + i)
    begin = tl.load(offsets_ptr + i) + tl.program_id(0) * BLOCK
    end = tl.load(offsets_ptr + i + 1)
    for start in range(begin, end, tl.num_programs(0) * BLOCK):
        entries = start + tl.arange(0, BLOCK)
        ids = tl.load(ids_ptr + entries, mask=entries < end, other=vocab)
        inside = ids < vocab
        logit_ptrs = logits_ptr + row * logits_stride + ids
        delta = tl.load(values_ptr + entries, mask=inside).to(tl.float32)
        tl.store(logit_ptrs, tl.load(logit_ptrs, mask=inside) + row_strength * delta, mask=inside)
