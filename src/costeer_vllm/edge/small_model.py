"""The small model: two rows per stream, with and without the private context, evaluated together and never twice.

A *row* is a sequence of ids and the number of them whose keys and values are cached (its ``length``). A *pair* is the two rows of
one stream. All cached keys and values lie in one arena per layer, a row of the arena per row. A *window* is one forward pass: the
ids of the chosen rows that are not cached yet, right-aligned, so that the last column is every row's newest id:

    tokens     [n, q]         pads on the left
    positions  [n, q]         of each token in its own row; pads have position 0
    mask       [n, 1, q, L]   additive: a query at position p sees key i if i <= p (and p - i < window where layers slide)

The mask knows only positions: what lies in the arena beyond a row's length is never seen, and going back is setting the length.
A new row starts from the longest cached prefix of any row that is open or is remembered: the private context, which stands at the
same place in every prompt, is evaluated once. Which closed rows are remembered, GreedyDual decides (Young, 1994): that one goes
which would save the fewest ids, and the value that it had is added to that of whatever is used later.
"""

import bisect
import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from costeer_vllm.edge.settings import DType
from costeer_vllm.errors import CoSteerError, InvalidParameter, Unsupported

PREFILL_TOKENS = 512  # per window: bounds how long the streams that only need their next token wait for a long prompt
STEP_TOKENS = 8  # per row: pairs with at most so many new ids are evaluated together
MAX_PADS = 32  # a pair whose rows differ by more new ids is brought nearer to level first: pads cost as much as ids
NUM_REMEMBERED = 8  # closed rows that stay as prefixes for later ones
MIN_REUSE = 4  # ids: below it, copying costs more than evaluating

_FIRST_CAPACITY = 256  # ids per row of the arena before it grows
_SPARE_CAPACITY = 256  # for the ids to be generated after a prompt
_ATTENTION = "costeer_grouped"

Ids: TypeAlias = npt.NDArray[np.int64]


class TooLong(CoSteerError):
    """A row would be longer than the small model's positions; the message has numbers only, none of the context."""


@dataclass(eq=False, slots=True)
class Row:
    """One sequence; ``ids[:length]`` are cached. Its ids are private and never shown."""

    index: int  # row of the arena
    ids: list[int] = field(repr=False)
    known: Ids = field(repr=False)  # ids that another row may start with: the prompt, of a closed row all
    length: int = 0
    value: int = 0  # of a remembered row: ids that it saves, on top of the value that was forgotten last

    @property
    def pending(self) -> int:
        return len(self.ids) - self.length


@dataclass(eq=False, slots=True)
class Pair:
    """The two rows of one stream; both end with the same ``num_generated`` ids."""

    with_context: Row
    without_context: Row
    num_generated: int = 0
    num_reused: int = 0  # ids of both prompts that were copied instead of evaluated

    @property
    def rows(self) -> tuple[Row, Row]:
        return self.with_context, self.without_context

    @property
    def pending(self) -> int:
        """New ids of the row that has more of them."""
        return max(self.with_context.pending, self.without_context.pending)

    @property
    def length(self) -> int:
        """Ids of the longer row."""
        return max(len(self.with_context.ids), len(self.without_context.ids))

    @property
    def gap(self) -> int:
        """How many more new ids the row with context has than the one without."""
        return self.with_context.pending - self.without_context.pending

    @property
    def is_ready(self) -> bool:
        """One window is enough for all that is new; otherwise ``prefill`` comes before ``step``."""
        return 2 * self.pending <= PREFILL_TOKENS and abs(self.gap) <= MAX_PADS

    @property
    def prompt_length(self) -> int:
        """Ids of the longer row before the first generated one."""
        return self.length - self.num_generated

    def agreement(self, keep: int, tokens: Sequence[int]) -> int:
        """How many of ``tokens`` stand behind the first ``keep`` generated ids already."""
        row = self.without_context
        start = len(row.ids) - self.num_generated + keep
        return next((i for i, token in enumerate(tokens) if row.ids[start + i : start + i + 1] != [token]), len(tokens))

    def rewrite(self, keep: int, tokens: Sequence[int]) -> None:
        """Keep the first ``keep`` generated ids and append ``tokens``; at least one id of each row is then to be evaluated.

        Where ``tokens`` agree with the ids that stood there, those stay cached.
        """
        same = self.agreement(keep, tokens)
        keep, tokens = keep + same, tokens[same:]
        drop = self.num_generated - keep
        assert drop >= 0
        for row in self.rows:
            if drop:
                del row.ids[-drop:]
            row.length = min(row.length, len(row.ids))
            row.ids.extend(tokens)
            row.length = min(row.length, len(row.ids) - 1)
        self.num_generated = keep + len(tokens)


