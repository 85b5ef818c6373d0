"""The logits processor: one class for both of vLLM's model runners.

Runner V1 calls ``update_state`` before and ``apply(logits)`` after the forward pass; Model Runner V2 calls ``add_request``,
``apply_staged_writes`` and ``apply(logits, ctx)``. Either way a token goes out as soon as the runner shows it, the two models
run side by side, and the wait for the delta happens in ``apply``; an edge-fused row is shown to its edge worker there, and waits
for the token that comes back. Under tensor parallelism rank 0 talks to the hub and
broadcasts what it got, so that all ranks add the same delta in the same step.

An exception in one of these hooks would end vLLM's engine, so every one of them is total: see ``_total``.
"""

import atexit
import functools
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
import zmq
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality
from vllm.v1.sample.logits_processor.interface import LogitsProcessor as LogitsProcessorV1
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as LogitsProcessorV2

from costeer_vllm.candidates import encode_candidates
from costeer_vllm.engine import hooks, settings
from costeer_vllm.engine.batch import steer_batch
from costeer_vllm.engine.board import open_board
from costeer_vllm.engine.link import HubLink
from costeer_vllm.engine.offers import Penalties, base_policies
from costeer_vllm.engine.pace import StepClock
from costeer_vllm.engine.ranks import Ranks
from costeer_vllm.engine.slots import Slots, TokenReader
from costeer_vllm.engine.steered import SteeredStream
from costeer_vllm.engine.streams import StreamTable
from costeer_vllm.errors import HubUnavailable, InvalidParameter
from costeer_vllm.protocol.messages import Sampling
from costeer_vllm.request import SteeringRequest, parse_admitted

logger = logging.getLogger("vllm.costeer")  # below vLLM's own logger: its handlers, its level


class _Row(NamedTuple):
    """A row of runner V1's batch."""

    stream: SteeredStream
    output_ids: list[int]  # the runner's own list
    penalties: Penalties


PROMPT_LOGPROBS = ("prompt_logprobs", "prompt_token_id_logprobs")

P = ParamSpec("P")
T = TypeVar("T")


