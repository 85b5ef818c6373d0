"""vLLM, hub and edge worker give, token for token, what the paper's Algorithm 1 gives when it is written out."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from .conftest import Deployment
from .reference import NUM_TOKENS, PARAMS, queries


@pytest.mark.parametrize("fusion", ["cloud", "edge"])
@pytest.mark.parametrize("concurrency", [1, 8])
def test_served_tokens_equal_algorithm_1(
    deployment: Deployment, expected: list[list[int]], concurrency: int, fusion: str
) -> None:
    def ask(query: str) -> tuple[str, list[int]]:
        answer = deployment.chat(
            query,
            {"T": PARAMS.T, "fusion": fusion},
            max_tokens=NUM_TOKENS,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
        return answer.id, answer.choices[0].token_ids

    with ThreadPoolExecutor(concurrency) as pool:
        answers = list(pool.map(ask, queries()))
    assert [tokens for _, tokens in answers] == expected
    for request_id, _ in answers:
        account = deployment.account(request_id)
        assert (account["tokens_steered"], account["tokens_missed"]) == (NUM_TOKENS, 0)
