"""vLLM, hub and edge worker give, token for token, what the paper's Algorithm 1 gives when it is written out."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from costeer_vllm.bench.relay import relay
from costeer_vllm.processes import edge_worker

from .conftest import EDGE_OPTIONS, Deployment
from .reference import NUM_TOKENS, PARAMS, queries

NUM_AHEAD = 8  # queries


def served(
    deployment: Deployment, steering: dict[str, Any], concurrency: int, count: int | None = None
) -> tuple[list[list[int]], list[dict[str, Any]]]:
    """The greedy tokens of the first ``count`` queries, every one of them steered, and the hub's accounts of them."""

    def ask(query: str) -> tuple[str, list[int]]:
        answer = deployment.chat(
            query,
            {"T": PARAMS.T, **steering},
            max_tokens=NUM_TOKENS,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
        return answer.id, answer.choices[0].token_ids

    with ThreadPoolExecutor(concurrency) as pool:
        answers = list(pool.map(ask, queries()[:count]))
    accounts = [deployment.account(request_id) for request_id, _ in answers]
    for account in accounts:
        assert (account["tokens_steered"], account["tokens_missed"]) == (NUM_TOKENS, 0)
    return [tokens for _, tokens in answers], accounts


@pytest.mark.parametrize("concurrency", [1, 8])
def test_cloud_fusion_equals_algorithm_1(deployment: Deployment, expected: list[list[int]], concurrency: int) -> None:
    assert served(deployment, {}, concurrency)[0] == expected


@pytest.mark.parametrize("concurrency", [1, 8])
def test_edge_fusion_equals_algorithm_1_over_its_candidates(
    deployment: Deployment, expected_of_candidates: list[list[int]], concurrency: int
) -> None:
    assert served(deployment, {"fusion": "edge"}, concurrency)[0] == expected_of_candidates


def test_look_ahead_over_a_long_way_changes_no_token(deployment: Deployment, expected: list[list[int]], tmp_path: Path) -> None:
    """Bytes are late, and pings with them: the edge worker sees that it pays to tell what nobody has asked for yet."""
    context = deployment.contexts()[0]
    small = deployment.folder / "small"
    with relay(deployment.server.hub, 50, tmp_path) as hub, edge_worker(hub, "ahead", small, context, tmp_path, EDGE_OPTIONS):
        found, accounts = served(deployment, {"worker": "ahead"}, 2, NUM_AHEAD)
    assert found == expected[:NUM_AHEAD]
    streams = [stream for account in accounts for stream in account["streams"]]
    assert sum(stream["answers"] for stream in streams) > sum(stream["positions"] for stream in streams)
