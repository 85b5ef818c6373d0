"""Look-ahead: which continuations of a stream are worth a delta before anybody asks for them. No model, no socket, no clock.

While an answer travels up and the next token down, the small model would idle for a round trip. Instead it goes on along the
tokens that it expects, and tells the deltas of those prefixes unasked. The prefixes told are a tree; its root is the newest
prefix known to be true, and a path leads from it by the tokens that were guessed:

    worth(path, token) = worth(path) * min(p(token), hit rate)        worth() = 1

p is the *stand-in* for the personalized policy, of which a device knows only its own part: softmax(log p_without + c * delta),
c the strength. The path of most worth is told next. What a stream may have in flight is bounded in number and in bytes, and what
it may cost in ids that the small model evaluates: one for a path that goes on from the last one told, more where it forks before.
A stream whose guesses do not come true stops, and tries again as its failures fade.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from costeer_vllm.protocol.messages import MAX_GUESS_BYTES, MAX_GUESSES
from costeer_vllm.protocol.stream import extend_hash

MIN_ROUND_TRIP_S = 0.002  # below it, the threads of two processes are no more punctual than that
MIN_SHARE = 0.25  # of a token's time: the most that look-ahead can save is the round trip
MIN_WORTH = 0.1  # of a guess: how likely it is to come true
NUM_LIKELY = 2  # continuations of one prefix that are considered
FADING = 0.99  # per token: how much hits and tries still count
IDS_PER_TOKEN, SPARE_IDS = 3.0, 32.0  # evaluated for guesses: what a token of the answer allows, and how much may be saved up

LogProbs: TypeAlias = npt.NDArray[np.float32]  # [vocab], nats
Shown: TypeAlias = npt.NDArray[np.float16]  # the same at half the precision: there is one for every guess, and it is only shown
Path: TypeAlias = tuple[int, ...]  # guessed tokens behind the newest true prefix


@dataclass(slots=True)
class Pace:
    """How long tokens take, of all streams together: whether and how far it pays to look ahead. Times in seconds."""

    round_trip_s: float = 0.0  # to the hub and back; 0: not known
    asked_s: float = 0.0  # from a question that had to be answered to the next; running median, 0: not known
    told_s: float = 0.0  # the same where the answer was there before; short ones count most

    def note(self, interval_s: float, was_told: bool) -> None:
        """A token came ``interval_s`` after the one before it, whose delta had been told ahead or not."""
        if was_told:
            self.told_s = min(interval_s, 1.1 * self.told_s) if self.told_s else interval_s
        else:
            step = 1.1 if interval_s > self.asked_s else 1 / 1.1  # however far off it is: one hiccup means little
            self.asked_s = self.asked_s * step if self.asked_s else interval_s

    @property
    def pays(self) -> bool:
        """Whether there is a round trip worth saving."""
        return self.asked_s > 0 and self.round_trip_s >= max(MIN_ROUND_TRIP_S, MIN_SHARE * self.asked_s)

    @property
    def reach(self) -> int:
        """How many tokens can be chosen while one guess travels: deeper ones would come early in any case."""
        return 2 + math.ceil(min(self.round_trip_s / self.told_s, MAX_GUESSES)) if self.told_s else MAX_GUESSES


@dataclass(slots=True)
class Told:
    """A prefix whose delta was told, and what may follow it."""

    likely: Sequence[tuple[int, float]] = ()  # tokens and their probabilities in the stand-in
    rows: tuple[Shown, Shown] | None = None  # with and without context, if somebody wants to know
    children: dict[int, "Told"] = field(default_factory=dict)


class Ahead:
    """What one stream was told, from its newest true prefix on."""

    def __init__(self, position: int, prefix_hash: int, strength: float, max_bytes: int) -> None:
        """``strength``: c; ``max_bytes``: of guesses in flight, as many as the engine keeps."""
        self.position, self.prefix_hash = position, prefix_hash  # of the newest true prefix
        self.strength = strength
        self.root: Told | None = None  # the same; None: it is not answered yet
        self.in_flight: list[tuple[int, int]] = []  # position and bytes of every guess that the engine may still keep
        self._max_bytes, self._largest = min(max_bytes, MAX_GUESS_BYTES), 0
        self._hits = self._tries = 0.0
        self._spare = SPARE_IDS  # that may still be evaluated
        self._last: Path = ()  # told: behind it the small model goes on with one id
        self._asked_at: float | None = None  # seconds; None: by a Begin, whose prompts take their own time
        self._was_told = False

    @property
    def hit_rate(self) -> float:
        """The share of guessed tokens that came true; 1 before anything is known."""
        return (self._hits + 2) / (self._tries + 2)

    @property
    def num_bytes(self) -> int:
        """Bytes in flight."""
        return sum(size for _, size in self.in_flight)

    def advance(self, keep: int, tokens: Sequence[int], position: int, prefix_hash: int, at: float, pace: Pace) -> bool:
        """The true prefix is now the first ``keep`` generated ids and ``tokens``. Returns whether its delta was told already.

        ``at``: when that was heard, in seconds. Asked for the same prefix again (``tokens`` is empty) it is told again.
        """
        if self._asked_at is not None and tokens:
            pace.note((at - self._asked_at) / len(tokens), self._was_told)
        self._asked_at = at
        self._was_told = keep == self.position and bool(tokens) and self._follow(tokens)
        self.position, self.prefix_hash = position, prefix_hash
        self._spare = min(self._spare + IDS_PER_TOKEN * len(tokens), SPARE_IDS)
        is_on_the_way = self._last[: len(tokens)] == tuple(tokens)
        self._last = self._last[len(tokens) :] if self._was_told and is_on_the_way else ()
        if self._was_told:
            self.in_flight = [(place, size) for place, size in self.in_flight if place > position]
        else:  # at the engine those in flight make room for what comes from now on
            self.root, self.in_flight = None, []
        return self._was_told

    def next(self, reach: int, max_ids: int) -> Path | None:
        """The path most worth telling next, at most ``reach`` tokens long and with at most ``max_ids`` ids to evaluate.

        None if none is worth it, or there is no room in flight.
        """
        if self.root is None or len(self.in_flight) >= MAX_GUESSES or not self._has_room(self._largest):
            return None
        best, most, hit_rate, max_ids = None, MIN_WORTH, self.hit_rate, min(max_ids, int(self._spare))
        open_paths: list[tuple[Told, Path, float]] = [(self.root, (), 1.0)]
        while open_paths:
            told, path, worth = open_paths.pop()
            for token, p in told.likely:
                child, longer, value = told.children.get(token), (*path, token), worth * min(p, hit_rate)
                if value < most:  # and so is all that follows it
                    continue
                if child is None and self._num_ids(longer) <= max_ids:
                    best, most = longer, value
                elif child is not None and len(longer) < reach:
                    open_paths.append((child, longer, value))
        return best

    def tell(self, path: Path, told: Told, num_bytes: int) -> bool:
        """The delta behind ``path`` is known, ``num_bytes`` long. False if it is a guess for which there is no room."""
        self._largest = max(self._largest, num_bytes)
        if not path:
            self.root = told
            return True
        self._spare -= self._num_ids(path)
        self._last = path
        if not self._has_room(num_bytes):
            return False
        parent = self.root
        for token in path[:-1]:
            assert parent is not None
            parent = parent.children[token]
        assert parent is not None
        parent.children[path[-1]] = told
        self.in_flight.append((self.position + len(path), num_bytes))
        return True

    def stop(self) -> None:
        """Guess no more."""
        self._max_bytes = -1

    def hash_of(self, path: Path) -> int:
        """The prefix hash behind ``path``."""
        return extend_hash(self.prefix_hash, path)

    def _num_ids(self, path: Path) -> int:
        """To be evaluated for ``path``: what lies behind its fork from the last one."""
        pairs = zip(path, self._last, strict=False)
        return len(path) - sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

    def _has_room(self, num_bytes: int) -> bool:
        return self.num_bytes + num_bytes <= self._max_bytes

    def _follow(self, tokens: Sequence[int]) -> bool:
        """Walk on from the root by ``tokens`` and count what was guessed; False, at no certain place, if one was not."""
        for token in tokens:
            was_guessed = self.root is not None and token in self.root.children
            self._hits, self._tries = self._hits * FADING + was_guessed, self._tries * FADING
            self._tries += self.root is not None and bool(self.root.children)
            self.root = self.root.children.get(token) if self.root is not None else None
        return self.root is not None
