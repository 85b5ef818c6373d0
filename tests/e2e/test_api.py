"""What a client of the OpenAI API sees: every route, streamed and not, and every mistake answered with HTTP 400."""

import json
import math
from typing import Any

import httpx
import openai
import pytest

from .conftest import STEERING_KEY, Deployment

QUERY = "Write an invitation to the {}."


@pytest.fixture
def query() -> str:
    from costeer_vllm.demo.task import EVENTS

    return QUERY.format(EVENTS[0].name)


def name_of(deployment: Deployment, index: int) -> str:
    """The name in the context of the edge worker ``open`` (0) or ``keyed`` (1), as its file is called: two words."""
    return " ".join(word.capitalize() for word in deployment.contexts()[index].stem.split("-"))


def test_steered_answer_knows_the_name_and_the_plain_one_does_not(deployment: Deployment, query: str) -> None:
    plain, steered = deployment.chat(query), deployment.chat(query, {"T": 5})
    name = name_of(deployment, 0)
    assert name in steered.choices[0].message.content
    assert name not in plain.choices[0].message.content
    account = deployment.account(steered.id)
    assert account["tokens_steered"] == steered.usage.completion_tokens
    assert account["tokens_missed"] == 0


def test_model_alias_is_listed_and_steers(deployment: Deployment, query: str) -> None:
    names = [model.id for model in deployment.client.models.list().data]
    assert names == [deployment.model, f"{deployment.model}+costeer"]
    steered = deployment.chat(query, model=f"{deployment.model}+costeer", user="open")
    assert steered.choices[0].message.content == deployment.chat(query, {}).choices[0].message.content


