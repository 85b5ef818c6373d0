"""What the hub has asked for: the streams of one attachment, their generated ids, and the orders that follow from them.

No socket, no clock (``now`` is passed in, in seconds), no model. Messages go in with ``feed``; orders for the evaluator come out
of ``take_orders``. Frames that come faster than the small model can answer melt into one order per stream: the newest prefix is
the one that counts, and nothing grows but the generated ids of the open streams. Deltas for edge fusion come
back here (``answered``), and leave as choices.
"""

import secrets
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from costeer_vllm.edge.choices import Chooser, chooser
from costeer_vllm.edge.disclosure import Disclosure, Disclosures
from costeer_vllm.errors import InvalidCandidates, InvalidParameter
from costeer_vllm.protocol import keys
from costeer_vllm.protocol.messages import Advance, Begin, Candidates, Choice, Delta, End, EndReason, Fusion, Query
from costeer_vllm.protocol.stream import extend_hash
from costeer_vllm.steering import check_strength

OVER = "the app that asked has its answer, or does not want it any more"


@dataclass(frozen=True, slots=True)
class Order:
    """Bring a stream to a prefix and tell its delta, if it was not told ahead: keep ``keep`` generated ids, append ``tokens``."""

    serial: int
    keep: int
    tokens: tuple[int, ...]
    position: int
    prefix_hash: int
    query: Query | None = None  # of a new stream
    fusion: Fusion = "cloud"
    strength: float = 1.0  # c_T
    guess_bytes: int = 0  # that the engine keeps; 0: no delta may come unasked
    at: float = 0.0  # seconds: when the newest frame came


@dataclass(frozen=True, slots=True)
class Answer:
    """The delta of one prefix of a stream: as it will be sent or, of an edge-fused stream, as it must stay here."""

    serial: int
    position: int
    prefix_hash: int
    delta: bytes | npt.NDArray[np.float32]  # a payload; or [vocab], nats
    guessed: tuple[int, ...] = ()  # the last tokens of the prefix, if nobody has chosen them yet


@dataclass(frozen=True, slots=True)
class Failure:
    """A stream that was given up; the sentence is fit to be sent."""

    serial: int
    reason: EndReason
    sentence: str


@dataclass(frozen=True, slots=True)
class Read:
    """Cloud fusion: a generated token and its probability in the small model, without and with the context."""

    serial: int
    token: int
    without_context: float
    with_context: float


@dataclass(frozen=True, slots=True)
class NoRoom:
    """Edge fusion: from here on a stream does without the private context, for which there are no positions left."""

    serial: int


Result: TypeAlias = Answer | Read | NoRoom | Failure


@dataclass(slots=True)
class _Stream:
    name: str
    serial: int  # never used twice, unlike the name
    query: Query | None  # None once it is ordered
    strength: float  # c_T
    guess_bytes: int
    disclosure: Disclosure
    chooser: Chooser | None  # None: cloud fusion
    seen: float  # last frame
    tokens: list[int] = field(default_factory=list)  # generated
    hashes: list[int] = field(default_factory=lambda: [0])  # hashes[i]: of the first i tokens
    kept: int = 0  # tokens that the evaluator has and that are still right


