"""From the answers of one step to the logits: one batched addition of the deltas, one fill for the chosen tokens."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from costeer_vllm.delta import DenseDelta, SparseDelta
from costeer_vllm.engine.steered import SteeredStream
from costeer_vllm.kernels import Deltas, DenseDeltas, SparseDeltas, steer_inplace, top_probability
from costeer_vllm.request import SteeringRequest


def steer_batch(logits: torch.Tensor, rows: Mapping[int, SteeredStream]) -> None:
    """``logits[row] += strength * delta`` for every row whose stream has its delta; ``logits [num_rows, vocab]`` float32.

    A row whose base policy is surer than its request's ``confidence`` keeps it. A row whose token the edge worker chose is left
    that token alone.
    """
    dense = [(row, s.request, s.answer) for row, s in rows.items() if isinstance(s.answer, DenseDelta)]
    sparse = [(row, s.request, s.answer) for row, s in rows.items() if isinstance(s.answer, SparseDelta)]
    chosen = [(row, s.answer) for row, s in rows.items() if isinstance(s.answer, int)]
    device = logits.device
    additions: list[tuple[torch.Tensor, torch.Tensor, Deltas]] = []  # all made before the first is applied: it is all or nothing
    if dense:
        additions.append((*_rows_and_strength(dense, logits), _dense(dense, device)))
    if sparse:
        additions.append((*_rows_and_strength(sparse, logits), _sparse(sparse, device)))
    for row_ids, strength, deltas in additions:
        steer_inplace(logits, row_ids, strength, deltas)
    if chosen:
        where = _to(torch.tensor(chosen, dtype=torch.int64), device)
        logits[where[:, 0]] = -torch.inf
        logits[where[:, 0], where[:, 1]] = 0.0


def _rows_and_strength(
    entries: Sequence[tuple[int, SteeringRequest, object]], logits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = _to(torch.tensor([row for row, _, _ in entries], dtype=torch.int64), logits.device)
    strength = _to(torch.tensor([request.strength for _, request, _ in entries], dtype=torch.float32), logits.device)
    if any(request.confidence < 1 for _, request, _ in entries):
        # Without a gate infinity stands, since a base policy can be so sure that its largest probability rounds to 1.
        limits = [request.confidence if request.confidence < 1 else math.inf for _, request, _ in entries]
        strength *= top_probability(logits[rows]) < _to(torch.tensor(limits), logits.device)
    return rows, strength


def _dense(entries: Sequence[tuple[int, SteeringRequest, DenseDelta]], device: torch.device) -> DenseDeltas:
    values = np.zeros((len(entries), max(len(delta.values) for _, _, delta in entries)), np.float32)
    for target, (_, _, delta) in zip(values, entries, strict=True):
        target[: len(delta.values)] = delta.values
    return DenseDeltas(_to(torch.from_numpy(values), device))


def _sparse(entries: Sequence[tuple[int, SteeringRequest, SparseDelta]], device: torch.device) -> SparseDeltas:
    offsets = np.cumsum([0, *(len(delta.ids) for _, _, delta in entries)])
    ids = np.concatenate([delta.ids for _, _, delta in entries])
    values = np.concatenate([delta.values for _, _, delta in entries])
    return SparseDeltas(*(_to(torch.from_numpy(array), device) for array in (offsets, ids, values)))


def _to(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    # Pinned and non-blocking, so that the host does not wait for the device's queue.
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
