"""Deltas of one stream that came before they were asked for: each waits for exactly its prefix to come true.

An edge worker counts what it has in flight since the last question that it had not guessed. Those are the newest here, so the
oldest make room, and one that may still come true is lost only of a worker that keeps to no budget.
"""

from collections import OrderedDict
from dataclasses import dataclass, field

from costeer_vllm.protocol.messages import MAX_GUESS_BYTES, MAX_GUESSES, Delta


@dataclass(slots=True)
class Guesses:
    """By position and prefix hash, the oldest first; all of them lie ahead of the stream."""

    num_bytes: int = 0  # of their payloads
    _kept: OrderedDict[tuple[int, int], Delta] = field(default_factory=OrderedDict)

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, delta: Delta, position: int) -> None:
        """Keep ``delta`` if it lies ahead of a stream that stands at ``position``."""
        prefix = delta.position, delta.prefix_hash
        if delta.position <= position or len(delta.payload) > MAX_GUESS_BYTES:
            return
        self._drop(prefix)
        self._kept[prefix] = delta
        self.num_bytes += len(delta.payload)
        while len(self._kept) > MAX_GUESSES or self.num_bytes > MAX_GUESS_BYTES:
            self._drop(next(iter(self._kept)))

    def take(self, position: int, prefix_hash: int) -> Delta | None:
        """The delta of the prefix that came true, if it was guessed; those that cannot come true any more are dropped."""
        found = self._kept.get((position, prefix_hash))
        for prefix in [prefix for prefix in self._kept if prefix[0] <= position]:
            self._drop(prefix)
        return found

    def clear(self) -> None:
        """The stream began again, maybe at another edge worker: everything is told anew."""
        self._kept.clear()
        self.num_bytes = 0

    def _drop(self, prefix: tuple[int, int]) -> None:
        if (delta := self._kept.pop(prefix, None)) is not None:
            self.num_bytes -= len(delta.payload)
