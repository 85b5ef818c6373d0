"""A device that lets nothing out but tokens: real vLLM, the ``openai`` client, and a record of every byte that left."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest

from costeer_vllm.processes import edge_worker, free_port
from costeer_vllm.protocol.messages import Attach, Choice, End, decode_edge_to_hub

from .conftest import EDGE_OPTIONS, Deployment
from .rogue import recording_proxy
from .test_gateway import PROFILE, QUERY, SECRETS, Device, other_profile, recording_relay, text_of


@pytest.fixture(scope="module")
def device(deployment: Deployment, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    folder = tmp_path_factory.mktemp(f"tokens-only-{deployment.runner}")
    (folder / "me.md").write_text(PROFILE)
    port, to_server = free_port(), list[bytes]()
    with (
        recording_proxy(deployment.server.hub) as (hub, to_hub, _),
        recording_relay(urlsplit(deployment.server.url).netloc, to_server) as server,
    ):
        options = (*EDGE_OPTIONS, "--gateway", f"127.0.0.1:{port}", "--server", f"http://{server}/v1")
        options = (*options, "--tokens-only", "--ledger", str(folder / "ledger.jsonl"))
        small = deployment.folder / "small"
        with (
            edge_worker(hub, "tokens-only", small, folder / "me.md", folder, options) as edge,
            openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=300) as client,
        ):
            yield Device(deployment, edge, client, [to_hub, to_server])


def test_an_app_that_knows_only_the_address_gets_the_personal_answer(device: Device) -> None:
    answer = device.chat()
    assert "Clara Novak" in text_of(answer)
    found = answer.costeer
    assert (found["worker"], found["fusion"], found["tokens_missed"]) == ("tokens-only", "edge", 0)
    assert found["tokens_steered"] == answer.usage.completion_tokens
    assert found["disclosed_bits"] > 10
    assert 0 < found["bytes_up"] < 150 * found["tokens_steered"]  # a token and what it belongs to
    assert found["bytes_down"] > 500 * found["tokens_steered"]  # 64 candidates of 8 bytes each
    assert "note" not in found


def test_the_streamed_answer_is_the_same(device: Device) -> None:
    whole = device.chat()
    *chunks, last = list(device.chat(stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text_of(whole)
    assert last.costeer["disclosed_bits"] == whole.costeer["disclosed_bits"]
    assert last.costeer["tokens_steered"] == whole.costeer["tokens_steered"]


def test_a_request_may_bring_a_private_context_of_its_own(device: Device) -> None:
    profile = other_profile(device.deployment)
    name = " ".join(word.capitalize() for word in profile.stem.split("-"))
    answer = device.chat({"context": f"{profile.read_text()}\n- Home: {SECRETS[1]}\n"})
    assert name in text_of(answer)
    assert "Clara Novak" not in text_of(answer)


def test_cloud_fusion_is_refused_here_and_at_the_server(device: Device) -> None:
    with pytest.raises(openai.BadRequestError, match="only tokens may leave this device"):
        device.chat({"fusion": "cloud"})
    with pytest.raises(openai.BadRequestError, match="'tokens-only' consents to edge fusion only"):
        device.deployment.chat(QUERY, {"worker": "tokens-only"})
    with pytest.raises(openai.BadRequestError, match="max_bits is 3"):
        device.deployment.chat(QUERY, {"max_bits": 3})


def test_it_samples_as_it_is_asked_to(device: Device) -> None:
    def ask(seed: int, **options: Any) -> str:
        return text_of(device.chat(seed=seed, max_tokens=24, temperature=1.5, **options))

    assert ask(1) == ask(1)
    assert len({ask(seed) for seed in range(6)}) > 1
    greedy = text_of(device.chat(max_tokens=24))
    assert {ask(seed, extra_body={"min_p": 1.0}) for seed in range(3)} == {greedy}
    if device.deployment.runner == "v1":  # Model Runner V2's kernel for top_k and top_p does not run under Triton's interpreter
        assert {ask(seed, top_p=1e-6) for seed in range(3)} == {greedy}
    answer = device.chat(n=3, seed=3, max_tokens=24, temperature=1.5)
    assert len({choice.message.content for choice in answer.choices}) > 1
    assert answer.costeer["tokens_steered"] == answer.usage.completion_tokens


def test_penalties_hold_and_probabilities_are_told(device: Device) -> None:
    plain, penalized = device.chat(), device.chat(extra_body={"repetition_penalty": 8.0})
    assert text_of(plain) != text_of(penalized)
    assert penalized.costeer["tokens_missed"] == 0
    assert device.chat(logprobs=True, top_logprobs=2, max_tokens=8).costeer["tokens_missed"] == 0


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("max_bits", [0, 3, 12])
def test_a_budget_holds_over_sampled_answers(device: Device, max_bits: float, temperature: float) -> None:
    free = device.chat().costeer["disclosed_bits"]  # greedy: a sampled answer may happen to disclose little
    for _ in range(3):
        found = device.chat({"max_bits": max_bits}, temperature=temperature).costeer
        assert found["disclosed_bits"] <= max_bits
        assert found["disclosed_bits"] < free
        assert (found["max_bits"], found["tokens_missed"]) == (max_bits, 0)


def test_plain_cloud_fused_and_edge_fused_requests_share_a_batch(device: Device) -> None:
    deployment = device.deployment
    asks = [
        lambda: text_of(deployment.chat(QUERY)),
        lambda: text_of(deployment.chat(QUERY, {"T": 5})),
        lambda: text_of(deployment.chat(QUERY, {"T": 5, "fusion": "edge"})),
        lambda: text_of(device.chat()),
    ]
    alone = [ask() for ask in asks]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda i: asks[i % 4](), range(12)))
    assert together == alone * 3
    assert len(set(alone)) == 3, "cloud and edge fusion agree, plain and the other device differ"


def test_nothing_but_tokens_and_control_fields_left_the_device(device: Device) -> None:
    """After all tests above on this device; the request with a context of its own is made once more, to be sure of it."""
    assert text_of(device.chat({"context": PROFILE + SECRETS[1]}))
    to_hub, to_server = device.sent
    frames = [decode_edge_to_hub(frame) for frame in to_hub[2:]]  # after the headers and path of the handshake
    assert {type(frame) for frame in frames} == {Attach, Choice}
    assert max(len(frame) for frame in to_hub[3:]) < 150
    for frame in frames:
        assert not isinstance(frame, End) or not frame.sentence
    crossed, logs = b"\0".join([*to_hub, *to_server]), (device.deployment.logs() + device.edge.log_text).encode()
    assert QUERY.encode() in crossed  # the search itself works
    assert b"Diary" not in crossed + logs
    for secret in (*SECRETS, other_profile(device.deployment).read_text()[:40]):
        for needle in (secret.encode(), secret[::-1].encode(), secret.encode().hex().encode(), secret.lower().encode()):
            assert needle not in crossed
            assert needle not in logs


def test_the_ledger_has_it_all(device: Device) -> None:
    file = device.edge.log.parent / "ledger.jsonl"
    bits = device.chat().costeer["disclosed_bits"]
    command = [sys.executable, "-m", "costeer_vllm.cli", "edge", "ledger", "--ledger", str(file)]
    shown = subprocess.run([*command, "--json", "--last", "1"], capture_output=True, text=True, check=True).stdout
    entry = json.loads(shown)
    assert (entry["fusion"], entry["worker"], round(entry["bits"], 3)) == ("edge", "tokens-only", bits)
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"{bits:.1f}" in table
    with contextlib.suppress(FileNotFoundError):
        assert not any(secret in file.read_text() for secret in (*SECRETS, "Clara"))
    assert Path(file).stat().st_mode & 0o077 == 0
