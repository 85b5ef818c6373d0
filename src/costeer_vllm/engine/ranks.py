"""Tensor parallelism: every rank samples for itself, so all must add the same delta in the same step."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from costeer_vllm.engine.steered import SteeredStream
from costeer_vllm.engine.streams import StreamTable

_NONE, _TAKEN_BACK = -1, -2  # sizes that stand for "no answer" and for "no answer, and the token does not count"


class Ranks:
    """The tensor-parallel group of this worker: rank 0 decides, the others follow."""

    @cached_property
    def _group(self) -> Any:
        from vllm.distributed.parallel_state import get_tp_group

        return get_tp_group()

    @property
    def is_first(self) -> bool:
        """Whether this rank talks to the hub."""
        return bool(self._group.rank_in_group == 0)

    def agree(self, table: StreamTable, streams: Sequence[SteeredStream]) -> None:
        """Give every rank the payloads that rank 0 has for ``streams``, which are the same on all ranks, in the same order."""
        if self._group.world_size == 1:
            return
        payloads = [None if stream.taken_back else stream.payload for stream in streams] if self.is_first else []
        sizes = torch.tensor([_size(stream) for stream in streams] if self.is_first else [0] * len(streams))
        self._broadcast(sizes)
        present = sizes.clamp(min=0)
        blob = torch.empty(int(present.sum()), dtype=torch.uint8)
        if self.is_first:
            blob = torch.frombuffer(bytearray(b"".join(p for p in payloads if p)), dtype=torch.uint8) if len(blob) else blob
        if len(blob):
            self._broadcast(blob)
        if not self.is_first:
            data, start = blob.numpy().tobytes(), 0
            for stream, size in zip(streams, sizes.tolist(), strict=True):
                table.adopt(stream, None if size < 0 else data[start : start + size], size == _TAKEN_BACK)
                start += max(size, 0)

    def _broadcast(self, tensor: torch.Tensor) -> None:
        torch.distributed.broadcast(tensor, src=self._group.ranks[0], group=self._group.cpu_group)


def _size(stream: SteeredStream) -> int:
    if stream.taken_back:
        return _TAKEN_BACK
    return _NONE if stream.payload is None else len(stream.payload)
