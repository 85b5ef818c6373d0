"""The streams of one engine worker: what was asked of the edge workers, what came back, what each token got.

Nothing here knows vLLM. The processor says which tokens were chosen and asks for deltas; the link carries the messages.
"""

import logging
import math
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from costeer_vllm.candidates import decode_candidates
from costeer_vllm.delta import DenseDelta, SparseDelta, decode
from costeer_vllm.engine.guesses import Guesses
from costeer_vllm.engine.link import HubLink
from costeer_vllm.errors import InvalidDelta
from costeer_vllm.protocol.messages import (
    MAX_GUESS_BYTES,
    Admitted,
    Advance,
    Begin,
    Candidates,
    Choice,
    Delta,
    End,
    EndReason,
    HubToEngine,
    Joined,
    Refused,
    Sampling,
)
from costeer_vllm.protocol.stream import Stream
from costeer_vllm.request import SteeringRequest

_JOIN_INTERVAL_S = 0.5
_MAX_OFFERS_KEPT = 64  # of a stream: older choices than these are late in any case

logger = logging.getLogger("vllm.costeer")  # below vLLM's own logger: its handlers, its level


@dataclass(slots=True, eq=False)
class SteeredStream:
    """One generation and its edge worker, on the engine's side."""

    id: str
    request: SteeringRequest
    stop_ids: frozenset[int]
    sampling: Sampling | None = None  # edge fusion: how its tokens are drawn; None: cloud fusion
    protocol: Stream = field(default_factory=Stream)
    tokens: list[int] = field(default_factory=list)  # generated so far: what a hub that restarted must be told
    offer: Candidates | None = None  # edge fusion: what the current position's token is chosen from
    guesses: Guesses = field(default_factory=Guesses)  # cloud fusion: answers to positions that are still to come
    payload: bytes | None = None  # of the answer for the current position: a delta as it came, or the id of the chosen token
    answer: DenseDelta | SparseDelta | int | None = None  # the same
    asked_at: float = 0.0  # seconds, monotonic
    offered_at: dict[int, float] = field(default_factory=dict)  # the same, by position, of the last offers
    silent: bool = False  # nothing has come in time since the last miss: not worth another wait
    closed_by: EndReason | None = None  # the edge or the hub ended it; its tokens are missed from there on
    steered: int = 0
    missed: int = 0
    invalid: int = 0
    undecided: bool | None = None  # the newest token: was it steered? counted once it is known to have been kept

    @property
    def position(self) -> int:
        """Tokens generated before the one being chosen."""
        return self.protocol.position

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
        )

    def wait_s(self, now: float) -> float:
        """How long the current position may still wait for its answer, in seconds; 0 once it has it or has no hope."""
        is_asked = self.sampling is None or self.offer is not None  # numbers that are none are not shown to an edge worker
        if self.answer is not None or self.closed_by is not None or self.silent or not is_asked:
            return 0.0
        return max(0.0, self.asked_at + self.request.deadline_ms / 1000 - now)


