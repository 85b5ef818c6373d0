"""Policies read in one batch: prompts once, then one token per row and step."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from costeer_vllm.demo.task import Row
from costeer_vllm.edge.prompts import Surround, prompts
from costeer_vllm.protocol.messages import Query, Turn


def prompts_of(row: Row, tokenizer: Any) -> tuple[list[int], list[int]]:
    """The row's prompt ids with and without context, as the edge worker makes them."""
    return prompts(Query(messages=[Turn(**message) for message in row.messages]), Surround(f"{row.context}\n\n"), tokenizer)


def left_padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids and mask, both ``[rows, longest]``."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


class Reader:
    """``copies`` rows of each prompt, side by side; ``log_probs`` float32 [rows, vocab] are those of the next token."""

    log_probs: Tensor
    _cache: Any = None  # keys and values

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], copies: int = 1) -> None:
        self._model = model
        ids, self._mask = left_padded(prompts)
        self._forward(ids, (self._mask.cumsum(-1) - 1).clamp(min=0))
        self._cache.batch_repeat_interleave(copies)
        self._mask = self._mask.repeat_interleave(copies, dim=0)
        self.log_probs = self.log_probs.repeat_interleave(copies, dim=0)

    def read(self, tokens: Tensor) -> None:
        """Append ``tokens [rows]``."""
        self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], dim=-1)
        self._forward(tokens[:, None], self._mask.sum(-1, keepdim=True) - 1)

    def _forward(self, ids: Tensor, positions: Tensor) -> None:
        output = self._model(
            input_ids=ids,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._cache = output.past_key_values
        self.log_probs = output.logits[:, -1].float().log_softmax(-1)
