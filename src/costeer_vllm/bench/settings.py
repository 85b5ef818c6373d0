"""What is measured, and how much of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from costeer_vllm.bench import models
from costeer_vllm.errors import InvalidParameter

BATCH_TOKENS = 640  # of all streams of a phase together: many at a time need not be watched as long as one alone


@dataclass(frozen=True, slots=True)
class BenchSettings:
    """How much of everything.

    Raises:
        InvalidParameter: if a value cannot be used.
    """

    streams: tuple[int, ...] = (1, 8, 32)
    tokens: int = 64  # per stream, where that is not more than BATCH_TOKENS of all
    repetitions: int = 5
    vocab: int = 151_936
    serial_tokens: int = 16
    delta: Literal["lossless", "sparse"] = "sparse"
    round_trips_ms: tuple[int, ...] = (0, 10, 50, 100)
    edges: int = 1000  # of the hub alone
    deltas_per_s: int = 2000

    def __post_init__(self) -> None:
        longest = models.MAX_POSITIONS - models.PROMPT_WORDS - models.CONTEXT_WORDS - 64
        ranges = {
            "tokens": (2, longest), "repetitions": (1, 1000), "vocab": (1000, 1_000_000), "serial_tokens": (1, longest),
        }  # fmt: skip
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise InvalidParameter(name, getattr(self, name), f"from {low} to {high}")
        if not self.streams or not all(1 <= streams <= 64 for streams in self.streams):
            raise InvalidParameter("streams", self.streams, "numbers from 1 to 64")

    def tokens_of(self, streams: int) -> int:
        """Tokens of each of ``streams`` streams."""
        return min(self.tokens, max(2, BATCH_TOKENS // streams))


QUICK = BenchSettings(
    streams=(1, 8), tokens=8, repetitions=1, vocab=4096, serial_tokens=4, round_trips_ms=(0, 50), edges=50, deltas_per_s=200
)  # to see that it runs


def parse_streams(text: str) -> tuple[int, ...]:
    """``8,1`` -> (1, 8).

    Raises:
        InvalidParameter: if there is something else than numbers between the commas.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise InvalidParameter("streams", text, "numbers with commas between them, such as 1,8")
    return tuple(sorted({int(part) for part in parts}))


def parse_parts(text: str | None, known: Sequence[str]) -> tuple[str, ...]:
    """``hub,kernel`` -> those two, in the order in which they are run; None: all.

    Raises:
        InvalidParameter: if one is not known.
    """
    names = list(known) if text is None else [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in known]:
        raise InvalidParameter("only", unknown[0], f"names with commas between them, of {', '.join(known)}")
    return tuple(name for name in known if name in names)