@dataclass(slots=True)
class _Window:
    """Where one forward pass writes and reads."""

    write_rows: Tensor  # [n, q] rows of the arena; pads go to the trash row
    positions: Tensor  # [n, q]
    read_rows: slice | Tensor  # of length n; a slice, read in place, where the rows stand side by side
    length: int  # of the longest row after this pass


class Arena(Cache):  # type: ignore[misc]  # transformers is not typed here
    """Keys and values of all rows: per layer [rows, capacity, heads, head_dim]. Row 0 is trash: pads are written there.

    It is handed to the model as its cache. The model's own mask and length bookkeeping is not used: see the module's head.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.num_rows = 1
        self.capacity = _FIRST_CAPACITY
        self.window: _Window | None = None

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """Store a window's ``keys, values [n, heads, q, head_dim]``; return all that its rows hold, [n, heads, L, head_dim]."""
        window = self.window
        assert window is not None
        if layer_idx == len(self.keys):
            self.keys.append(self._zeros(keys))
            self.values.append(self._zeros(values))
        return _store(self.keys[layer_idx], keys, window), _store(self.values[layer_idx], values, window)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.window.length if self.window else 0

    def reserve(self, num_rows: int, capacity: int) -> None:
        """Grow to at least ``num_rows`` rows of ``capacity`` ids; memory that runs out on the way leaves a usable arena."""
        if num_rows <= self.num_rows and capacity <= self.capacity:
            return
        rows = max(self.num_rows, num_rows)
        length = self.capacity if capacity <= self.capacity else -(-max(capacity, self.capacity * 3 // 2) // 64) * 64
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                if old.shape[0] >= rows and old.shape[1] >= length:
                    continue  # grown by an attempt that failed later
                grown = old.new_zeros(max(rows, old.shape[0]), max(length, old.shape[1]), *old.shape[2:])
                grown[: old.shape[0], : old.shape[1]] = old
                tensors[layer] = grown
        self.num_rows, self.capacity = rows, length

    def copy(self, source: int, target: int, length: int) -> None:
        """The first ``length`` ids of row ``source`` become those of row ``target``."""
        for tensor in (*self.keys, *self.values):
            tensor[target, :length] = tensor[source, :length]

    def zero(self, row: int) -> None:
        """Forget what ``row`` holds: not-a-numbers would survive even a mask."""
        for tensor in (*self.keys, *self.values):
            tensor[row] = 0

    def shrink(self, rows: Sequence[int], capacity: int) -> None:
        """Keep only ``rows``, renumbered from 1, and ``capacity`` ids of each."""
        kept = torch.tensor([0, *rows], device=self.keys[0].device if self.keys else None)
        keys, values = ([old[:, :capacity].index_select(0, kept) for old in tensors] for tensors in (self.keys, self.values))
        self.keys, self.values = keys, values  # all or nothing, for the rows have other numbers now
        self.num_rows, self.capacity = len(kept), min(capacity, self.capacity)

    def _zeros(self, like: Tensor) -> Tensor:
        return like.new_zeros(self.num_rows, self.capacity, like.shape[1], like.shape[3])


def _store(arena: Tensor, new: Tensor, window: _Window) -> Tensor:
    arena[window.write_rows, window.positions] = new.transpose(1, 2)
    if isinstance(window.read_rows, slice):
        return arena[window.read_rows, : window.length].transpose(1, 2)
    return arena[:, : window.length].index_select(0, window.read_rows).transpose(1, 2)


class SmallModel:
    """A causal language model from a directory or a hub name, with the caches of all open pairs. One thread uses it."""

    def __init__(self, model: Any) -> None:
        """``model``: a transformers causal language model, in evaluation mode on its device; it is taken over.

        Raises:
            Unsupported: if its layers are not plain attention, or it does not give the same result in windows as at once.
        """
        config = model.config.get_text_config()
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self.num_tokens = int(model.get_input_embeddings().num_embeddings)
        self.max_positions = int(getattr(config, "max_position_embeddings", None) or 2**17)
        self._model, self._body = model, model.get_decoder()
        self._layer_kinds, self._sliding_window = _attention_of(config)
        self._arena = Arena()
        self._free: list[int] = []  # rows of the arena, the lowest last
        self._open: set[Pair] = set()
        self._remembered: dict[int, Row] = {}  # by row of the arena, the oldest first
        self._forgotten = 0  # the value of the row that was forgotten last
        self._zero = torch.zeros((), dtype=self.dtype, device=self.device)
        self._low = torch.full((), torch.finfo(self.dtype).min, dtype=self.dtype, device=self.device)
        self._keys = torch.arange(_FIRST_CAPACITY, device=self.device)
        count = 12 if self._sliding_window is None or self._sliding_window > 64 else self._sliding_window + 12
        sample = [(7 * i + 3) % self.num_tokens for i in range(count)]
        expected = self._log_probs_at_once(sample)
        if model.config._attn_implementation == "sdpa":
            AttentionInterface.register(_ATTENTION, grouped_attention)
            model.set_attn_implementation(_ATTENTION)
        self._check_exact(sample, expected)

    @classmethod
    def load(cls, name: str, dtype: DType = "auto", device: str = "auto", threads: int | None = None) -> "SmallModel":
        """Load ``name`` (a directory, or a name in the model hub).

        ``auto`` chooses the first device there is of cuda, mps and cpu, and the dtype bfloat16 on an accelerator and float32 on
        a CPU, where bfloat16 is slow without special instructions; ask for it to halve the memory.

        Raises:
            InvalidParameter: if there is no such model or device.
            Unsupported: if the model cannot be used.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        place = _choose_device(device)
        kind = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(dtype) or (
            torch.float32 if place.type == "cpu" else torch.bfloat16
        )
        try:
            config = AutoConfig.from_pretrained(name)
            softcapped = getattr(config.get_text_config(), "attn_logit_softcapping", None)  # only the eager code applies it
            chosen = {"attn_implementation": "eager"} if softcapped else {}
            model = AutoModelForCausalLM.from_pretrained(name, dtype=kind, **chosen)
        except (OSError, ValueError, KeyError) as error:
            raise InvalidParameter("model", name, f"the name or directory of a causal language model ({error})") from None
        return cls(model.to(place).eval())

    # --- pairs ---

    @torch.inference_mode()
    def open(self, with_ids: Sequence[int], without_ids: Sequence[int]) -> Pair:
        """A new pair of which nothing is evaluated yet.

        Raises:
            TooLong: if a prompt leaves no position to generate at.
        """
        longest = max(len(with_ids), len(without_ids))
        if longest >= self.max_positions:
            raise TooLong(f"a query of {len(without_ids)} tokens and the private context do not fit into the small model's "
                          f"{self.max_positions} positions")  # fmt: skip
        self._make_room(longest)
        with_context, without_context = (
            Row(self._free.pop(), list(ids), np.array(ids, dtype=np.int64)) for ids in (with_ids, without_ids)
        )
        pair = Pair(with_context, without_context)
        self._open.add(pair)
        return pair

    @torch.inference_mode()
    def reuse(self, pair: Pair) -> None:
        """Copy the longest cached prefixes into the rows that have none: to be called as late as can be, before a window."""
        for row in pair.rows:
            if not row.length:
                self._reuse_prefix(row)
                pair.num_reused += row.length

    @torch.inference_mode()
    def close(self, pair: Pair) -> None:
        """Free the pair; its rows stay as prefixes for later ones until newer ones take their place."""
        self._open.discard(pair)
        for row in pair.rows:
            row.known = np.array(row.ids[: row.length], dtype=np.int64)
            row.ids = []
            others = (_shared_prefix(row.known, other.known) for other in self._remembered.values())
            row.value = self._forgotten + row.length - max(others, default=0)
            self._remembered[row.index] = row
        while len(self._remembered) > NUM_REMEMBERED:
            least = min(self._remembered.values(), key=operator.attrgetter("value"))
            self._forgotten = least.value
            self._release(self._remembered.pop(least.index).index)
        if not self._open and self._arena.num_rows > 2 * NUM_REMEMBERED + 1:
            self._shrink()

    @torch.inference_mode()
    def discard(self, pair: Pair) -> None:
        """Free the pair and wipe its rows: for one whose evaluation failed."""
        self._open.discard(pair)
        for row in pair.rows:
            self._release(row.index)
        self.wipe(pair)

    @torch.inference_mode()
    def wipe(self, pair: Pair) -> None:
        """Forget what is cached of an open pair: all of it will be evaluated again."""
        for row in pair.rows:
            self._arena.zero(row.index)
            row.length = 0

    @torch.inference_mode()
    def prefill(self, pair: Pair) -> None:
        """Evaluate one window of at most PREFILL_TOKENS ids, and never the last id of a row, towards ``pair.is_ready``."""
        if pair.gap:
            row = pair.with_context if pair.gap > 0 else pair.without_context
            parts = [(row, min(PREFILL_TOKENS, abs(pair.gap)))]
        else:
            parts = [(row, min(PREFILL_TOKENS // 2, row.pending - 1)) for row in pair.rows]
        self._run(self._body, parts)

    @torch.inference_mode()
    def step(self, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
        """Evaluate all new ids of ready pairs in one window; in place where the pairs come in the order of their rows.

        Returns:
            The log-probabilities of the next id with and without context, both float32 [pairs, logits].
        """
        parts = [(row, row.pending) for pair in pairs for row in pair.rows]
        assert all(count for _, count in parts)
        logits = self._run(self._model, parts, logits_to_keep=1).logits[:, -1]
        log_probs = torch.log_softmax(logits.float(), dim=-1)
        return log_probs[0::2], log_probs[1::2]

    # --- windows ---

    def _run(self, module: Any, parts: list[tuple[Row, int]], **kwargs: object) -> Any:
        """One forward pass over the next ``count`` ids of each row; the rows are that much longer afterwards, or unchanged."""
        longest = max(row.length + count for row, count in parts)
        self._arena.reserve(0, longest)
        tokens, window = self._window(parts, longest)
        self._arena.window = window
        output = module(
            input_ids=tokens,
            attention_mask=self._masks(window),
            position_ids=window.positions,
            past_key_values=self._arena,
            use_cache=True,
            **kwargs,
        )
        for row, count in parts:
            row.length += count
        return output

    def _window(self, parts: list[tuple[Row, int]], longest: int) -> tuple[Tensor, _Window]:
        width = max(count for _, count in parts)
        tokens, rows, positions = [], [], []
        for row, count in parts:
            pads = [0] * (width - count)
            tokens += pads + row.ids[row.length : row.length + count]
            rows += pads + [row.index] * count
            positions += pads
            positions += range(row.length, row.length + count)
        packed = torch.tensor([tokens, rows, positions]).view(3, len(parts), width).to(self.device)
        first = parts[0][0].index
        read: slice | Tensor = slice(first, first + len(parts))
        if any(row.index != first + i for i, (row, _) in enumerate(parts)):
            read = torch.tensor([row.index for row, _ in parts], device=self.device)
        return packed[0], _Window(packed[1], packed[2], read, longest)

    def _masks(self, window: _Window) -> Tensor | dict[str, Tensor]:
        if len(self._keys) < window.length:
            self._keys = torch.arange(self._arena.capacity, device=self.device)
        keys, queries = self._keys[: window.length], window.positions[:, None, :, None]
        seen = keys <= queries
        full = torch.where(seen, self._zero, self._low)
        if self._sliding_window is None:
            return full
        sliding = torch.where(seen & (keys > queries - self._sliding_window), self._zero, self._low)
        masks = {"full_attention": full, "sliding_attention": sliding}
        # Models whose layers are all alike take one mask; not all of them understand a mapping.
        return masks if len(self._layer_kinds) > 1 else masks[next(iter(self._layer_kinds))]

    # --- rows of the arena ---

    def _make_room(self, length: int) -> None:
        """At least two free rows, and ``length`` ids in every row; some more than asked for, for the ids to come."""
        arena, rows = self._arena, self._arena.num_rows
        capacity = length if length <= arena.capacity else min(length + _SPARE_CAPACITY, self.max_positions)
        arena.reserve(rows if len(self._free) >= 2 else rows + max(2, rows // 2), capacity)
        self._free[:0] = range(arena.num_rows - 1, rows - 1, -1)

    def _release(self, row: int) -> None:
        bisect.insort(self._free, row, key=operator.neg)

    def _reuse_prefix(self, row: Row) -> None:
        """Copy the longest prefix of ``row`` that another row holds; its last id is always left to be evaluated."""
        wanted = np.array(row.ids[:-1], dtype=np.int64)
        best, length = None, MIN_REUSE - 1
        opened = (other for pair in self._open for other in pair.rows)
        for other in itertools.chain(opened, self._remembered.values()):
            shared = _shared_prefix(wanted, other.known[: other.length])
            if shared > length:
                best, length = other, shared
        if best is None:
            return
        self._arena.copy(best.index, row.index, length)
        row.length = length
        if best.index in self._remembered:
            best.value = self._forgotten + length

    def _shrink(self) -> None:
        """After a burst: keep the remembered rows only."""
        rows = list(self._remembered.values())
        self._arena.shrink([row.index for row in rows], max([_FIRST_CAPACITY, *(row.length for row in rows)]))
        for index, row in enumerate(rows, start=1):
            row.index = index
        self._remembered = {row.index: row for row in rows}
        self._free = []

    # --- start-up ---

    @torch.inference_mode()
    def _log_probs_at_once(self, ids: list[int]) -> Tensor:
        logits = self._model(input_ids=torch.tensor([ids], device=self.device), use_cache=False).logits[0, -1]
        return torch.log_softmax(logits.float(), dim=-1)

    @torch.inference_mode()
    def _check_exact(self, sample: list[int], expected: Tensor) -> None:
        """Evaluate ``sample`` in windows too: a model that keeps its past elsewhere than in the arena fails here."""
        try:
            pair = self.open(sample[:-3], sample[:1])
            self.prefill(pair)
            self.step([pair])
            pair.rewrite(0, sample[-3:])
            found = self.step([pair])[0][0]
            self.discard(pair)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise Unsupported(f"costeer: this small model cannot be evaluated step by step ({reason})") from error
        off = (found - expected).abs().max().item()
        if not off <= (0.05 if self.dtype == torch.bfloat16 else 1e-3) * (1 + (expected.max() - expected.min()).item()):
            raise Unsupported(f"costeer: this small model gives other results step by step than at once (by {off:.3g} nats); "
                              "only models whose layers are plain attention, full or sliding, can be used")  # fmt: skip


def grouped_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' ``sdpa`` without copying keys and values once per query head.

    ``query [n, heads, q, head_dim]``, ``key, value [n, kv_heads, L, head_dim]``, additive ``attention_mask [n, 1, q, L]``. The
    heads that share a key are, for a single query, a window of queries.
    """
    n, heads, q, head_dim = query.shape
    groups = heads // key.shape[1]
    if attention_mask is None or (q > 1 and query.device.type != "cpu"):
        attended: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return attended
    if q > 1:
        output = scaled_dot_product_attention(query, key, value, attention_mask, scale=scaling, enable_gqa=groups > 1)
        return output.transpose(1, 2).contiguous(), None
    output = scaled_dot_product_attention(
        query.view(n, -1, groups, head_dim), key, value, attention_mask.expand(n, 1, groups, -1), scale=scaling
    )
    return output.reshape(n, 1, heads, -1), None


def _shared_prefix(a: Ids, b: Ids) -> int:
    count = min(len(a), len(b))
    different = np.flatnonzero(a[:count] != b[:count])
    return int(different[0]) if len(different) else count


def _attention_of(config: Any) -> tuple[set[str], int | None]:
    """The kinds of attention layers and the window of the sliding ones, if any.

    Raises:
        Unsupported: on layers that are neither full nor sliding attention.
    """
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", None) is False:
        window = None
    kinds = set(getattr(config, "layer_types", None) or (["sliding_attention"] if window else ["full_attention"]))
    other = kinds - {"full_attention", "sliding_attention"}
    if other:
        raise Unsupported(f"costeer: {config.model_type} has layers of the kind {', '.join(sorted(other))}; "
                          "only models whose layers are plain attention, full or sliding, can be used")  # fmt: skip
    return kinds, window if "sliding_attention" in kinds else None


def _choose_device(device: str) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError):
        raise InvalidParameter("device", device, "auto, cpu, or an accelerator that this PyTorch can use") from None
