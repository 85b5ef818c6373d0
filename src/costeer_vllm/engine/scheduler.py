"""vLLM's scheduler, sync and async, with one addition: a steered request whose answer is not there does not hold up the others.

Before a step it is left out, if its wait would cost the step more than pace.py allows. After a step that has waited in vain the
processor asks for the token back: it is dropped, and the position is computed again once the answer is there. What is known of
each request stands on the board. Requests without a ticket, those that are not steered, take the way they always took.

Leaving out a decoding request is what vLLM's own DiffusionScheduler does (``next_decode_eligible_step``), and dropping a sampled
token what it does for a rejected draft: one computed token less, one placeholder less.
"""

import copy
import logging
import math
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from costeer_vllm.engine import settings
from costeer_vllm.engine.board import ROWS, State, Tickets, open_board, remove_board
from costeer_vllm.engine.hooks import NAME
from costeer_vllm.engine.pace import limit_s, wait_s
from costeer_vllm.errors import Unsupported
from costeer_vllm.request import with_ticket

UNKNOWN = "costeer: this engine could not begin to steer the request: its log says why"
FULL = f"costeer: this engine already has {ROWS} steered requests"
SESSION = "costeer: a session, whose prompt goes on, cannot be steered"
NO_BOARD = (
    f"costeer: {settings.BOARD} is not set in the engine's process, which it must be to steer: start engine and front end on one "
    "machine, and not by Ray"
)
MAX_UNASKED = 3  # steps: an answer that nobody asks for never comes, whatever we have misunderstood

T = TypeVar("T")

logger = logging.getLogger("vllm.costeer")  # below vLLM's own logger: its handlers, its level


class _Steered:
    """What the scheduler remembers of a steered request."""

    __slots__ = ("counts", "filled", "fusion", "garbage", "leave_out", "num_unasked", "request", "ticket")

    def __init__(self, request: Request, ticket: int, fusion: str) -> None:
        self.request, self.ticket, self.fusion = request, ticket, fusion
        self.leave_out = False  # of the next step, whatever the board says: runner V1 then forgets the token that was dropped
        self.num_unasked = 0  # steps in a row that it was left out of for an answer that nobody has asked for yet
        self.filled = 0  # output tokens it had when its cache was filled last
        self.garbage = False  # runner V1: the steps in flight were fed a dropped token
        self.counts = True  # its newest dropped token is among the computed ones