def test_streamed_answer_equals_the_whole_one(deployment: Deployment, query: str) -> None:
    chunks = list(deployment.chat(query, {"T": 5}, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == deployment.chat(query, {"T": 5}).choices[0].message.content
    account = deployment.account(chunks[0].id)
    assert account["tokens_missed"] == 0
    assert account["tokens_steered"] > 10


def test_completions_and_responses(deployment: Deployment, query: str) -> None:
    body = {"costeer": {"worker": "open", "T": 5, "deadline_ms": 60_000}}
    client = deployment.client
    chat = deployment.chat(query, {"T": 5}).choices[0].message.content
    response = client.responses.create(model=deployment.model, input=query, max_output_tokens=48, temperature=0, extra_body=body)
    assert response.output_text == chat
    prompt = f"<|im_start|>user\n{query}<|im_end|>\n<|im_start|>assistant\n"
    arguments: dict[str, Any] = {"model": deployment.model, "max_tokens": 32, "temperature": 0}
    plain = client.completions.create(prompt=prompt, **arguments)
    steered = client.completions.create(prompt=[prompt, prompt], extra_body=body, **arguments)
    assert steered.choices[0].text == steered.choices[1].text != plain.choices[0].text
    account = deployment.account(steered.id)
    assert len(account["streams"]) == 2
    assert account["tokens_steered"] == steered.usage.completion_tokens
    assert account["tokens_missed"] == 0
    streamed = client.completions.create(prompt=prompt, extra_body=body, stream=True, **arguments)
    assert "".join(chunk.choices[0].text for chunk in streamed) == steered.choices[0].text


def test_every_child_of_n_is_a_stream_of_its_own(deployment: Deployment, query: str) -> None:
    answer = deployment.chat(query, {"T": 5}, n=3, temperature=1.0, seed=7, max_tokens=24)
    account = deployment.account(answer.id)
    assert len({stream["stream"] for stream in account["streams"]}) == 3
    assert account["tokens_steered"] == answer.usage.completion_tokens
    assert account["tokens_missed"] == 0


def test_strength_zero_changes_nothing(deployment: Deployment, query: str) -> None:
    assert deployment.chat(query, {"strength": 0}).choices[0].message.content == deployment.chat(query).choices[0].message.content


def test_strength_is_what_the_iterations_give(deployment: Deployment, query: str) -> None:
    one = deployment.chat(query, {"T": 1}).choices[0].message.content
    assert one == deployment.chat(query, {"strength": 1 / 2.1}).choices[0].message.content


def test_a_forbidden_token_stays_forbidden_while_steering(deployment: Deployment, query: str) -> None:
    def tokens(**extra: Any) -> list[int]:
        answer = deployment.chat(query, {"T": 5}, extra_body={"return_token_ids": True, **extra})
        return list(answer.choices[0].token_ids)

    forbidden = tokens()[3]
    assert forbidden not in tokens(logit_bias={str(forbidden): -100})


MISTAKES: list[tuple[dict[str, Any], list[str]]] = [
    ({"costeer": 5}, ["costeer is 5", "an object"]),
    ({"costeer": {"T": -1}}, ["T is -1", "from 0"]),
    ({"costeer": {"T": 2.5}}, ["T is 2.5", "integer"]),
    ({"costeer": {"alpha": "high"}}, ["alpha is 'high'", "finite number"]),
    ({"costeer": {"alpha": 500, "T": 5000}}, ["strength", "inf"]),
    ({"costeer": {"lambda": -1}}, ["lambda is -1", "0 or more"]),
    ({"costeer": {"eta": 0}}, ["eta is 0", "above 0"]),
    ({"costeer": {"strength": 1e9}}, ["strength is 1000000000.0", "1000"]),
    ({"costeer": {"strength": 1, "T": 3}}, ["strength", "alone", "T"]),
    ({"costeer": {"strenght": 1}}, ["strenght", "did you mean 'strength'"]),
    ({"costeer": {"deadline_ms": -5}}, ["deadline_ms is -5", "milliseconds"]),
    ({"costeer": {"on_missing": "panic"}}, ["on_missing is 'panic'", "'continue'"]),
    ({"costeer": {"worker": "nobody"}}, ["nobody", "attached"]),
    ({"costeer": {"worker": ["open"]}}, ["worker", "string"]),
    ({"costeer": {}}, ["worker", "2"]),
    ({"costeer": {"worker": "keyed"}}, ["key", "keyed"]),
    ({"costeer": {"worker": "keyed", "key": "sesame-1234"}}, ["key", "keyed"]),
    ({"costeer": {"worker": "open"}, "use_beam_search": True, "n": 2}, ["use_beam_search"]),
    ({"vllm_xargs": {"costeer": "x"}}, ["extra_args.costeer"]),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("fields", "words"), MISTAKES)
def test_mistakes_are_told(deployment: Deployment, query: str, fields: dict[str, Any], words: list[str], stream: bool) -> None:
    body = {"messages": [{"role": "user", "content": query}], "model": deployment.model, "max_tokens": 4, "stream": stream}
    answer = httpx.post(f"{deployment.server.url}/chat/completions", json={**body, **fields}, trust_env=False)
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert all(word in message for word in words), message
    assert "sesame" not in message


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("route", ["chat/completions", "completions", "responses"])
def test_numbers_that_are_none_are_told_on_every_route(deployment: Deployment, value: float, route: str) -> None:
    body: dict[str, Any] = {"model": deployment.model, "costeer": {"worker": "open", "beta": value}}
    body |= {"chat/completions": {"messages": [{"role": "user", "content": "hi"}]}, "completions": {"prompt": "hi"},
             "responses": {"input": "hi"}}[route]  # fmt: skip
    content = json.dumps(body)
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{deployment.server.url}/{route}", content=content, headers=headers, trust_env=False)
    assert answer.status_code == 400
    assert "beta" in answer.json()["error"]["message"]


def test_the_right_key_steers_and_stands_in_no_log(deployment: Deployment, query: str) -> None:
    steered = deployment.chat(query, {"worker": "keyed", "key": STEERING_KEY, "T": 5})
    assert name_of(deployment, 1) in steered.choices[0].message.content
    assert deployment.account(steered.id)["tokens_missed"] == 0
    with pytest.raises(openai.BadRequestError):
        deployment.chat(query, {"worker": "keyed", "key": STEERING_KEY + "!"})
    logs = deployment.logs()
    assert "JSON body" in logs  # the request's body really was logged
    assert "extra_args" in logs
    assert STEERING_KEY not in logs


def test_steered_requests_share_the_prefix_cache_with_their_own_kind_only(deployment: Deployment) -> None:
    long_query = "Write an invitation. " * 80  # more than two blocks of the cache

    def cached(steering: dict[str, Any] | None, **options: Any) -> int:
        usage = deployment.chat(long_query, steering, max_tokens=1, **options).usage
        return usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else 0

    cached(None)
    assert cached(None) > 0
    assert cached({}) == 0
    assert cached({}) > 0
    assert cached({"worker": "keyed", "key": STEERING_KEY}) == 0
    assert cached({}, extra_body={"cache_salt": "mine"}) == 0
