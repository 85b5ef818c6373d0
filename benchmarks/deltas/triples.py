"""Triples: what the large model and the small one, with and without context, say at one position; the demo pair or made up."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from costeer_vllm.demo.algorithm1 import Policy
from costeer_vllm.demo.scores import Pair
from costeer_vllm.demo.task import Row
from costeer_vllm.edge.prompts import Surround, prompts
from costeer_vllm.offline import end_ids
from costeer_vllm.protocol.messages import Query, Turn

LogProbs: TypeAlias = npt.NDArray[np.float32]  # [vocab], nats

MAX_NEW_TOKENS = 100


@dataclass(frozen=True, slots=True)
class Triple:
    """The three rows of one position, each float32 ``[vocab]`` in nats."""

    base: LogProbs
    with_context: LogProbs
    without_context: LogProbs


def of_the_demo_pair(pair: Pair, rows: Sequence[Row], strengths: Sequence[float]) -> Iterator[Triple]:
    """Every position of the greedily steered answers to ``rows``, each row steered by the next of ``strengths`` in turn."""
    for index, row in enumerate(rows):
        query = Query(messages=[Turn(**message) for message in row.messages])
        with_ids, without_ids = prompts(query, Surround(f"{row.context}\n\n"), pair.tokenizer)
        told: list[tuple[Any, Sequence[int]]] = [(pair.large, without_ids), (pair.small, with_ids), (pair.small, without_ids)]
        yield from _answer(told, strengths[index % len(strengths)], end_ids(pair.large))


def _answer(told: Sequence[tuple[Any, Sequence[int]]], strength: float, ends: Sequence[int]) -> Iterator[Triple]:
    policies = [Policy(model, ids) for model, ids in told]
    for _ in range(MAX_NEW_TOKENS):
        base, with_context, without_context = (policy.log_probs for policy in policies)
        yield Triple(*(row.to(torch.float32).numpy() for row in (base, with_context, without_context)))
        token = int((base + strength * (with_context - without_context)).argmax())
        if token in ends:
            return
        for policy in policies:
            policy.read([token])


# How peaked positions are: a share of them, and the exponent of its rank-frequency law. At 152k the first leaves 13 % of its mass
# behind its 500 likeliest tokens, the second 1 %, the third 1e-6.
KINDS = ((0.2, 1.3), (0.35, 1.7), (0.45, 3.0))
NOISE = 0.4  # nats, scale of the Laplace noise on every logit of either model
BULK = {"spread": 0.7, "context": (0.1, 0.3, 0.6)}  # nats: of all models alike; of what a context does to every token
BOOSTED, BOOST = 12, 3.0  # tokens that a context speaks of; nats, mean of an exponential


def neural_like(vocab: int, num: int, seed: int = 0) -> Iterator[Triple]:
    """``num`` made-up positions: peaked and flat, every logit noisy, heavy tails, some tokens boosted by the context."""
    rng = np.random.default_rng(seed)
    shares, exponents = zip(*KINDS, strict=True)
    for _ in range(num):
        rank = rng.permutation(vocab)
        truth = -rng.choice(exponents, p=shares) * np.log(rank + 1.0) + rng.normal(0, BULK["spread"], vocab)
        large, small = (truth + rng.laplace(0, NOISE, vocab) for _ in range(2))
        moved = rng.choice(BULK["context"]) * rng.normal(0, 1, vocab)
        # Half of what the context speaks of is likely without it too, half is any token.
        likely = np.argsort(rank)[rng.integers(0, 200, BOOSTED // 2)]
        moved[np.append(likely, rng.integers(0, vocab, BOOSTED // 2))] += rng.exponential(BOOST, BOOSTED)
        yield Triple(*(log_softmax(row) for row in (large, small + moved, small)))


def log_softmax(logits: npt.NDArray[np.float64]) -> LogProbs:
    shifted = logits - logits.max()
    row: LogProbs = (shifted - np.log(np.exp(shifted).sum())).astype(np.float32)
    return row