def _total(fallback: Callable[..., T]) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Make a hook total: log what it raises and return ``fallback`` of the same arguments instead."""

    def decorate(hook: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(hook)
        def total(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                return hook(*args, **kwargs)
            except Exception:
                logger.exception("%s failed; the tokens concerned are unsteered, or their requests fail", hook.__name__)
                return fallback(*args, **kwargs)

        return total

    return decorate


class CoSteerLogitsProcessor(LogitsProcessorV1, LogitsProcessorV2):  # type: ignore[misc]
    """Adds ``strength * delta`` to the logits of steered requests and leaves every other row alone."""

    def __init__(self, vllm_config: Any, where: Any, is_pin_memory: bool | None = None) -> None:
        """V1 calls this with ``(vllm_config, device, is_pin_memory)``, V2 with ``(vllm_config, req_states)``."""
        self._ranks = Ranks()
        self._clock = StepClock()
        self._board = open_board(vllm_config)
        self._vocab_size: int = vllm_config.model_config.get_vocab_size()
        self._table: StreamTable | None = None
        self._rows: dict[int, _Row] = {}  # V1
        self.unfinished_rows: frozenset[int] = frozenset()  # V1: in this step chunks of prefills, as hooks.py sees them
        self.taken_back_rows: frozenset[int] = frozenset()  # whose token of this step shall not count
        self._slots: Slots | None = None
        if hasattr(where, "all_token_ids"):
            hooks.watch_request_states()
            self._slots = Slots(where, on_vacated=self._vacate)
            self._reader = TokenReader(where)
        else:
            hooks.watch_prefill_chunks()

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse, before admission to the engine, what no admission of ours can have produced.

        Raises:
            InvalidParameter: a ValueError, which becomes HTTP 400.
        """
        request = _steering_request(sampling_params)
        budget = getattr(sampling_params, "thinking_token_budget", None)
        if request is not None and request.fusion == "edge" and budget is not None:  # it would overrule the choice, unseen
            raise InvalidParameter("thinking_token_budget", budget, "left out where fusion is 'edge'")
        for field in PROMPT_LOGPROBS if request is not None else ():  # vLLM gives them with the first token, which may be dropped
            if (value := getattr(sampling_params, field, None)) is not None:
                raise InvalidParameter(field, value, "left out for a steered request (echo with logprobs asks for them, too)")

    # Runner V1

    @property
    def steered_rows(self) -> Collection[int]:
        """Of runner V1's batch."""
        return self._rows.keys()

    def is_argmax_invariant(self) -> bool:
        """False: steering changes the greedy choice."""
        return False

    @_total(lambda self, batch_update: self._given_up(None))
    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the batch, then send out the tokens that the last step chose."""
        if batch_update is not None:
            self._follow(batch_update)
        self._advance_rows()
        self._start_step()

    def _follow(self, update: BatchUpdate) -> None:
        # ``removed`` does not list a row whose place an added or moved request takes in the same update. All that leave do so
        # before the first one enters: a request that was preempted and is back may enter before its own row is taken.
        for row in [*update.removed, *(row for row, *_ in update.added)]:
            self._leave_row(row)
        for row, params, prompt_ids, output_ids in update.added:
            if (request := _steering_request_or_none(params)) is not None:
                stream = self._begin(request, output_ids, _stop_ids(params), _sampling(request, params))
                self._rows[row] = _Row(stream, output_ids, _penalties(params, prompt_ids))
        for source, target, direction in update.moved:
            moved, displaced = self._rows.pop(source, None), self._rows.pop(target, None)
            if moved is not None:
                self._rows[target] = moved
            if displaced is not None and direction == MoveDirectionality.SWAP:
                self._rows[source] = displaced
            elif displaced is not None:
                self._leave(displaced)

    def _leave_row(self, row: int) -> None:
        if (entry := self._rows.pop(row, None)) is not None:
            self._leave(entry)

    def _leave(self, entry: _Row) -> None:
        if self._streams().leave(entry.stream, max(0, len(entry.output_ids) - entry.stream.position)):
            self._advance(entry)

    def _advance_rows(self) -> None:
        for entry in self._rows.values():
            self._advance(entry)

    def _advance(self, entry: _Row) -> None:
        stream, output_ids = entry.stream, entry.output_ids
        # Under async scheduling the newest id is a placeholder (-1) until the runner has copied it to the host. A token that is
        # taken back stands in the list until the row has left the batch.
        if len(output_ids) != stream.position and not stream.taken_back and -1 not in output_ids[stream.position :]:
            self._streams().align(stream, output_ids)

    # Model Runner V2

    @_total(lambda self, req_idx, sampling_params: self._given_up(False))
    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Take the slot's new occupant if it asks for steering; False lets the runner skip ``apply`` altogether."""
        self._vacate(req_idx)
        self._advance_slots()  # before the stream of a request that comes back is brought to its tokens
        request = _steering_request_or_none(sampling_params)
        if request is None:
            return False
        assert self._slots is not None
        output_ids = self._slots.arrived_output(req_idx)
        sampling = _sampling(request, sampling_params)
        self._slots.streams[req_idx] = self._begin(request, output_ids, _stop_ids(sampling_params), sampling)
        return True

    @_total(lambda self: self._given_up(None))
    def apply_staged_writes(self) -> None:
        """Start to read the tokens that the last step chose; where the device is the host, send them out at once."""
        if self._slots is not None:
            self._advance_slots()  # what an earlier step started and no apply() has finished: it had no row of ours
            if self._slots.sampled:
                self._reader.start(self._slots)
            if self._reader.is_ready:
                self._advance_slots()
        self._start_step()

    def _advance_slots(self) -> None:
        for stream, token in self._reader.finish():
            self._streams().advance(stream, [token])

    @_total(lambda self, slot: self._given_up(None))
    def _vacate(self, slot: int) -> None:
        assert self._slots is not None
        if (stream := self._slots.streams.pop(slot, None)) is not None:
            self._slots.sampled.pop(slot, None)
            self._streams().leave(stream, int(stream.undecided is not None))

    # Both runners

    @_total(lambda self, logits, ctx=None: self._given_up(logits))
    def apply(self, logits: torch.Tensor, ctx: LogitsContext | None = None) -> torch.Tensor:
        """Steer ``logits [rows, vocab]`` in place: wait for the answers of this step, then one batched addition."""
        rows = self._rows_v1() if ctx is None else self._rows_v2(ctx)
        if rows:
            streams = list(rows.values())
            if self._ranks.is_first:
                self._offer_if_possible(logits, rows)
            with self._clock.paused():
                self._streams().collect(streams, in_company=logits.shape[0] > len(rows))
            self._ranks.agree(self._streams(), streams)
        self._take_back(rows)
        steer_batch(logits, {row: stream for row, stream in rows.items() if not stream.taken_back})
        return logits

    def _take_back(self, rows: Mapping[int, SteeredStream]) -> None:
        """Note the rows whose token shall not count: Model Runner V2 is told, V1 follows the scheduler, which reads the board."""
        if self._slots is None:  # also those of a step that was fed a dropped token: they are in no ``rows``
            self.taken_back_rows = frozenset(row for row, entry in self._rows.items() if entry.stream.taken_back)
            return
        stale = self._slots.stale_rows
        for stream in stale.values():
            self._streams().take_back(stream)
        self._slots.taken_back = sorted([*stale, *(row for row, stream in rows.items() if stream.taken_back)])
        for slot in [slot for slot, stream in self._slots.sampled.items() if stream.taken_back]:
            del self._slots.sampled[slot]

    def _start_step(self) -> None:
        """Between two steps: what streams need that are in no batch, and the clock."""
        if self._table is None or not len(self._table):
            self._clock.stop()
            return
        self._table.look_after()
        self._table.step_s = self._clock.start_step()
        if self._board is not None and self._ranks.is_first:
            self._board.step_s = self._table.step_s

    def _offer_if_possible(self, logits: torch.Tensor, rows: Mapping[int, SteeredStream]) -> None:
        """Whatever fails here fails on this rank alone, and must not keep it from what all ranks do together."""
        try:
            self._offer(logits, rows)
        except Exception:
            logger.exception("candidates cannot be shown; the tokens concerned are unsteered, or their requests fail")
            for stream in rows.values():
                if stream.sampling is not None:
                    self._streams().cannot_ask(stream, "the engine cannot show it the candidates")

    def _offer(self, logits: torch.Tensor, rows: Mapping[int, SteeredStream]) -> None:
        """Show the edge-fused streams their candidates, once per position and while there is somebody to look at them."""
        edge_fused = {row: stream for row, stream in rows.items() if stream.sampling is not None}
        asking = {row: stream for row, stream in edge_fused.items() if stream.offer is None and stream.closed_by is None}
        if not asking:
            return
        shown = torch.stack([self._penalized(row, logits[row]) for row in asking])
        counts = [stream.request.candidates for stream in asking.values()]
        for stream, policy in zip(asking.values(), base_policies(shown, counts), strict=True):
            if policy is None:
                self._streams().cannot_ask(stream, "the large model gives no token a probability here")
            else:
                self._streams().offer(stream, encode_candidates(policy, stream.request.rounding))

    def _penalized(self, row: int, logits: torch.Tensor) -> torch.Tensor:
        """``logits [vocab]`` as they will be sampled from; Model Runner V2 has seen to it before."""
        entry = self._rows.get(row)
        return logits if entry is None or entry.penalties.is_neutral else entry.penalties.applied(logits, entry.output_ids)

    def _rows_v1(self) -> dict[int, SteeredStream]:
        self._advance_rows()
        # A row whose newest ids are not known yet has no answer: that of a shorter prefix is none of its own. A chunk of an
        # unfinished prefill chooses no token.
        return {
            row: stream
            for row, (stream, output_ids, _) in sorted(self._rows.items())
            if len(output_ids) == stream.position and not stream.taken_back and row not in self.unfinished_rows
        }

    def _rows_v2(self, ctx: LogitsContext) -> dict[int, SteeredStream]:
        assert self._slots is not None
        self._advance_slots()
        rows = self._slots.rows(ctx)
        self._slots.sampled = {int(ctx.idx_mapping_np[row]): stream for row, stream in rows.items()}
        return rows

    def _streams(self) -> StreamTable:
        if self._table is None:
            if self._board is None:
                logger.error("%s is not set here, so no request can be held, and the scheduler will fail them", settings.BOARD)
            self._table = StreamTable(_hub_link() if self._ranks.is_first else None, self._vocab_size, self._board)
            atexit.register(self._table.close)
        return self._table

    def _begin(
        self, request: SteeringRequest, output_ids: list[int], stop_ids: frozenset[int], sampling: Sampling | None
    ) -> SteeredStream:
        known = output_ids[: output_ids.index(-1)] if -1 in output_ids else output_ids
        return self._streams().begin(request, known, stop_ids, sampling)

    def _given_up(self, result: T) -> T:
        if self._table is not None:
            self._table.give_up()
        return result


