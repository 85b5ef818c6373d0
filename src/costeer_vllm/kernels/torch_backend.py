"""``steer_inplace`` in torch, made for CPUs: no Python loop over ids and no temporary of the logits' size."""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

_ROWS_AT_ONCE_16_BIT = 16  # torch copies 16-bit deltas to float32: no more than stays in a cache and the allocator reuses


def steer_dense(logits: Tensor, rows: Tensor, strength: Tensor, values: Tensor) -> None:
    """``values [n, width]`` is one delta per row and id.

    Neighbouring rows share one call, because each call starts and joins all threads: microseconds on idle cores, but a time slice
    of the scheduler (8 ms on Linux) where another process holds one of them.
    """
    width = min(values.shape[1], logits.shape[1])
    longest = len(rows) if values.dtype == torch.float32 else _ROWS_AT_ONCE_16_BIT
    for row, begin, end in _runs(rows.tolist(), longest):
        neighbours = logits[row : row + end - begin, :width]
        neighbours.addcmul_(values[begin:end, :width], strength[begin:end, None])


def steer_sparse(logits: Tensor, rows: Tensor, strength: Tensor, offsets: Tensor, ids: Tensor, values: Tensor) -> None:
    """``offsets [n + 1]`` cuts ``ids [nnz]`` and ``values [nnz]`` into rows."""
    vocab = logits.shape[1]
    values = values.float()
    for row, row_strength, (begin, end) in zip(rows.tolist(), strength.tolist(), pairwise(offsets.tolist()), strict=True):
        end = begin + int(torch.searchsorted(ids[begin:end], vocab))
        logits[row].index_add_(0, ids[begin:end], values[begin:end], alpha=row_strength)


def _runs(rows: list[int], longest: int) -> Iterator[tuple[int, int, int]]:
    """``(row, begin, end)`` such that ``rows[begin:end]`` is row, row + 1, ...: ``longest`` of them at most."""
    begin = 0
    for end in range(1, len(rows) + 1):
        if end == len(rows) or rows[end] != rows[end - 1] + 1 or end - begin == longest:
            yield rows[begin], begin, end
            begin = end
