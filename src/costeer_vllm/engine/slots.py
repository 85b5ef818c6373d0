"""Model Runner V2's persistent request slots: who sits where, and which token each slot chose last."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from costeer_vllm.engine.steered import SteeredStream

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext, LogitsProcRequestState


class Slots:
    """The steered occupants of the slots. ``hooks.py`` reports who arrives and who leaves, which V2's interface does not."""

    def __init__(self, state: "LogitsProcRequestState", on_vacated: Callable[[int], None]) -> None:
        self._prompt_len = state.prompt_len.np  # [slots]
        self._prefill_len = state.prefill_len.np  # [slots] tokens fed at the latest (re)fill
        self._on_vacated = on_vacated
        self._arrived: tuple[int, list[int]] = (-1, [])
        self.streams: dict[int, SteeredStream] = {}
        self.sampled: dict[int, SteeredStream] = {}  # slot -> stream that chose a token in the last step
        self.stale_rows: dict[int, SteeredStream] = {}  # of the step: see ``rows``
        self.taken_back: list[int] = []  # rows of the step whose tokens shall not count; hooks.py sees to it
        # The one object that the runner's RequestState and our view of it share: hooks.py finds us by it.
        state.all_token_ids.costeer_slots = self

    def arrive(self, slot: int, output_ids: list[int]) -> None:
        """A request takes ``slot``; ``output_ids`` are what it generated before a preemption."""
        self._arrived = slot, output_ids

    def arrived_output(self, slot: int) -> list[int]:
        """What the request that has just taken ``slot`` generated before."""
        arrived, output_ids = self._arrived
        return output_ids if arrived == slot else []

    def vacate(self, slot: int) -> None:
        """The request in ``slot`` finished, was aborted or was preempted."""
        if slot in self.streams:
            self._on_vacated(slot)

    def take_taken_back(self, device: torch.device) -> torch.Tensor:
        """The rows whose tokens of this step shall not count, once: int64 [rows] on ``device``."""
        rows = torch.tensor(self.taken_back, dtype=torch.int64, pin_memory=device.type == "cuda")
        self.taken_back = []
        return rows.to(device, non_blocking=True)

    def rows(self, ctx: "LogitsContext") -> dict[int, SteeredStream]:
        """Logits row -> stream, for the rows whose token will be kept: a chunk of an unfinished prefill chooses none.

        A stale row was scheduled behind the end of a prefill before it was known that the prefill's token is taken back: the
        runner has not prepared its input anew, so its token is worth nothing, either, and what it writes to the cache is wrong
        until the end of the prefill is repeated. The scheduler puts no step there; this is for the case that it fails to.
        """
        rows, self.stale_rows = {}, {}
        for row, slot in enumerate(ctx.idx_mapping_np.tolist()):
            stream = self.streams.get(slot)
            if stream is None:
                continue
            length, filled = int(ctx.seq_lens_upper_bound_np[row]), int(self._prefill_len[slot])
            if stream.taken_back and length > filled == int(self._prompt_len[slot]) + stream.position:
                self.stale_rows[row] = stream
            elif length >= filled:
                rows[row] = stream
        return rows


class TokenReader:
    """Reads the tokens of the last step from the runner's device buffer, off the critical path where the device allows."""

    def __init__(self, state: "LogitsProcRequestState") -> None:
        self._all_token_ids = state.all_token_ids
        self._prompt_len = state.prompt_len.np  # [slots]
        self._streams: list[SteeredStream] = []
        self._tokens: torch.Tensor | None = None  # [streams] int32, on the host once the event has passed
        self._event: torch.cuda.Event | None = None

    @property
    def is_ready(self) -> bool:
        """Whether ``finish`` would return without waiting for a device."""
        return self._event is None

    def start(self, slots: Slots) -> None:
        """Enqueue the gather of every sampled slot's newest token: in stream order it is there by now, though not on the host."""
        self._streams = list(slots.sampled.values())
        index = [list(slots.sampled), [int(self._prompt_len[slot]) + s.position for slot, s in slots.sampled.items()]]
        slots.sampled = {}
        tokens = self._all_token_ids.gpu
        if tokens.device.type == "cpu":
            self._tokens = tokens[index[0], index[1]]
            return
        where = torch.tensor(index, pin_memory=True).to(tokens.device, non_blocking=True)
        chosen = tokens[where[0], where[1]]
        self._tokens = torch.empty(chosen.shape, dtype=chosen.dtype, pin_memory=True).copy_(chosen, non_blocking=True)
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record()

    def finish(self) -> Iterator[tuple[SteeredStream, int]]:
        """The streams and their newest tokens, once; waits for the device if it must."""
        if self._tokens is None:
            return
        if self._event is not None:
            self._event.synchronize()
        pairs = list(zip(self._streams, self._tokens.tolist(), strict=True))
        self._streams, self._tokens, self._event = [], None, None
        yield from pairs
