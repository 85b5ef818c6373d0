"""One stream as a state machine, seen alike from the engine and from the edge worker. No socket, no clock.

A stream is one generation steered by one edge worker. Two rules make late, duplicated, reordered and guessed deltas harmless:

1. ``position`` is the number of tokens generated before the one being chosen, and ``prefix_hash`` a rolling hash of their ids.
2. A delta or a choice may be used for exactly its position and prefix hash; anything else is stale and is dropped.

The transitions, to be read aloud (a Begin asks for the answer of its own position, as an Advance does; the answer is a Delta in
cloud fusion and a Choice in edge fusion):

    IDLE      Begin   -> ASKED
    ASKED     Begin   -> ASKED        begun again: the hub restarted
    ANSWERED  Begin   -> ASKED
    ASKED     Delta   -> ANSWERED     of the asked prefix; a stale one changes nothing
    ASKED     Choice  -> ANSWERED     likewise
    ASKED     Advance -> ASKED        the token was chosen without its answer: missed
    ANSWERED  Advance -> ASKED
    any       End     -> CLOSED
"""

import enum
from collections.abc import Iterable

from costeer_vllm.errors import LocalProtocolError
from costeer_vllm.protocol.messages import Advance, Begin, Choice, Delta, End

_MASK = 2**64 - 1
_MULTIPLIER = 0x9E3779B97F4A7C15  # odd, 2**64 / golden ratio: a bijection for every token, so a changed token always shows


def extend_hash(prefix_hash: int, tokens: Iterable[int]) -> int:
    """The rolling 64-bit hash of a prefix after ``tokens``; the empty prefix hashes to 0."""
    for token in tokens:
        prefix_hash = ((prefix_hash + token + 1) * _MULTIPLIER) & _MASK
        prefix_hash ^= prefix_hash >> 29
    return prefix_hash


class State(enum.Enum):
    """Where a stream stands."""

    IDLE = enum.auto()
    ASKED = enum.auto()
    ANSWERED = enum.auto()
    CLOSED = enum.auto()


Event = Begin | Advance | Delta | Choice | End

TRANSITIONS: dict[State, dict[type[Event], State]] = {
    State.IDLE: {Begin: State.ASKED, End: State.CLOSED},
    State.ASKED: {
        Begin: State.ASKED,
        Delta: State.ANSWERED,
        Choice: State.ANSWERED,
        Advance: State.ASKED,
        End: State.CLOSED,
    },
    State.ANSWERED: {Begin: State.ASKED, Advance: State.ASKED, End: State.CLOSED},
    State.CLOSED: {End: State.CLOSED},
}


class Stream:
    """The prefix of a stream and its state; both ends keep one and feed it what they send and receive."""

    __slots__ = ("position", "prefix_hash", "state")

    def __init__(self) -> None:
        self.state = State.IDLE
        self.position = 0
        self.prefix_hash = 0

    def feed(self, event: Event) -> bool:
        """Move on by ``event``. False if it is stale (an answer to another prefix) or comes after the end: drop it.

        Raises:
            LocalProtocolError: if the event is not in the table and is not merely late.
        """
        if isinstance(event, (Delta, Choice)) and not self.wants(event):
            return False
        following = TRANSITIONS[self.state].get(type(event))
        if following is None:
            if self.state is State.CLOSED:
                return False
            raise LocalProtocolError(f"{type(event).__name__} in state {self.state.name} of stream {event.stream}")
        if isinstance(event, Begin):
            self.position = len(event.tokens)
            self.prefix_hash = extend_hash(0, event.tokens)
        elif isinstance(event, Advance):
            self.position, self.prefix_hash = event.position, event.prefix_hash
        self.state = following
        return True

    def wants(self, answer: Delta | Choice) -> bool:
        """Whether ``answer`` belongs to the prefix that is asked for and not answered yet."""
        return self.state is State.ASKED and self.stands_at(answer.position, answer.prefix_hash)

    def stands_at(self, position: int, prefix_hash: int) -> bool:
        """Whether this is the current prefix."""
        return (position, prefix_hash) == (self.position, self.prefix_hash)

    def advance(self, stream: str, tokens: list[int]) -> Advance:
        """The Advance that appends ``tokens`` to the current prefix (not fed yet)."""
        return Advance(stream, self.position + len(tokens), extend_hash(self.prefix_hash, tokens), tokens)