class _Holding(Scheduler):  # type: ignore[misc]
    """The addition; see the module's head."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._is_async = isinstance(self, AsyncScheduler)
        try:
            board = open_board(self.vllm_config, reserve=True)
        finally:
            remove_board(self.vllm_config)  # the workers, who have it open, were started before
        if board is None:
            raise Unsupported(NO_BOARD)
        self._board, self._tickets = board, Tickets(board)
        self._steered: dict[str, _Steered] = {}  # by request id
        self._refused: dict[str, str] = {}  # by request id: why it cannot be steered
        self._sampling: dict[int, tuple[SchedulerOutput, list[_Steered]]] = {}  # who gets a token in the steps under way, by id()

    def add_request(self, request: Request) -> None:
        """Give a steered request its ticket, which the processor finds among its parameters."""
        params = request.sampling_params
        asked = (params.extra_args or {}).get(NAME) if params is not None else None
        if isinstance(asked, dict):  # nothing else passes the processor's validate_params
            self._admit(request, asked)
        super().add_request(request)

    def _admit(self, request: Request, asked: dict[str, Any]) -> None:
        is_session = request.resumable or request.request_id in self.requests
        ticket = None if is_session else self._tickets.issue()
        # A copy: in an engine within the client's process the children of one request share their parameters.
        request.sampling_params = params = copy.copy(request.sampling_params)
        if ticket is None:  # nobody is asked about it until it is ended
            params.extra_args = {name: value for name, value in params.extra_args.items() if name != NAME}
            self._refused[request.request_id] = SESSION if is_session else FULL
        else:
            params.extra_args = {**params.extra_args, NAME: with_ticket(asked, ticket)}
            self._steered[request.request_id] = _Steered(request, ticket, asked.get("fusion", "cloud"))

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """A step without the requests that it cannot afford to wait for."""
        if not self._steered:
            return super().schedule(throttle_prefills)
        decoding = self._decoding()
        for request in self._guarded(lambda: self._left_out(decoding)):
            # schedule() counts current_step up before it compares.
            request.next_decode_eligible_step = max(request.next_decode_eligible_step, self.current_step + 2)
        output = super().schedule(throttle_prefills)
        steps = (self._steered.get(request_id) for request_id in output.num_scheduled_tokens)
        sampling = [steered for steered in steps if steered and not steered.request.is_prefill_chunk]
        for steered in sampling:
            if steered not in decoding:
                steered.filled = steered.request.num_output_tokens
        self._sampling[id(output)] = output, sampling
        return output

    def update_from_output(self, scheduler_output: SchedulerOutput, output: ModelRunnerOutput) -> dict[int, EngineCoreOutputs]:
        """Drop the tokens that the processor takes back, and end with an error what must fail."""
        _, sampling = self._sampling.pop(id(scheduler_output), (None, []))
        failed = self._guarded(lambda: self._fail(sampling))
        taken_back = self._guarded(lambda: self._take_back(sampling, output))
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(scheduler_output, output)
        for steered in taken_back:
            self._roll_back(steered)
        for request, sentence in failed:
            ended = EngineCoreOutput(
                request_id=request.request_id,
                new_token_ids=[],
                finish_reason=request.get_finished_reason(),
                stop_reason=sentence,
                events=request.take_events(),
                trace_headers=request.trace_headers,
            )
            outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(ended)
        return outputs

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        steered = self._steered.pop(request.request_id, None)
        if steered is not None:
            self._tickets.withdraw(steered.ticket)
        return super()._free_request(request, *args, **kwargs)

    def _guarded(self, work: Callable[[], Iterable[T]]) -> list[T]:
        """What ``work`` finds until it fails, for an exception would end the engine: the step then goes vLLM's own way."""
        found: list[T] = []
        try:
            found.extend(work())  # of a generator that raises, what it gave before stays
        except Exception:
            logger.exception("the scheduler goes on without what it knows of steered requests")
        return found

    # --- before a step

    def _left_out(self, decoding: Iterable[_Steered]) -> Iterable[Request]:
        waits = {steered: self._wait(steered) for steered in decoding}
        others = len(self.running) > len(waits) or bool(self.waiting)
        limit = limit_s([0.0, *waits.values()] if others else list(waits.values()), self._board.step_s)
        for steered, wait in waits.items():
            if wait > limit or steered.leave_out:
                steered.leave_out = False
                steered.num_unasked += self._board.rows[steered.ticket % ROWS]["position"] != _position(steered.request)
                yield steered.request

    def _decoding(self) -> set[_Steered]:
        running = (self._steered.get(request.request_id) for request in self.running)
        return {steered for steered in running if steered is not None and not steered.request.is_prefill_chunk}

    def _wait(self, steered: _Steered) -> float:
        """W of a request, as pace.py defines it."""
        row = self._board.rows[steered.ticket % ROWS]
        request, state = steered.request, int(row["state"])
        position = _position(request)
        now, step_s = time.monotonic(), self._board.step_s
        if self.use_v2_model_runner and request.num_in_flight_tokens and request.num_output_tokens == steered.filled:
            return math.inf  # behind the end of a fill, whose token may be taken back: see slots.py
        if row["ticket"] != steered.ticket:  # the processor has not seen it yet
            return 0.0
        if state == State.FAILED:
            return math.inf
        # On Model Runner V2 a step in flight may stand at the same position once more, if it is taken back.
        is_at = bool(row["position"] == position)
        is_open = is_at or (self.use_v2_model_runner and row["position"] == request.num_output_tokens)
        if is_open and state == State.ASKED:
            return wait_s(float(row["asked_at"]), float(row["answer_s"]), now, step_s)
        # Runner V1 with steps in flight asks in the course of a step, by a token that only the row itself can read.
        is_asked_first = steered.fusion == "cloud" and (self.use_v2_model_runner or not self._is_async)
        if is_at or not is_asked_first or steered.num_unasked >= MAX_UNASKED:
            steered.num_unasked = 0
            return 0.0
        return wait_s(None, float(row["answer_s"]), now, step_s)

    # --- after a step

    def _take_back(self, sampling: Iterable[_Steered], output: ModelRunnerOutput) -> Iterable[_Steered]:
        """Clear the tokens that shall not count."""
        for steered in sampling:
            index = output.req_id_to_index.get(steered.request.request_id)
            if index is None or not output.sampled_token_ids or steered.request.is_finished():
                continue
            if self._is_taken_back(steered, output.sampled_token_ids[index]):
                output.sampled_token_ids[index].clear()
                output.prompt_logprobs_dict.pop(steered.request.request_id, None)  # vLLM gives them with a token only
                # Of a preempted request what is still in flight is delivered, but its counters stand at 0.
                steered.counts = steered.request.status == RequestStatus.RUNNING and not steered.request.num_stale_output_tokens
                yield steered

    def _is_taken_back(self, steered: _Steered, tokens: list[int]) -> bool:
        """Model Runner V2 has dropped the token by itself; runner V1 gives it out, and whatever followed from it."""
        if self.use_v2_model_runner:
            return not tokens
        if steered.garbage:
            return True
        row = self._board.rows[steered.ticket % ROWS]
        return bool(row["ticket"] == steered.ticket and row["taken_back"] == steered.request.num_output_tokens)

    def _roll_back(self, steered: _Steered) -> None:
        request = steered.request
        if not self.use_v2_model_runner:
            steered.leave_out = request.status == RequestStatus.RUNNING  # else it is out already
            steered.garbage = steered.counts and request.num_in_flight_tokens > 0
        is_put_back = request.num_computed_tokens < request.num_tokens  # by vLLM: a part of its cache could not be loaded
        if steered.counts and not is_put_back and request.status == RequestStatus.RUNNING:
            request.num_computed_tokens -= 1
            request.num_output_placeholders = max(0, request.num_output_placeholders - 1)

    def _fail(self, sampling: Iterable[_Steered]) -> list[tuple[Request, str]]:
        """The requests that must fail, ended, and why; ``sampling``: those that got a token in this step."""
        if not self._steered and not self._refused:
            return []
        rows = self._board.rows
        why = {
            request_id: bytes(rows["sentence"][steered.ticket % ROWS]).decode(errors="ignore")
            for request_id, steered in self._steered.items()
            if rows["state"][steered.ticket % ROWS] == State.FAILED and rows["ticket"][steered.ticket % ROWS] == steered.ticket
        }
        why |= {
            steered.request.request_id: UNKNOWN
            for steered in sampling
            if rows["ticket"][steered.ticket % ROWS] != steered.ticket and not steered.request.is_finished()
        }
        why |= self._refused
        self._refused = {}
        ended = self.finish_requests(list(why), RequestStatus.FINISHED_ERROR) if why else []
        return [(request, why[request.request_id]) for request in ended]


def _position(request: Request) -> int:
    """Of the token that the next step chooses."""
    return int(request.num_output_tokens + request.num_output_placeholders)


class HoldingScheduler(_Holding):
    """For synchronous scheduling."""


class HoldingAsyncScheduler(_Holding, AsyncScheduler):  # type: ignore[misc]
    """For asynchronous scheduling."""
