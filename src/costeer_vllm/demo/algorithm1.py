"""The paper's Algorithm 1, written out: T iterations per token, nothing collapsed. The exactness reference, not the hot path.

Symbols as in the paper; every policy is kept as float64 log-probabilities in nats.
"""

from collections.abc import Sequence
from typing import Any

import torch

from costeer_vllm.offline import end_ids
from costeer_vllm.steering import SteeringParams


def personalize(base: torch.Tensor, delta: torch.Tensor, params: SteeringParams) -> torch.Tensor:
    """log pi_T of Eq. 7, float64 [..., vocab].

    ``base`` is log pi_0, the large model's log-probabilities [..., vocab]; ``delta`` is the small model's, with minus without
    context [..., vocab]. Iteration t is the closed-form maximizer of Eq. 6 over the whole vocabulary.
    """
    alpha, beta, player_lambda, eta = params.alpha, params.beta, params.player_lambda, params.eta
    log_pi_0 = base.double().log_softmax(-1)
    log_pi = log_pi_0
    sum_u = torch.zeros_like(log_pi_0)
    for t in range(1, params.T + 1):
        sum_u = sum_u + alpha * (log_pi - log_pi_0) + beta * delta.double()  # u_{t-1}, so that sum_u = sum_{i<t} u_i
        log_pi = (sum_u + t * player_lambda * log_pi_0 + log_pi / eta) / (t * player_lambda + 1 / eta)
        log_pi = log_pi.log_softmax(-1)
    return log_pi


class Policy:
    """A model and the prefix it has read: ``log_probs`` are those of the next token, float64 [vocab], nats."""

    def __init__(self, model: Any, prompt_ids: Sequence[int]) -> None:
        self.model = model
        self.cache: Any = None
        self.read(prompt_ids)

    @torch.inference_mode()
    def read(self, ids: Sequence[int]) -> None:
        tokens = torch.tensor([list(ids)], device=self.model.device)
        output = self.model(input_ids=tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = output.past_key_values
        self.log_probs = output.logits[0, -1].double().log_softmax(-1)


def algorithm1(
    large: Any,
    small: Any,
    base_ids: Sequence[int],
    with_ids: Sequence[int],
    without_ids: Sequence[int],
    params: SteeringParams,
    max_new_tokens: int,
    num_candidates: int | None = None,
) -> list[int]:
    """The ids generated greedily by Algorithm 1, the end-of-sequence id included if it was reached.

    ``large`` and ``small`` are transformers models over one vocabulary. The three prompts are token ids: the query for the large
    model, the query with the private context for the small one, the query without it for the small one. ``num_candidates``: the
    base policy is cut to so many tokens, its likeliest, as in edge fusion.
    """
    base, with_context, without_context = Policy(large, base_ids), Policy(small, with_ids), Policy(small, without_ids)
    s: list[int] = []
    while len(s) < max_new_tokens:
        delta = with_context.log_probs - without_context.log_probs
        ids = base.log_probs.topk(num_candidates or len(base.log_probs)).indices
        s.append(int(ids[personalize(base.log_probs[ids], delta[ids], params).argmax()]))
        if s[-1] in end_ids(large):
            break
        for policy in (base, with_context, without_context):
            policy.read(s[-1:])
    return s
