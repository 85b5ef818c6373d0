"""The streams of one engine worker: what was asked of the edge workers, what came back, what each token got.

Nothing here knows vLLM. The processor says which tokens were chosen and asks for deltas; the link carries the messages; the board
tells the scheduler which requests are worth a place in the next step.
"""

import logging
import math
import time
import uuid
from collections.abc import Iterable, Sequence

from costeer_vllm.delta import decode
from costeer_vllm.engine.board import Board, State
from costeer_vllm.engine.link import HubLink
from costeer_vllm.engine.pace import PATIENCE_S, AnswerTime, grace_s
from costeer_vllm.engine.steered import SteeredStream
from costeer_vllm.errors import InvalidDelta
from costeer_vllm.protocol.messages import (
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
    Reattached,
    Refused,
    Sampling,
)
from costeer_vllm.request import SteeringRequest

_JOIN_INTERVAL_S = 0.5
_REOPEN_S = 1.0  # after that a stream that was closed is begun again, while its request waits
_ASK_AGAIN_S = 3.0  # after that a question is repeated, since a frame may have been lost; then after twice as long, and so on
_MAX_OFFERS_KEPT = 64  # of a stream: older choices than these are late in any case
_MAX_WORKERS = 1024  # whose answer times are remembered

logger = logging.getLogger("vllm.costeer")  # below vLLM's own logger: its handlers, its level


