"""The server's guesses: from tokens by Bayes' rule, from deltas by comparing payloads.

Tokens: the posterior of context c after the tokens y_1 .. y_n is proportional to prod_t q_c(y_t), where q_c is what the device
would have drawn with, budget included. This is exact, so no other attacker does better with the same knowledge.

Deltas: every candidate's own payloads are made, and the one nearest to what was sent is guessed. Payloads that are equal byte for
byte have distance 0.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.privacy.reader import left_padded
from benchmarks.privacy.suspects import Floats, log_softmax
from costeer_vllm.delta import SparseDelta, decode, encode_lossless, encode_sparse
from costeer_vllm.steering import SteeringParams

LogProbs = npt.NDArray[np.float32]
Encode = Callable[[LogProbs, LogProbs], bytes]  # log-probabilities [vocab] with and without context -> payload

CHANNELS: dict[str, Encode] = {
    "sparse": lambda with_context, without_context: encode_sparse(with_context, without_context, SteeringParams().strength),
    "full": lambda with_context, without_context: encode_lossless(with_context - without_context),
}


def posteriors(log_q: Floats) -> Floats:
    """log q ``[tokens, contexts]`` of the single tokens -> posterior after each of them, ``[tokens, contexts]``."""
    return np.asarray(np.exp(log_softmax(np.cumsum(log_q, axis=0))))


@torch.inference_mode()
def along(model: Any, prompts: Sequence[Sequence[int]], tokens: Sequence[int]) -> LogProbs:
    """Log-probabilities ``[prompts, tokens, vocab]`` before each of ``tokens``, which follow every prompt."""
    ids, mask = left_padded([[*prompt, *tokens[:-1]] for prompt in prompts])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    output = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=len(tokens))
    log_probs: LogProbs = output.logits.float().log_softmax(-1).numpy()
    return log_probs


def payloads(log_probs: LogProbs, encode: Encode) -> list[list[bytes]]:
    """``[contexts + 1, tokens, vocab]``, the last without context -> the payloads of each context, one per token."""
    *with_context, without = log_probs
    return [[encode(*rows) for rows in zip(context, without, strict=True)] for context in with_context]


def distances(sent: Sequence[bytes], suspected: Sequence[Sequence[bytes]], vocab_size: int) -> Floats:
    """``[tokens, contexts]``: how far each candidate's payloads are from those that were sent, added up over the tokens.

    Mean absolute differences over the vocabulary, nats, and a little for not being equal. The median difference is taken off
    first: a constant on a row is nothing to the softmax, and it is what another arithmetic gets most wrong.
    """
    single = np.zeros((len(sent), len(suspected)))
    for step, payload in enumerate(sent):
        seen = _dense(payload, vocab_size)
        for context, own in enumerate(suspected):
            if own[step] != payload:
                difference = _dense(own[step], vocab_size) - seen
                single[step, context] = np.abs(difference - np.median(difference)).mean() + 1e-12
    return np.cumsum(single, axis=0)


def _dense(payload: bytes, vocab_size: int) -> npt.NDArray[np.float32]:
    delta = decode(payload, vocab_size)
    dense = np.zeros(vocab_size, np.float32)
    dense[delta.ids if isinstance(delta, SparseDelta) else slice(len(delta.values))] = delta.values
    return dense
