"""From the deltas of one step to one batched addition."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from costeer_vllm.delta import DenseDelta, SparseDelta
from costeer_vllm.engine.streams import SteeredStream
from costeer_vllm.kernels import Deltas, DenseDeltas, SparseDeltas, steer_inplace


def steer_batch(logits: torch.Tensor, rows: Mapping[int, SteeredStream]) -> None:
    """``logits[row] += strength * delta`` for every row whose stream has its delta; ``logits [num_rows, vocab]`` float32."""
    dense = [(row, s.request.strength, s.delta) for row, s in rows.items() if isinstance(s.delta, DenseDelta)]
    sparse = [(row, s.request.strength, s.delta) for row, s in rows.items() if isinstance(s.delta, SparseDelta)]
    device = logits.device
    additions: list[tuple[torch.Tensor, torch.Tensor, Deltas]] = []  # all made before the first is applied: it is all or nothing
    if dense:
        additions.append((*_rows_and_strength(dense, device), _dense(dense, device)))
    if sparse:
        additions.append((*_rows_and_strength(sparse, device), _sparse(sparse, device)))
    for row_ids, strength, deltas in additions:
        steer_inplace(logits, row_ids, strength, deltas)


def _rows_and_strength(entries: Sequence[tuple[int, float, object]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.tensor([row for row, _, _ in entries], dtype=torch.int64)
    strength = torch.tensor([strength for _, strength, _ in entries], dtype=torch.float32)
    return _to(rows, device), _to(strength, device)


def _dense(entries: Sequence[tuple[int, float, DenseDelta]], device: torch.device) -> DenseDeltas:
    values = np.zeros((len(entries), max(len(delta.values) for _, _, delta in entries)), np.float32)
    for target, (_, _, delta) in zip(values, entries, strict=True):
        target[: len(delta.values)] = delta.values
    return DenseDeltas(_to(torch.from_numpy(values), device))


def _sparse(entries: Sequence[tuple[int, float, SparseDelta]], device: torch.device) -> SparseDeltas:
    offsets = np.cumsum([0, *(len(delta.ids) for _, _, delta in entries)])
    ids = np.concatenate([delta.ids for _, _, delta in entries])
    values = np.concatenate([delta.values for _, _, delta in entries])
    return SparseDeltas(*(_to(torch.from_numpy(array), device) for array in (offsets, ids, values)))


def _to(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    # Pinned and non-blocking, so that the host does not wait for the device's queue.
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
