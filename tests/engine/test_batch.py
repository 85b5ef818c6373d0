"""From the streams of a step to additions: which rows get what, with and without a gate."""

from typing import Any

import numpy as np
import pytest
import torch

from costeer_vllm.delta import DenseDelta, SparseDelta
from costeer_vllm.engine.batch import steer_batch
from costeer_vllm.engine.streams import SteeredStream
from costeer_vllm.protocol.messages import Query
from costeer_vllm.request import SteeringRequest

VOCAB = 50


def stream(answer: DenseDelta | SparseDelta | int | None, strength: float = 2.0, **fields: Any) -> SteeredStream:
    request = SteeringRequest("r", "laptop", Query(prompt="Hello?"), strength, **fields)
    return SteeredStream("s", request, frozenset(), answer=answer)


def dense(seed: int) -> DenseDelta:
    return DenseDelta(np.random.default_rng(seed).normal(size=VOCAB).astype(np.float32))


def sparse() -> SparseDelta:
    return SparseDelta(np.array([3, 7]), np.array([1.5, -2.0], np.float32))


def test_rows_get_their_own_deltas_and_a_row_without_one_keeps_its_bits() -> None:
    logits = torch.randn(5, VOCAB)
    before = logits.clone()
    first, second, few = dense(1), dense(2), sparse()
    steer_batch(logits, {0: stream(first), 2: stream(few, 0.5), 3: stream(None), 4: stream(second, -1.0)})
    added = logits - before
    torch.testing.assert_close(added[0], 2.0 * torch.from_numpy(first.values))
    torch.testing.assert_close(added[4], -torch.from_numpy(second.values))
    torch.testing.assert_close(added[2, [3, 7]], torch.tensor([0.75, -1.0]))
    assert torch.equal(logits[[1, 3]], before[[1, 3]])
    assert added[2].count_nonzero() == 2


@pytest.mark.parametrize("make", [lambda: dense(3), sparse])
def test_where_the_base_policy_is_surer_than_the_gate_it_is_kept(make: Any) -> None:
    sure, unsure = torch.zeros(VOCAB), torch.zeros(VOCAB)
    sure[0] = np.log(9 * (VOCAB - 1))  # probability 0.9
    unsure[0] = np.log(VOCAB - 1)  # probability 0.5
    logits = torch.stack([sure, unsure, sure, sure, unsure])
    before = logits.clone()
    gates = {0: 0.8, 1: 0.8, 2: 0.95, 3: 1.0, 4: 0.0}
    steer_batch(logits, {row: stream(make(), confidence=gate) for row, gate in gates.items()})
    assert [row for row in gates if not torch.equal(logits[row], before[row])] == [1, 2, 3]


def test_without_a_gate_even_certainty_is_steered() -> None:
    logits = torch.full((2, VOCAB), -torch.inf)
    logits[:, 3] = 0.0  # a grammar left one token: its probability is exactly 1
    steer_batch(logits, {0: stream(sparse()), 1: stream(sparse(), confidence=0.5)})
    assert logits[:, 3].tolist() == [3.0, 0.0]
    assert not logits.isnan().any()


def test_a_row_whose_token_was_chosen_is_left_that_token_alone() -> None:
    logits = torch.randn(5, VOCAB)
    logits[1, 30] = -torch.inf
    before = logits.clone()
    few = sparse()
    # Neither the gate nor the strength has a say: both were the device's to look at.
    steer_batch(logits, {0: stream(17, 0.0), 1: stream(0, confidence=0.0), 2: stream(few), 4: stream(VOCAB - 1), 3: stream(None)})
    for row, token in ((0, 17), (1, 0), (4, VOCAB - 1)):
        assert logits[row].isfinite().nonzero().tolist() == [[token]]
        assert logits[row, token] == 0.0
        assert logits[row].softmax(-1)[token] == 1.0
        assert logits[row].argmax() == token
    assert (logits[2] - before[2]).count_nonzero() == 2
    assert torch.equal(logits[3], before[3])


def test_a_batch_of_chosen_tokens_only() -> None:
    logits = torch.randn(3, VOCAB)
    steer_batch(logits, {row: stream(row + 1) for row in range(3)})
    assert logits.argmax(-1).tolist() == [1, 2, 3]
    assert (logits > -torch.inf).sum() == 3