class Streams:
    """The open streams of one attachment, at most ``limit``."""

    def __init__(
        self,
        worker: str,
        num_tokens: int,
        max_positions: int,
        limit: int,
        steering_key: str | None,
        fusions: Collection[Fusion] = ("cloud", "edge"),
        disclosures: Disclosures | None = None,
    ) -> None:
        """``num_tokens``: ids are below it. ``steering_key``: a Begin must then carry the grant that fits it."""
        self._worker, self._num_tokens, self._max_positions, self._limit = worker, num_tokens, max_positions, limit
        self._fusions, self._disclosures = fusions, disclosures or Disclosures()
        self._secret = secrets.token_bytes(32)  # see choices.chooser
        self._digest = keys.key_digest(steering_key) if steering_key is not None else None
        self._by_name: dict[str, _Stream] = {}
        self._by_serial: dict[int, _Stream] = {}
        self._asked: dict[int, _Stream] = {}  # by serial, in the order of asking
        self._closed: list[int] = []
        self._last_serial = 0

    def __len__(self) -> int:
        return len(self._by_name)

    @property
    def num_asked(self) -> int:
        """Streams that wait for a delta that is not ordered yet."""
        return len(self._asked)

    def feed(self, message: Begin | Advance | Candidates | End, now: float) -> Choice | End | None:
        """Take a message from the hub; returns what to answer at once: a choice, or the End of a stream that cannot go on."""
        match message:
            case Begin():
                return self._begin(message, now)
            case Advance():
                return self._advance(message, now)
            case Candidates():
                return self._offer(message, now)
            case End():
                self._close(message.stream, for_good=True)
        return None

    def take_orders(self) -> tuple[list[Order], list[int]]:
        """The orders since the last call, one per stream, and the serials of the streams closed since then."""
        orders = []
        for stream in self._asked.values():
            tokens, query = tuple(stream.tokens[stream.kept :]), stream.query
            fusion: Fusion = "cloud" if stream.chooser is None else "edge"
            orders.append(
                Order(
                    stream.serial,
                    stream.kept,
                    tokens,
                    len(stream.tokens),
                    stream.hashes[-1],
                    query,
                    fusion,
                    stream.strength,
                    stream.guess_bytes,
                    stream.seen,
                )
            )
            stream.kept, stream.query = len(stream.tokens), None
        closed = self._closed
        self._asked, self._closed = {}, []
        return orders, closed

    def answered(self, answer: Answer) -> Delta | Choice | End | None:
        """What goes out for an answer: nothing if its prefix cannot come true any more, or its candidates are not there yet."""
        stream = self._by_serial.get(answer.serial)
        if stream is None or not _may_come(stream, answer) or (answer.serial in self._asked and not answer.guessed):
            return None
        if stream.disclosure.is_over:  # nobody asked for what lies ahead
            is_asked = _stands_at(stream, answer.position, answer.prefix_hash)
            return self._end(stream.name, "refused", OVER) if is_asked else None
        if isinstance(answer.delta, bytes):
            return Delta(stream.name, answer.position, answer.prefix_hash, answer.delta)
        assert stream.chooser is not None
        try:
            return stream.chooser.weighed(answer.position, answer.prefix_hash, answer.delta)
        except InvalidCandidates as error:
            return self._end(stream.name, "failed", str(error))

    def name_of(self, serial: int) -> str | None:
        """The name of an open stream."""
        stream = self._by_serial.get(serial)
        return None if stream is None else stream.name

    def no_room(self, serial: int) -> None:
        """A stream does without the private context from here on; its app is told."""
        if (stream := self._by_serial.get(serial)) is not None:
            stream.disclosure.has_no_room = True

    def chooser_of(self, name: str) -> Chooser | None:
        """What chooses for an open edge-fused stream."""
        stream = self._by_name.get(name)
        return None if stream is None else stream.chooser

    def fail(self, serial: int, reason: EndReason, sentence: str) -> End | None:
        """Close a stream that the evaluator gave up and forgot; returns the End to send, None if it was over anyway."""
        stream = self._by_serial.get(serial)
        return self._end(stream.name, reason, sentence) if stream else None

    def expire(self, before: float) -> list[End]:
        """Close the streams without a frame since ``before``."""
        idle = [stream.name for stream in self._by_name.values() if stream.seen < before]
        return [self._end(name, "failed", "nothing was heard of this stream for too long") for name in idle]

    def clear(self) -> None:
        """The attachment is gone, and so are its streams."""
        for name in list(self._by_name):
            self._close(name, for_good=False)

    def _begin(self, begin: Begin, now: float) -> End | None:
        self._close(begin.stream, for_good=False)  # begun again
        if begin.worker != self._worker:
            return End(begin.stream, "failed", f"this edge worker is named {self._worker}")
        if self._digest is not None and not keys.same(begin.grant, keys.grant(self._digest, self._worker, begin.query)):
            return End(begin.stream, "refused", "the steering key of the request does not fit this edge worker")
        if _num_forms(begin.query) != 1:
            return End(begin.stream, "failed", "the query must be exactly one of messages, a prompt and prompt ids")
        if not self._are_known(begin.tokens) or not self._are_known(begin.query.prompt_ids or []):
            return End(begin.stream, "failed", self._unknown)
        if begin.fusion not in self._fusions or not self._disclosures.is_allowed(begin.query.ref, begin.fusion):
            return End(begin.stream, "refused", f"this edge worker does not consent to {begin.fusion} fusion")
        if len(self._by_name) >= self._limit:
            return End(begin.stream, "overloaded", f"this edge worker serves at most {self._limit} streams at a time")
        try:
            check_strength("strength", begin.strength)
            chooses = None if begin.sampling is None else chooser(begin, self._disclosures, self._secret)
        except InvalidParameter as error:
            return End(begin.stream, "failed", str(error))
        self._last_serial += 1
        disclosure = chooses.disclosure if chooses else self._disclosures.of(begin.request, begin.query.ref)
        disclosure.begun()
        stream = _Stream(
            begin.stream, self._last_serial, begin.query, begin.strength, begin.guess_bytes, disclosure, chooses, now
        )
        _append(stream, begin.tokens)
        self._by_name[stream.name] = self._by_serial[stream.serial] = self._asked[stream.serial] = stream
        return None

    def _advance(self, advance: Advance, now: float) -> End | None:
        stream = self._by_name.get(advance.stream)
        if stream is None:
            return End(advance.stream, "unknown_stream", "this edge worker does not know the stream")
        start = advance.position - len(advance.tokens)
        if not 0 <= start <= len(stream.tokens):
            sentence = f"a gap: tokens from position {start} on came when {len(stream.tokens)} were known"
            return self._end(stream.name, "failed", sentence)
        if not self._are_known(advance.tokens):
            return self._end(stream.name, "failed", self._unknown)
        same = 0
        for old, new in zip(stream.tokens[start:], advance.tokens, strict=False):
            if old != new:
                break
            same += 1
        _truncate(stream, start + same)
        _append(stream, advance.tokens[same:])
        if stream.hashes[-1] != advance.prefix_hash:
            return self._end(stream.name, "failed", f"the tokens before position {advance.position} are not those that were sent")
        if len(stream.tokens) > self._max_positions:
            sentence = f"the stream is longer than the small model's {self._max_positions} positions"
            return self._end(stream.name, "refused", sentence)
        if stream.disclosure.is_over:
            return self._end(stream.name, "refused", OVER)
        stream.seen = now
        self._asked[stream.serial] = stream
        return None

    def _offer(self, candidates: Candidates, now: float) -> Choice | End | None:
        stream = self._by_name.get(candidates.stream)
        if stream is None:
            return End(candidates.stream, "unknown_stream", "this edge worker does not know the stream")
        if stream.chooser is None:
            return self._end(stream.name, "failed", "candidates came for a stream that is fused in the cloud")
        if not _stands_at(stream, candidates.position, candidates.prefix_hash):
            return None  # late
        if stream.disclosure.is_over:
            return self._end(stream.name, "refused", OVER)
        stream.seen = now
        try:
            return stream.chooser.offered(candidates)
        except InvalidCandidates as error:
            return self._end(stream.name, "failed", str(error))

    def _are_known(self, tokens: list[int]) -> bool:
        return not tokens or max(tokens) < self._num_tokens

    @property
    def _unknown(self) -> str:
        return f"a token id is outside the small model's {self._num_tokens}"

    def _end(self, name: str, reason: EndReason, sentence: str) -> End:
        self._close(name, for_good=True)
        return End(name, reason, sentence)

    def _close(self, name: str, for_good: bool) -> None:
        stream = self._by_name.pop(name, None)
        if stream is None:
            return
        stream.disclosure.ended(for_good)
        del self._by_serial[stream.serial]
        self._asked.pop(stream.serial, None)
        if stream.query is None:  # the evaluator knows it
            self._closed.append(stream.serial)


def _append(stream: _Stream, tokens: list[int]) -> None:
    stream.tokens += tokens
    for token in tokens:
        stream.hashes.append(extend_hash(stream.hashes[-1], (token,)))


def _truncate(stream: _Stream, length: int) -> None:
    del stream.tokens[length:], stream.hashes[length + 1 :]
    stream.kept = min(stream.kept, length)


def _stands_at(stream: _Stream, position: int, prefix_hash: int) -> bool:
    return (len(stream.tokens), stream.hashes[-1]) == (position, prefix_hash)


def _may_come(stream: _Stream, answer: Answer) -> bool:
    """Whether an answer's prefix is the newest, or continues it by tokens that it guesses."""
    left = answer.position - len(stream.tokens)
    if not 0 <= left <= len(answer.guessed):
        return False
    return extend_hash(stream.hashes[-1], answer.guessed[len(answer.guessed) - left :]) == answer.prefix_hash


def _num_forms(query: Query) -> int:
    return sum(form is not None for form in (query.messages, query.prompt, query.prompt_ids))
