"""The paper's Algorithm 1 as one process runs it: batch of one, every model after the other, T iterations per token.

The same tokens as ``demo/algorithm1.py``, which is the exactness reference in float64; here Eq. 7 is iterated in float32, as fast
as this form allows, and every part is timed.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from costeer_vllm.steering import SteeringParams


@dataclass(frozen=True, slots=True)
class SerialRun:
    """The ids generated and where the time went; seconds, each over all tokens."""

    ids: list[int]
    prompts_s: float  # all three prompts
    large_s: float
    small_s: float  # both small forwards
    iterations_s: float

    def tokens_per_s(self, num_tokens: int) -> float:
        """As for a generation of ``num_tokens``: the prompts once, and every token as long as those measured."""
        per_token_s = (self.large_s + self.small_s + self.iterations_s) / len(self.ids)
        return num_tokens / (self.prompts_s + num_tokens * per_token_s)


@torch.inference_mode()
def serial_loop(
    large: Any,
    small: Any,
    base_ids: Sequence[int],
    with_ids: Sequence[int],
    without_ids: Sequence[int],
    params: SteeringParams,
    num_tokens: int,
) -> SerialRun:
    """``num_tokens`` ids, greedily, past any end of sequence. The models and prompts are those of ``algorithm1``."""
    start = time.perf_counter()
    base, with_context, without_context = _Reader(large, base_ids), _Reader(small, with_ids), _Reader(small, without_ids)
    prompts_s = time.perf_counter() - start
    ids: list[int] = []
    large_s = small_s = iterations_s = 0.0
    while len(ids) < num_tokens:
        start = time.perf_counter()
        ids.append(int(iterate(base.log_probs, with_context.log_probs - without_context.log_probs, params).argmax()))
        chosen = time.perf_counter()
        base.read(ids[-1:])
        read = time.perf_counter()
        with_context.read(ids[-1:])
        without_context.read(ids[-1:])
        iterations_s += chosen - start
        large_s += read - chosen
        small_s += time.perf_counter() - read
    return SerialRun(ids, prompts_s, large_s, small_s, iterations_s)


def iterate(base: torch.Tensor, delta: torch.Tensor, params: SteeringParams) -> torch.Tensor:
    """log pi_T of Eq. 7 [vocab], all T iterations over the whole vocabulary; ``base``: log pi_0, ``delta``, both [vocab]."""
    alpha, beta, player_lambda, eta = params.alpha, params.beta, params.player_lambda, params.eta
    log_pi, sum_u = base, torch.zeros_like(base)
    for t in range(1, params.T + 1):
        sum_u += alpha * (log_pi - base) + beta * delta
        log_pi = (sum_u + t * player_lambda * base + log_pi / eta) / (t * player_lambda + 1 / eta)
        log_pi = log_pi.log_softmax(-1)
    return log_pi


class _Reader:
    """A model and the prefix it has read; ``log_probs`` are those of the next token, float32 [vocab]."""

    def __init__(self, model: Any, prompt_ids: Sequence[int]) -> None:
        self.model = model
        self.cache: Any = None
        self.read(prompt_ids)

    def read(self, ids: Sequence[int]) -> None:
        tokens = torch.tensor([list(ids)], device=self.model.device)
        output = self.model(input_ids=tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = output.past_key_values
        self.log_probs = output.logits[0, -1].float().log_softmax(-1)
        if self.log_probs.is_cuda:
            torch.cuda.synchronize()  # the clock is the host's
