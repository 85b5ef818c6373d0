"""What edge fusion misses: its candidates are the base policy's k likeliest tokens, and cloud fusion has the whole vocabulary."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.privacy.reader import Reader, prompts_of
from costeer_vllm.demo.scores import Pair
from costeer_vllm.demo.task import Row
from costeer_vllm.kernels import DenseDeltas, steer_inplace
from costeer_vllm.offline import end_ids
from costeer_vllm.steering import SteeringParams

TOP_KS = (4, 8, 16, 32, 64, 128, 256)
ITERATIONS = (1, 20)


@dataclass(frozen=True, slots=True)
class Outside:
    """Over the tokens of cloud fusion's greedy answers, the ends included."""

    T: int
    top_k: int
    num_tokens: int
    num_greedy: int  # tokens that are not among the k candidates
    mass: float  # of the personalized policy outside the k candidates at temperature 1, mean
    most_mass: float  # at the worst token


@torch.inference_mode()
def outside(pair: Pair, rows: Sequence[Row], T: int, max_tokens: int, one_more: Callable[[], None]) -> list[Outside]:
    """How much is outside the top k, for every k of TOP_KS."""
    with_context, without = zip(*(prompts_of(row, pair.tokenizer) for row in rows), strict=True)
    base, *small = Reader(pair.large, without), Reader(pair.small, with_context), Reader(pair.small, without)
    strength = torch.full((len(rows),), SteeringParams(T=T).strength)
    ends = torch.tensor(end_ids(pair.large))
    is_open = torch.ones(len(rows), dtype=torch.bool)
    ranks, masses = [], []
    for _ in range(max_tokens):
        personalized = base.log_probs.clone()
        steer_inplace(personalized, torch.arange(len(rows)), strength, DenseDeltas(small[0].log_probs - small[1].log_probs))
        chosen = personalized.argmax(-1)
        order = base.log_probs.argsort(-1, descending=True)
        ranks.append((order == chosen[:, None]).int().argmax(-1)[is_open])
        mass = (
            personalized.double().softmax(-1).gather(-1, order).flip(-1).cumsum(-1).flip(-1)
        )  # [:, k]: what is outside the top k
        masses.append(mass[:, TOP_KS][is_open])
        is_open &= ~torch.isin(chosen, ends)
        one_more()
        if not is_open.any():
            break
        for reader in (base, *small):
            reader.read(chosen)
    rank, mass = torch.cat(ranks), torch.cat(masses)
    return [
        Outside(T, k, len(rank), int((rank >= k).sum()), mass[:, i].mean().item(), mass[:, i].max().item())
        for i, k in enumerate(TOP_KS)
    ]
