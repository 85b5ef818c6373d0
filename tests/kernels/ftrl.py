"""Algorithm 1 of the paper written out: T iterations of Eq. 7 over the whole vocabulary, in float64."""

import torch
from torch import Tensor

from costeer_vllm.steering import SteeringParams


def personalized_log_policy(base_logits: Tensor, delta: Tensor, params: SteeringParams) -> Tensor:
    """log pi_T ``[rows, vocab]`` in nats for ``base_logits [rows, vocab]`` and ``delta [rows, vocab]``."""
    base = base_logits.double().log_softmax(-1)
    delta = delta.double()
    log_policy = base  # log pi_0
    utilities = torch.zeros_like(base)  # u_0 + ... + u_{t-1}
    for t in range(1, params.T + 1):
        utilities = utilities + params.alpha * (log_policy - base) + params.beta * delta
        pull = t * params.player_lambda
        inertia = 1.0 / params.eta
        log_policy = ((utilities + pull * base + inertia * log_policy) / (pull + inertia)).log_softmax(-1)
    return log_policy