class StreamTable:
    """All streams of an engine worker, and the link they share. With ``link=None`` (other tensor-parallel ranks) it is mute."""

    def __init__(self, link: HubLink | None, vocab_size: int) -> None:
        self._link = link
        self._vocab_size = vocab_size
        self._streams: dict[str, SteeredStream] = {}
        self._joined_at = -math.inf  # seconds, monotonic

    def __len__(self) -> int:
        return len(self._streams)

    def begin(
        self, request: SteeringRequest, tokens: Sequence[int], stop_ids: frozenset[int], sampling: Sampling | None = None
    ) -> SteeredStream:
        """Open a stream whose generation stands at ``tokens`` (none at first; more when it resumes after preemption)."""
        stream = SteeredStream(f"{request.request}.{uuid.uuid4().hex[:8]}", request, stop_ids, sampling, tokens=list(tokens))
        self._streams[stream.id] = stream
        self._ask(stream, stream.begin())
        return stream

    def advance(self, stream: SteeredStream, tokens: list[int]) -> None:
        """Tell the edge worker which tokens were chosen, and so ask for the next delta."""
        if stream.id not in self._streams:
            return
        self._settle(stream, len(tokens))
        stream.tokens += tokens
        message = stream.protocol.advance(stream.id, tokens)
        stream.payload = stream.answer = stream.offer = None
        self._ask(stream, message)
        guess = stream.guesses.take(message.position, message.prefix_hash)
        if guess is not None and stream.closed_by is None:
            self._answer(stream, guess)

    def offer(self, stream: SteeredStream, payload: bytes) -> None:
        """Edge fusion: ask the edge worker to choose the current position's token among the candidates in ``payload``."""
        if stream.offer is not None or stream.closed_by is not None or self._link is None:
            return
        stream.offer = Candidates(stream.id, stream.position, stream.protocol.prefix_hash, payload)
        stream.asked_at = stream.offered_at[stream.position] = time.monotonic()
        if len(stream.offered_at) > _MAX_OFFERS_KEPT:
            del stream.offered_at[next(iter(stream.offered_at))]
        if not self._link.send(stream.offer):
            stream.silent = True

    def collect(self, streams: Iterable[SteeredStream]) -> None:
        """Wait until every one of ``streams`` has its answer or has waited long enough, all at the same time."""
        streams = list(streams)
        if self._link is not None:
            self._receive(0.0)
            while (wait_s := max((stream.wait_s(time.monotonic()) for stream in streams), default=0.0)) > 0:
                self._receive(wait_s)
        for stream in streams:
            stream.undecided = stream.answer is not None
            stream.silent |= stream.answer is None

    def adopt(self, stream: SteeredStream, payload: bytes | None) -> None:
        """Take over what rank 0 decided for the current position."""
        stream.payload = payload
        if payload is None:
            stream.answer = None
        elif stream.sampling is None:
            stream.answer = decode(payload, self._vocab_size)
        else:
            stream.answer = int.from_bytes(payload, "little")

    def end(self, stream: SteeredStream, reason: EndReason, num_chosen: int) -> None:
        """Close a stream and report its counts; ``num_chosen`` tokens were chosen, and kept, since the last advance."""
        if self._streams.pop(stream.id, None) is None:
            return
        # Async scheduling runs one step past a stop token; what that step chose is thrown away as well.
        if not stream.tokens or stream.tokens[-1] not in stream.stop_ids:
            self._settle(stream, num_chosen)
        if self._link is None:
            return
        self._link.send(End(stream.id, reason, "", stream.steered, stream.missed))
        if stream.missed or stream.invalid:
            why = f" (edge: {stream.closed_by})" if stream.closed_by else ""
            bad = f", {stream.invalid} unusable answers" if stream.invalid else ""
            logger.warning("stream %s by %s: %d tokens steered, %d missed%s%s",
                           stream.id, stream.request.worker, stream.steered, stream.missed, why, bad)  # fmt: skip
        else:
            logger.info("stream %s by %s: %d tokens steered", stream.id, stream.request.worker, stream.steered)

    def leave(self) -> None:
        """At the end of the process: report the streams that no further step of the engine will end."""
        for stream in list(self._streams.values()):
            self.end(stream, "finished", int(stream.undecided is not None))
        if self._link is not None:
            self._link.close()

    def give_up(self) -> None:
        """Something failed, so it is not certain any more which delta belongs where: no token is steered from here on."""
        for stream in self._streams.values():
            stream.payload = stream.answer = None
            stream.closed_by = "failed"
            stream.undecided = None if stream.undecided is None else False

    def _ask(self, stream: SteeredStream, message: Begin | Advance) -> None:
        stream.protocol.feed(message)
        if isinstance(message, Begin):
            stream.guesses.clear()
        stream.asked_at = time.monotonic()
        if stream.closed_by is None and self._link is not None and not self._link.send(message):
            stream.silent = True

    def _settle(self, stream: SteeredStream, num_chosen: int) -> None:
        """Count the newest tokens: the first of them is the one decided on, others were chosen without asking here."""
        steered = int(num_chosen > 0 and stream.undecided is True)
        stream.steered += steered
        stream.missed += num_chosen - steered
        stream.undecided = None

    def _receive(self, timeout_s: float) -> None:
        assert self._link is not None
        for message in self._link.receive(timeout_s):
            self._handle(message)

    def _handle(self, message: HubToEngine) -> None:
        if isinstance(message, (Delta, Choice)):
            self._take(message)
        elif isinstance(message, End):
            if stream := self._streams.get(message.stream):
                stream.closed_by = message.reason
        elif isinstance(message, Refused) and message.code == "join":
            self._join_again()
        elif isinstance(message, Refused):
            logger.warning("the hub refuses this server: %s", message.sentence)
        elif isinstance(message, (Joined, Admitted)):
            logger.debug("hub: %s", type(message).__name__)

    def _join_again(self) -> None:
        """The hub restarted and knows neither us nor our streams: begin them again, from the tokens that they have."""
        assert self._link is not None
        if time.monotonic() < self._joined_at + _JOIN_INTERVAL_S:  # every frame on the way to the new hub is refused
            return
        self._joined_at = time.monotonic()
        self._link.join()
        for stream in self._streams.values():
            asked_at = stream.asked_at
            self._ask(stream, stream.begin())
            if stream.offer is not None and stream.closed_by is None:
                self._link.send(stream.offer)
            stream.asked_at = asked_at  # its token has waited since then

    def _take(self, message: Delta | Choice) -> None:
        stream = self._streams.get(message.stream)
        if stream is None or stream.closed_by is not None:
            return
        is_late = not stream.protocol.wants(message)
        if is_late and (stream.sampling is None or isinstance(message, Delta)):
            if stream.sampling is None and isinstance(message, Delta):
                stream.guesses.keep(message, stream.position)
            return
        if is_late:
            # Where no choice is waited for, none can be in time: this one shows whether it would have been.
            offered_at = stream.offered_at.pop(message.position, -math.inf)
            stream.silent &= time.monotonic() - offered_at > stream.request.deadline_ms / 1000
            return
        self._answer(stream, message)

    def _answer(self, stream: SteeredStream, message: Delta | Choice) -> None:
        """Take ``message`` as the answer for the current position."""
        stream.silent = False
        try:
            stream.answer = self._delta(stream, message) if isinstance(message, Delta) else _choice(stream, message)
        except InvalidDelta as error:
            # No other answer will come for this position: do not wait for one.
            stream.invalid += 1
            stream.silent = True
            if stream.invalid == 1:  # a bad worker must not fill the log
                logger.warning("stream %s: %s", stream.id, error)
            return
        stream.payload = message.payload if isinstance(message, Delta) else message.token.to_bytes(4, "little")
        stream.protocol.feed(message)

    def _delta(self, stream: SteeredStream, message: Delta) -> DenseDelta | SparseDelta:
        if stream.sampling is not None:
            raise InvalidDelta("a delta came where a choice was asked for")
        return decode(message.payload, self._vocab_size)


def _choice(stream: SteeredStream, message: Choice) -> int:
    if stream.offer is None or message.token not in decode_candidates(stream.offer.payload).ids:
        raise InvalidDelta("a token was chosen that was not among the candidates")
    return message.token