def _hub_link() -> HubLink | None:
    """The link, or None if there is no address of a hub: a failure of rank 0 alone would set the ranks at odds."""
    try:
        return HubLink(settings.hub_endpoint(), settings.attach_key())
    except (HubUnavailable, zmq.ZMQError) as error:
        logger.error("every steered request will fail: %s", error)
        return None


def _steering_request(params: SamplingParams) -> SteeringRequest | None:
    extra_args = params.extra_args
    if not extra_args or "costeer" not in extra_args:
        return None
    return parse_admitted(extra_args["costeer"])


def _steering_request_or_none(params: SamplingParams) -> SteeringRequest | None:
    """For the engine, where validation is behind us and an exception would be fatal."""
    try:
        return _steering_request(params)
    except Exception as error:
        logger.error("a request that passed admission cannot be steered: %s", error)
        return None


def _stop_ids(params: SamplingParams) -> frozenset[int]:
    return frozenset((params.stop_token_ids or ()) if params.ignore_eos else params.all_stop_token_ids)


def _sampling(request: SteeringRequest, params: SamplingParams) -> Sampling | None:
    """How an edge worker shall draw the request's tokens; None in cloud fusion."""
    if request.fusion == "cloud":
        return None
    return Sampling(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=max(0, params.top_k),
        min_p=params.min_p,
        seed=params.seed,
        confidence=request.confidence,
        max_bits=request.max_bits,
    )


def _penalties(params: SamplingParams, prompt_ids: Sequence[int] | None) -> Penalties:
    return Penalties(prompt_ids or (), params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
