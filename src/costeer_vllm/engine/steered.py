"""One steered generation on the engine's side: its tokens, its open question, and what its request says about waiting.

What became of the answer to a position, and what the request's ``on_missing`` makes of it:

                              wait                            continue                 fail
    it does not come          held until deadline_ms, fails   as long, then unsteered  held until deadline_ms, fails
    the edge worker is gone   held, begun again: as above     unsteered until it is back  fails
    it ends the stream        begun again twice, then fails   unsteered from there on  fails
    it cannot be used         fails                           unsteered                fails
"""

from dataclasses import dataclass, field

from costeer_vllm.candidates import decode_candidates
from costeer_vllm.delta import DenseDelta, SparseDelta, decode
from costeer_vllm.engine.board import State
from costeer_vllm.engine.guesses import Guesses
from costeer_vllm.errors import InvalidDelta
from costeer_vllm.protocol.messages import MAX_GUESS_BYTES, Begin, Candidates, Choice, Delta, End, EndReason, Sampling
from costeer_vllm.protocol.stream import Stream
from costeer_vllm.request import SteeringRequest

MAX_FAILURES = 2  # of a stream at the edge worker, while its request waits
MAX_STALL_S = 60.0  # of a request without a ticket, for which the whole batch waits: vLLM gives up a step after 300 s

_PASSING: frozenset[EndReason] = frozenset(["detached", "overloaded", "unknown_stream", "engine_gone"])


@dataclass(slots=True, eq=False)
class SteeredStream:
    """One generation and its edge worker."""

    id: str
    request: SteeringRequest
    stop_ids: frozenset[int]
    sampling: Sampling | None = None  # edge fusion: how its tokens are drawn; None: cloud fusion
    protocol: Stream = field(default_factory=Stream)
    tokens: list[int] = field(default_factory=list)  # generated so far: what a worker that comes back must be told
    offer: Candidates | None = None  # edge fusion: what the current position's token is chosen from
    guesses: Guesses = field(default_factory=Guesses)  # cloud fusion: answers to positions that are still to come
    payload: bytes | None = None  # of the answer for the current position: a delta as it came, or the id of the chosen token
    answer: DenseDelta | SparseDelta | int | None = None  # the same
    asked_at: float = 0.0  # seconds, monotonic: when the question was sent that is open now
    asked_to_begin: bool = False  # it was a Begin: how long its answer takes depends on the prompts
    waits_since: float = 0.0  # seconds, monotonic: when the current position's token began to wait
    again_at: float = 0.0  # seconds, monotonic: when the question is repeated
    offered_at: dict[int, float] = field(default_factory=dict)  # the same, by position, of the last offers
    silent: bool = False  # nothing has come in time since the last miss: not worth another wait
    closed_by: End | None = None  # the edge or the hub ended it
    failure: str | None = None  # why its request must fail
    taken_back: bool = False  # the newest token was chosen without its answer and does not count
    steered: int = 0
    missed: int = 0
    invalid: int = 0
    failures: int = 0
    undecided: bool | None = None  # the newest token: was it steered? counted once it is known to have been kept

    @property
    def position(self) -> int:
        """Tokens generated before the one being chosen."""
        return self.protocol.position

    @property
    def is_asked(self) -> bool:
        """Whether it is the edge worker's turn: it has all that it needs to answer, or is gone."""
        return self.sampling is None or self.offer is not None or self.closed_by is not None

    @property
    def deadline(self) -> float:
        """Until when the current position's token may wait; seconds, monotonic."""
        allowed_s = self.request.deadline_ms / 1000
        return self.waits_since + (allowed_s if self.request.ticket is not None else min(allowed_s, MAX_STALL_S))

    @property
    def may_begin_again(self) -> bool:
        """Whether it is worth asking an edge worker, or a hub, that is back."""
        return self.failure is None and (self.closed_by is None or self.closed_by.reason != "refused")

    def state(self, now: float) -> State:
        """Of the current position."""
        if self.failure is not None:
            return State.FAILED
        if self.answer is not None or self._goes_on_without(now):
            return State.SETTLED
        return State.ASKED if self.is_asked else State.UNASKED

    def begin(self) -> Begin:
        """The message that opens the stream at the tokens it has."""
        asks = self.request
        return Begin(
            self.id,
            asks.request,
            asks.worker,
            asks.query,
            asks.strength,
            list(self.tokens),
            asks.grant,
            self.sampling,
            MAX_GUESS_BYTES if self.sampling is None else 0,
            asks.vocabulary,
        )

    def closes(self, end: End) -> None:
        """The edge worker or the hub ended the stream."""
        self.closed_by = end
        if end.reason not in _PASSING:
            self.failures += 1
            self.guesses.clear()
        if self.request.on_missing == "continue":
            return
        is_final = end.reason == "refused" or self.failures > MAX_FAILURES
        if is_final or self.request.on_missing == "fail":
            self.fail(end.sentence or f"it ended the stream ({end.reason})")

    def rejects(self, error: InvalidDelta) -> None:
        """The answer for the current position cannot be used, and no other will come."""
        self.invalid += 1
        self.silent = True
        if self.request.on_missing != "continue":
            self.fail(f"it sent {error}")

    def review(self, now: float) -> None:
        """Fail a request that has waited long enough, if it does not go on without an answer."""
        if self.request.on_missing == "continue" or self.answer is not None or not self.is_asked or now < self.deadline:
            return
        last = f": {self.closed_by.sentence}" if self.closed_by is not None and self.closed_by.sentence else ""
        what = "delta" if self.sampling is None else "choice"
        self.fail(f"no {what} came within {self.request.deadline_ms:g} ms{last}")

    def fail(self, why: str) -> None:
        """The request must end with an error; the first reason counts."""
        if self.failure is None:
            shown = "".join(char if char.isprintable() else " " for char in why)  # it may be the edge worker's own words
            self.failure = f"costeer: edge worker '{self.request.worker}', token {self.position}: {shown}"

    def decoded(self, message: Delta | Choice, vocab_size: int) -> DenseDelta | SparseDelta | int:
        """The answer that a message holds.

        Raises:
            InvalidDelta: if it cannot be used.
        """
        if isinstance(message, Choice):
            if self.offer is None or message.token not in decode_candidates(self.offer.payload).ids:
                raise InvalidDelta("a choice of a token that was not among the candidates")
            return message.token
        if self.sampling is not None:
            raise InvalidDelta("a delta where a choice was asked for")
        return decode(message.payload, vocab_size)

    def _goes_on_without(self, now: float) -> bool:
        if self.request.on_missing != "continue":
            return False
        return self.closed_by is not None or self.silent or now >= self.deadline