class StreamTable:
    """All streams of an engine worker, and the link they share. With ``link=None`` (other tensor-parallel ranks) it is mute."""

    def __init__(self, link: HubLink | None, vocab_size: int, board: Board | None = None) -> None:
        """``board``: without one nothing can be held, and every step waits for all of its answers."""
        self._link = link
        self._vocab_size = vocab_size
        self._board = board
        self._streams: dict[str, SteeredStream] = {}
        self._parked: dict[int, SteeredStream] = {}  # by ticket: in no batch at the moment
        self._answer_times: dict[str, AnswerTime] = {}  # by edge worker
        self._looked_at = -math.inf  # seconds, monotonic: when messages were received last
        self._joined_at = -math.inf  # the same: when we introduced ourselves last
        self.step_s = 0.0  # how long a step takes without the wait for answers

    def __len__(self) -> int:
        return len(self._streams)

    # Streams come and go

    def begin(
        self, request: SteeringRequest, tokens: Sequence[int], stop_ids: frozenset[int], sampling: Sampling | None = None
    ) -> SteeredStream:
        """The stream of a request that enters the batch with ``tokens`` generated: a new one, or the one that it left parked."""
        parked = None if request.ticket is None else self._parked.pop(request.ticket, None)
        if parked is not None:
            self.align(parked, tokens)
            return parked
        stream = SteeredStream(f"{request.request}.{uuid.uuid4().hex[:8]}", request, stop_ids, sampling, tokens=list(tokens))
        self._streams[stream.id] = stream
        self._ask(stream, stream.begin())
        return stream

    def leave(self, stream: SteeredStream, num_chosen: int) -> bool:
        """A stream leaves the batch: for good, or (True) to come back, since its request is only held or preempted."""
        ticket = stream.request.ticket
        if ticket is None or self._board is None or not self._board.is_live(ticket):
            self.end(stream, "finished", num_chosen)
            return False
        if stream.id in self._streams:
            self._parked[ticket] = stream
        return True

    def align(self, stream: SteeredStream, tokens: Sequence[int]) -> None:
        """Bring a stream to ``tokens``, those that its request has: more than we knew of, or fewer if some were taken back."""
        stream.taken_back = False
        if len(tokens) < stream.position:
            stream.tokens = list(tokens)
            stream.undecided = stream.payload = stream.answer = stream.offer = None
            stream.waits_since = time.monotonic()
            self._reopen(stream)
        elif len(tokens) > stream.position:
            self.advance(stream, list(tokens[stream.position :]))

    def advance(self, stream: SteeredStream, tokens: list[int]) -> None:
        """Tell the edge worker which tokens were chosen, and so ask for the next delta."""
        if stream.id not in self._streams:
            return
        self._settle(stream, len(tokens))
        stream.tokens += tokens
        message = stream.protocol.advance(stream.id, tokens)
        stream.payload = stream.answer = stream.offer = None
        stream.waits_since = time.monotonic()
        if stream.closed_by is not None and stream.request.on_missing == "wait":
            stream.protocol.feed(message)
            self._post(stream)  # it is begun again in its time
        else:
            self._ask(stream, message)
        if (guess := stream.guesses.take(message.position, message.prefix_hash)) is not None:
            self._answer(stream, guess)

    def end(self, stream: SteeredStream, reason: EndReason, num_chosen: int) -> None:
        """Close a stream and report its counts; ``num_chosen`` tokens were chosen, and kept, since the last advance."""
        if self._streams.pop(stream.id, None) is None:
            return
        # Async scheduling runs one step past a stop token; what that step chose is thrown away as well.
        if not stream.taken_back and (not stream.tokens or stream.tokens[-1] not in stream.stop_ids):
            self._settle(stream, num_chosen)
        if self._link is None:
            return
        self._link.send(End(stream.id, "failed" if stream.failure else reason, "", stream.steered, stream.missed))
        if stream.missed or stream.invalid or stream.failure:
            why = f" (edge: {stream.closed_by.reason})" if stream.closed_by else ""
            bad = f", {stream.invalid} unusable answers" if stream.invalid else ""
            logger.warning("stream %s by %s: %d tokens steered, %d missed%s%s",
                           stream.id, stream.request.worker, stream.steered, stream.missed, why, bad)  # fmt: skip
        else:
            logger.info("stream %s by %s: %d tokens steered", stream.id, stream.request.worker, stream.steered)

    def close(self) -> None:
        """At the end of the process: report the streams that no further step of the engine will end."""
        for stream in list(self._streams.values()):
            self.end(stream, "finished", int(stream.undecided is not None))
        if self._link is not None:
            self._link.close()

    def give_up(self) -> None:
        """Something failed, so it is not certain any more which delta belongs where: no token is steered from here on."""
        for stream in self._streams.values():
            stream.payload = stream.answer = None
            stream.closes(End(stream.id, "refused", "the engine failed to steer it"))
            stream.undecided = None if stream.undecided is None else False
            self._post(stream)

    # Questions and answers

    def offer(self, stream: SteeredStream, payload: bytes) -> None:
        """Edge fusion: ask the edge worker to choose the current position's token among the candidates in ``payload``."""
        if stream.offer is not None or stream.closed_by is not None or self._link is None:
            return
        stream.offer = Candidates(stream.id, stream.position, stream.protocol.prefix_hash, payload)
        stream.waits_since = stream.asked_at = stream.offered_at[stream.position] = time.monotonic()
        stream.again_at, stream.asked_to_begin = stream.asked_at + _ASK_AGAIN_S, False
        if len(stream.offered_at) > _MAX_OFFERS_KEPT:
            del stream.offered_at[next(iter(stream.offered_at))]
        stream.silent |= not self._link.send(stream.offer)
        self._post(stream)

    def cannot_ask(self, stream: SteeredStream, why: str) -> None:
        """The current position's question cannot be put."""
        stream.silent = True
        if stream.request.on_missing != "continue":
            stream.fail(why)
        self._post(stream)

    def look_after(self) -> None:
        """Between two steps: take what has come, end what is over, ask again where an answer does not come."""
        self._receive(0.0)
        if self._board is not None:
            for ticket, stream in [entry for entry in self._parked.items() if not self._board.is_live(entry[0])]:
                del self._parked[ticket]
                self.end(stream, "finished", int(stream.undecided is not None))
        now = time.monotonic()
        for stream in self._streams.values():
            if stream.answer is None and self._link is not None:
                self._review(stream, now)

    def collect(self, streams: Iterable[SteeredStream], in_company: bool = False) -> None:
        """Wait for the answers of one step, all at the same time, for as long as the step can afford it.

        A stream whose answer does not come is taken back if its request can be held, and otherwise waited for until its deadline.
        ``in_company``: the step holds other rows, which need no answer.
        """
        streams = list(streams)
        if self._link is not None:
            self._wait(streams, in_company)
        now = time.monotonic()
        for stream in streams:
            self._decide(stream, now)

    def take_back(self, stream: SteeredStream) -> None:
        """The stream's newest token does not count, whatever is known of its answer."""
        stream.taken_back, stream.undecided = True, None
        ticket = stream.request.ticket
        if self._board is not None and ticket is not None and self._link is not None:
            self._board.take_back(ticket, stream.position)

    def adopt(self, stream: SteeredStream, payload: bytes | None, taken_back: bool = False) -> None:
        """Take over what rank 0 decided for the current position."""
        stream.payload, stream.taken_back = payload, taken_back
        if payload is None:
            stream.answer = None
        elif stream.sampling is None:
            stream.answer = decode(payload, self._vocab_size)
        else:
            stream.answer = int.from_bytes(payload, "little")

    def _wait(self, streams: Sequence[SteeredStream], in_company: bool) -> None:
        self._receive(0.0)
        start = now = time.monotonic()
        soonest = start if in_company else None  # when the first row of the step was ready
        while open_ones := [
            stream for stream in streams if stream.state(now) is State.ASKED and self._is_live(stream) is not False
        ]:
            if soonest is None and len(open_ones) < len(streams):
                soonest = now
            until = start + PATIENCE_S if soonest is None else soonest + grace_s(self.step_s)
            stalled = [stream.deadline for stream in open_ones if self._is_live(stream) is None]
            until = max([until, *stalled])
            held = [stream.deadline for stream in open_ones if self._is_live(stream)]
            if held and not stalled:
                until = min(until, max(held))
            if now >= until:
                return
            self._receive(until - now)
            now = time.monotonic()

    def _is_live(self, stream: SteeredStream) -> bool | None:
        """Whether the scheduler still has the request, which can then be held; None if it does not tell: there is no ticket."""
        ticket = stream.request.ticket
        return None if self._board is None or ticket is None else self._board.is_live(ticket)

    def _decide(self, stream: SteeredStream, now: float) -> None:
        """What the step does with a stream's row: steer it, leave it unsteered, or take its token back."""
        if self._is_live(stream) is False:  # ended while the step was under way: nobody will see this token
            stream.taken_back, stream.undecided = True, None
            return
        is_open = stream.state(now) in (State.ASKED, State.FAILED)
        if is_open and self._is_live(stream) and self._link is not None:
            self.take_back(stream)
            return
        stream.taken_back, stream.undecided = False, stream.answer is not None
        stream.silent |= stream.answer is None
        ticket = stream.request.ticket
        if self._board is not None and ticket is not None and self._link is not None:
            self._board.take_back(ticket, -1)

    def _review(self, stream: SteeredStream, now: float) -> None:
        stream.review(now)
        if stream.request.on_missing == "wait" and stream.failure is None and stream.is_asked and now >= stream.again_at:
            self._reopen(stream)
        elif stream.state(now) is not State.ASKED:  # by the clock alone
            self._post(stream)

    def _reopen(self, stream: SteeredStream) -> None:
        """Begin a stream again from the tokens it has; its token has waited since it was asked for first."""
        waited_s = max(0.0, time.monotonic() - stream.waits_since)
        is_quick, stream.closed_by = stream.closed_by is not None and stream.closed_by.reason != "detached", None
        self._ask(stream, stream.begin())
        if stream.offer is not None and self._link is not None:
            self._link.send(stream.offer)
        stream.again_at = time.monotonic() + (_REOPEN_S if is_quick else max(_ASK_AGAIN_S, 2 * waited_s))

    def _ask(self, stream: SteeredStream, message: Begin | Advance) -> None:
        stream.protocol.feed(message)
        if isinstance(message, Begin):
            stream.guesses.clear()
        stream.asked_at = time.monotonic()
        stream.again_at, stream.asked_to_begin = stream.asked_at + _ASK_AGAIN_S, isinstance(message, Begin)
        stream.waits_since = stream.waits_since or stream.asked_at
        if stream.closed_by is None and self._link is not None and not self._link.send(message):
            stream.silent = True
        self._post(stream)

    def _settle(self, stream: SteeredStream, num_chosen: int) -> None:
        """Count the newest tokens: the first of them is the one decided on, others were chosen without asking here."""
        steered = int(num_chosen > 0 and stream.undecided is True)
        stream.steered += steered
        stream.missed += num_chosen - steered
        stream.undecided = None

    def _post(self, stream: SteeredStream) -> None:
        """Tell the scheduler how a stream stands."""
        ticket = stream.request.ticket
        if self._board is None or self._link is None or ticket is None or not self._board.is_live(ticket):
            return
        if stream.failure is not None:
            self._board.fail(ticket, stream.failure)
            return
        known = self._answer_times.get(stream.request.worker)
        state = stream.state(time.monotonic())
        is_unknown = known is None or (stream.asked_to_begin if state is State.ASKED else len(stream.guesses) > 0)
        answer_s = 0.0 if known is None or is_unknown else known.bound  # the next answer may lie here already: it is tried
        self._board.write(ticket, stream.position, state, stream.asked_at, answer_s)

    # Messages

    def _receive(self, timeout_s: float) -> None:
        if self._link is None:
            return
        for message in self._link.receive(timeout_s):
            if timeout_s > 0:  # it was waited for
                self._looked_at = time.monotonic()
            self._handle(message)
        self._looked_at = time.monotonic()

    def _handle(self, message: HubToEngine) -> None:
        match message:
            case Delta() | Choice():
                self._take(message)
            case End(stream=name):
                if (stream := self._streams.get(name)) is not None:
                    stream.closes(message)
                    # Of a worker that comes back we are told.
                    stream.again_at = time.monotonic() + (_ASK_AGAIN_S if message.reason == "detached" else _REOPEN_S)
                    self._post(stream)
            case Reattached(stream=name):
                if (stream := self._streams.get(name)) is not None and stream.closed_by is not None and stream.may_begin_again:
                    stream.silent = False
                    self._reopen(stream)
            case Refused(code="join"):
                self._join_again()
            case Refused(sentence=sentence):
                logger.warning("the hub refuses this server: %s", sentence)
            case Joined() | Admitted():
                logger.debug("hub: %s", type(message).__name__)

    def _join_again(self) -> None:
        """The hub restarted and knows neither us nor our streams: begin them again, from the tokens that they have."""
        assert self._link is not None
        if time.monotonic() < self._joined_at + _JOIN_INTERVAL_S:  # every frame on the way to the new hub is refused
            return
        self._joined_at = time.monotonic()
        self._link.join()
        for stream in self._streams.values():
            if stream.may_begin_again:
                self._reopen(stream)

    def _take(self, message: Delta | Choice) -> None:
        stream = self._streams.get(message.stream)
        if stream is None or stream.closed_by is not None:
            return
        is_late = not stream.protocol.wants(message)
        if is_late and (stream.sampling is None or isinstance(message, Delta)):
            if stream.sampling is None and isinstance(message, Delta):
                stream.guesses.keep(message, stream.position)
                self._post(stream)
            return
        if is_late:
            # Where no choice is waited for, none can be in time: this one shows whether it would have been.
            offered_at = stream.offered_at.pop(message.position, -math.inf)
            stream.silent &= time.monotonic() - offered_at > stream.request.deadline_ms / 1000
            return
        self._note_answer_time(stream)
        self._answer(stream, message)

    def _answer(self, stream: SteeredStream, message: Delta | Choice) -> None:
        """Take ``message`` as the answer for the current position."""
        stream.silent = False
        try:
            stream.answer = stream.decoded(message, self._vocab_size)
        except InvalidDelta as error:
            stream.rejects(error)
            if stream.invalid == 1:  # a bad worker must not fill the log
                logger.warning("stream %s: %s", stream.id, error)
        else:
            stream.payload = message.payload if isinstance(message, Delta) else message.token.to_bytes(4, "little")
            stream.protocol.feed(message)
            stream.failures = 0
        self._post(stream)

    def _note_answer_time(self, stream: SteeredStream) -> None:
        if stream.asked_to_begin:
            return
        worker = stream.request.worker
        if worker not in self._answer_times and len(self._answer_times) >= _MAX_WORKERS:
            del self._answer_times[next(iter(self._answer_times))]
        least = max(0.0, self._looked_at - stream.asked_at)
        self._answer_times.setdefault(worker, AnswerTime()).note(least, time.monotonic() - stream.asked_at)
