"""Edge fusion in the engine: the base policy's likeliest tokens, as they are shown to the edge worker that chooses."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from costeer_vllm.candidates import BasePolicy


def base_policies(logits: Tensor, counts: Sequence[int]) -> list[BasePolicy | None]:
    """The ``counts[i]`` likeliest tokens of row i of ``logits [n, vocab]``; fewer where a grammar allows fewer, None for NaN."""
    values, ids = logits.topk(min(max(counts), logits.shape[-1]), dim=-1)
    log_probs = values - logits.logsumexp(-1, keepdim=True)
    host = torch.stack([ids.double(), log_probs.double()]).cpu()  # one copy, one wait; ids are exact in float64
    return [_base_policy(host[:, row, :count]) for row, count in enumerate(counts)]


def _base_policy(likeliest: Tensor) -> BasePolicy | None:
    """``likeliest [2, k]``: ids and log-probabilities."""
    ids, log_probs = likeliest[:, likeliest[1].isfinite()]
    if not len(ids):
        return None
    order = ids.argsort()
    left = (1 - log_probs.exp().sum()).clamp(0, 1)
    return BasePolicy(ids[order].long().numpy(), log_probs[order].numpy(), float(left))


@dataclass(frozen=True, slots=True)
class Penalties:
    """Those of a request, where the runner applies them only after the logits processors (V1)."""

    prompt_ids: Sequence[int]
    repetition: float  # 1: none
    frequency: float  # 0: none
    presence: float  # 0: none

    @property
    def is_neutral(self) -> bool:
        """Whether they change nothing."""
        return (self.repetition, self.frequency, self.presence) == (1, 0, 0)

    def applied(self, logits: Tensor, output_ids: Sequence[int]) -> Tensor:
        """A copy of ``logits [vocab]`` with them, as vLLM and OpenAI define them."""
        logits = logits.clone()
        known = [token for token in {*self.prompt_ids, *output_ids} if 0 <= token < len(logits)]
        seen = torch.tensor(known, dtype=torch.int64, device=logits.device)
        logits[seen] = torch.where(logits[seen] > 0, logits[seen] / self.repetition, logits[seen] * self.repetition)
        counts = torch.bincount(torch.tensor(output_ids, dtype=torch.int64), minlength=len(logits)).to(logits.device)
        logits -= self.frequency * counts + self.presence * (counts > 0)
        return logits
