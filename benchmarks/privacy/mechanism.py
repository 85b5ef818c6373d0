"""Answers as edge fusion draws them, and how likely every candidate context would have made each of their tokens.

The small model reads all candidates and the query alone in one batch, so what the device computes and what the attacker computes
is the same to the last bit. That is the attacker's best case.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.privacy.cases import Case
from benchmarks.privacy.reader import Reader, prompts_of
from benchmarks.privacy.suspects import Floats, Suspects
from costeer_vllm.candidates import BasePolicy, decode_candidates, encode_candidates
from costeer_vllm.delta import finite
from costeer_vllm.demo.scores import Pair
from costeer_vllm.demo.task import Row
from costeer_vllm.edge.disclosure import Disclosure
from costeer_vllm.engine.offers import base_policies
from costeer_vllm.offline import end_ids
from costeer_vllm.protocol.messages import Sampling

TOP_K = 64


@dataclass(frozen=True, slots=True)
class Setting:
    """How answers are drawn: of the sampling parameters, ``temperature`` and ``max_bits`` are heeded."""

    strength: float
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class Transcript:
    """One answer, and what the attacker makes of its tokens."""

    row: Row  # the true one
    case: Case
    truth: int  # index of the true context among the case's
    tokens: list[int]
    log_q: Floats  # [tokens, contexts] nats: of each token, had the context been the true one
    bits: Floats  # [tokens] the device's ledger after each token


@torch.inference_mode()
def transcripts(
    pair: Pair,
    cases: Sequence[Case],
    setting: Setting,
    samples: int,
    max_tokens: int,
    rng: np.random.Generator,
    one_more: Callable[[], None] = lambda: None,
) -> list[Transcript]:
    """``samples`` answers for each context of each case, in one batch; the cases have equally many contexts.

    ``rng`` is the device's secret. ``one_more`` is called after every token.
    """
    num_contexts = len(cases[0].rows)
    copies = num_contexts * samples
    with_and_without = [[prompts_of(row, pair.tokenizer) for row in case.rows] for case in cases]
    large = Reader(pair.large, [rows[0][1] for rows in with_and_without], copies)
    small = Reader(pair.small, [p for rows in with_and_without for p in (*(row[0] for row in rows), rows[0][1])], copies)
    case_of = np.repeat(np.arange(len(cases)), copies)
    truth = np.tile(np.repeat(np.arange(num_contexts), samples), len(cases))
    ends = end_ids(pair.large)
    ledgers = [Disclosure(setting.sampling.max_bits) for _ in truth]
    suspects = Suspects.of(len(truth), num_contexts)
    tokens = np.zeros((max_tokens, len(truth)), np.int64)
    log_q = np.zeros((max_tokens, len(truth), num_contexts))
    bits = np.zeros((max_tokens, len(truth)))
    lengths = np.full(len(truth), max_tokens)
    is_open = np.ones(len(truth), bool)
    for step in range(max_tokens):
        rows = np.flatnonzero(is_open)
        bases = [_shown(base) for base in base_policies(large.log_probs, [TOP_K] * len(truth))]
        log_probs = small.log_probs.view(len(cases), num_contexts + 1, copies, -1).transpose(1, 2).flatten(0, 1).numpy()
        deltas = np.stack([_deltas(log_probs[row], bases[row]) for row in rows])  # [open, contexts, k]
        for delta, row in zip(deltas, rows, strict=True):
            drawn = ledgers[row].draw(bases[row], delta[truth[row]], setting.strength, setting.sampling, rng.random())
            tokens[step, row], bits[step, row] = drawn.token, ledgers[row].bits
        chosen = np.array([np.searchsorted(bases[row].ids, tokens[step, row]) for row in rows])
        scores = np.stack([bases[row].log_probs for row in rows])
        log_q[step, rows] = suspects.heard(rows, scores, deltas, chosen, setting.strength, setting.sampling)
        assert np.allclose(suspects.bits[rows, truth[rows]], bits[step, rows], atol=1e-6), "the attacker's ledger is another one"
        is_open[rows] = ~np.isin(tokens[step, rows], ends)
        lengths[rows[~is_open[rows]]] = step + 1
        one_more()
        if not is_open.any():
            break
        newest = torch.from_numpy(tokens[step])
        large.read(newest)
        small.read(newest.view(len(cases), 1, copies).expand(-1, num_contexts + 1, -1).reshape(-1))
    return [
        Transcript(
            row=cases[case_of[i]].rows[truth[i]],
            case=cases[case_of[i]],
            truth=int(truth[i]),
            tokens=tokens[: lengths[i], i].tolist(),
            log_q=log_q[: lengths[i], i],
            bits=bits[: lengths[i], i],
        )
        for i in range(len(truth))
    ]


def _shown(base: BasePolicy | None) -> BasePolicy:
    """What reaches the device of the engine's base policy."""
    assert base is not None, "a base policy that is not a number"
    return decode_candidates(encode_candidates(base))


def _deltas(log_probs: npt.NDArray[np.float32], base: BasePolicy) -> npt.NDArray[np.float32]:
    """``log_probs [contexts + 1, vocab]``, the last without context -> [contexts, k]."""
    return finite(log_probs[:-1, base.ids] - log_probs[-1, base.ids])
