"""Steered and plain requests in one batch, aborted requests, and a server without the plugin to compare with."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from costeer_vllm.demo.task import EVENTS
from costeer_vllm.processes import serving, wait_until

from .conftest import RUNNERS, SERVER_OPTIONS, STEERING_KEY, Deployment

QUERIES = [f"Write an invitation to the {event.name}." for event in EVENTS[:8]]


def tokens_of(client: openai.OpenAI, model: str, query: str, seed: int) -> list[int]:
    """Sampled, not greedy: a disturbed random state would show as well as disturbed logits."""
    answer: Any = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": query}],
        max_tokens=40,
        temperature=1.0,
        seed=seed,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    return list(answer.choices[0].token_ids)


@pytest.fixture(scope="session")
def without_plugin(deployment: Deployment, pair_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """What a server of the same runner without the plugin answers to the eight queries, asked at the same time."""
    logs = tmp_path_factory.mktemp(f"logs-{deployment.runner}-plain")
    with serving(pair_folder / "large", logs, SERVER_OPTIONS, RUNNERS[deployment.runner], steering=False) as server:
        client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda i: tokens_of(client, deployment.model, QUERIES[i], i), range(8)))
        messages: Any = [{"role": "user", "content": "hi"}]
        with pytest.raises(openai.BadRequestError, match="--logits-processor costeer"):
            client.chat.completions.create(model=deployment.model, messages=messages, extra_body={"costeer": {}})
    return answers


def test_plain_requests_beside_a_steered_one_are_untouched(deployment: Deployment, without_plugin: list[list[int]]) -> None:
    with ThreadPoolExecutor(8) as pool:
        steered = pool.submit(deployment.chat, QUERIES[0], {"T": 5}, extra_body={"ignore_eos": True})
        answers = list(pool.map(lambda i: tokens_of(deployment.client, deployment.model, QUERIES[i], i), range(1, 8)))
    assert answers == without_plugin[1:]
    assert deployment.account(steered.result().id)["tokens_missed"] == 0


def test_concurrent_steered_requests_do_not_mix(deployment: Deployment) -> None:
    names = [" ".join(part.capitalize() for part in context.stem.split("-")) for context in deployment.contexts()[:2]]
    steerings = [{"worker": "open", "T": 5}, {"worker": "keyed", "key": STEERING_KEY, "T": 5}, None]

    def ask(i: int) -> tuple[int, str]:
        return i % 3, deployment.chat(QUERIES[i % 8], steerings[i % 3]).choices[0].message.content

    with ThreadPoolExecutor(12) as pool:
        for kind, text in pool.map(ask, range(24)):
            assert [name in text for name in names] == [kind == 0, kind == 1]


def test_a_client_that_goes_away_ends_its_stream(deployment: Deployment) -> None:
    body = {
        "model": deployment.model,
        "messages": [{"role": "user", "content": QUERIES[0]}],
        "max_tokens": 900,
        "ignore_eos": True,
        "stream": True,
        "costeer": {"worker": "open", "deadline_ms": 60_000},
    }
    with httpx.stream("POST", f"{deployment.server.url}/chat/completions", json=body, trust_env=False, timeout=60) as answer:
        lines = answer.iter_lines()
        first = next(line for line in lines if line.startswith("data: "))
        for _ in range(10):
            next(lines)
    request_id = httpx.Response(200, content=first.removeprefix("data: ")).json()["id"]
    account = deployment.account(request_id)
    assert 3 < account["tokens_steered"] < 900
    assert account["tokens_missed"] == 0


def live_streams(deployment: Deployment) -> int:
    return int(httpx.get(f"http://{deployment.server.hub}/healthz", trust_env=False).json()["streams"])


def test_nothing_is_left_after_many_requests_and_aborts(deployment: Deployment) -> None:
    def ask_and_leave(i: int) -> None:
        body = {"model": deployment.model, "messages": [{"role": "user", "content": QUERIES[i % 8]}], "max_tokens": 200,
                "ignore_eos": True, "costeer": {"worker": "open"}}  # fmt: skip
        try:
            httpx.post(f"{deployment.server.url}/chat/completions", json=body, timeout=0.2 + 0.05 * i, trust_env=False)
        except httpx.TimeoutException:
            return

    threads = [threading.Thread(target=ask_and_leave, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait_until(lambda: live_streams(deployment) == 0, deployment.server, 60.0)
    assert deployment.chat(QUERIES[0], {"T": 5}).choices[0].message.content
