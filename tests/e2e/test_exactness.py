"""vLLM, hub and edge worker give, token for token, what the paper's Algorithm 1 gives when it is written out."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from .conftest import Deployment
from .reference import NUM_TOKENS, PARAMS, queries


def served(deployment: Deployment, steering: dict[str, Any], concurrency: int) -> list[list[int]]:
    """The greedy tokens of all queries, every one of them steered."""

    def ask(query: str) -> tuple[str, list[int]]:
        answer = deployment.chat(
            query,
            {"T": PARAMS.T, **steering},
            max_tokens=NUM_TOKENS,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
        return answer.id, answer.choices[0].token_ids

    with ThreadPoolExecutor(concurrency) as pool:
        answers = list(pool.map(ask, queries()))
    for request_id, _ in answers:
        account = deployment.account(request_id)
        assert (account["tokens_steered"], account["tokens_missed"]) == (NUM_TOKENS, 0)
    return [tokens for _, tokens in answers]


@pytest.mark.parametrize("concurrency", [1, 8])
def test_cloud_fusion_equals_algorithm_1(deployment: Deployment, expected: list[list[int]], concurrency: int) -> None:
    assert served(deployment, {}, concurrency) == expected


@pytest.mark.parametrize("concurrency", [1, 8])
def test_edge_fusion_equals_algorithm_1_over_its_candidates(
    deployment: Deployment, expected_of_candidates: list[list[int]], concurrency: int
) -> None:
    assert served(deployment, {"fusion": "edge"}, concurrency) == expected_of_candidates
