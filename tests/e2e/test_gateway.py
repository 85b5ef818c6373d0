"""Apps on the device: the ``openai`` client knows nothing but the gateway's address, and all links of the device are recorded."""

import asyncio
import base64
import contextlib
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from costeer_vllm.demo.task import EVENTS
from costeer_vllm.processes import Running, edge_worker, free_port, wait_until

from .conftest import EDGE_OPTIONS, Deployment
from .rogue import in_a_thread, recording_proxy

QUERY = f"Write an invitation to the {EVENTS[2].name}."
SECRETS = ("Zanzibar-Quokka 7741", "Pelargonium Street")
PROFILE = f"# About me\n\n- Name: Clara Novak\n- Diary: {SECRETS[0]}\n- Town: Bergen\n"
STEERING_KEY = "the-key-of-the-recorded-device"


@dataclass
class Device:
    """An edge worker with its gateway; ``sent`` is every byte that left it, to the hub and to the server."""

    deployment: Deployment
    edge: Running
    client: openai.OpenAI
    sent: list[list[bytes]]

    def chat(self, costeer: Any = None, content: str = QUERY, **options: Any) -> Any:
        """A greedy chat completion, with nothing of costeer in it unless given."""
        body = {**options.pop("extra_body", {}), **({} if costeer is None else {"costeer": costeer})}
        arguments: dict[str, Any] = {"model": self.deployment.model, "max_tokens": 48, "temperature": 0, **options}
        return self.client.chat.completions.create(messages=[{"role": "user", "content": content}], extra_body=body, **arguments)


@contextlib.contextmanager
def recording_relay(address: str, record: list[bytes]) -> Iterator[str]:
    """A TCP relay before ``host:port``: its own address. ``record``: what clients sent through it."""
    host, port = address.split(":")

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, record: list[bytes] | None) -> None:
        with contextlib.suppress(ConnectionError):
            while part := await reader.read(65536):
                if record is not None:
                    record.append(part)
                writer.write(part)
                await writer.drain()
        writer.close()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection(host, int(port))
        await asyncio.gather(pump(reader, up_writer, record), pump(up_reader, writer, None))

    own = free_port()

    async def main(stop: asyncio.Event) -> None:
        async with await asyncio.start_server(relay, "127.0.0.1", own):
            await stop.wait()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

    with in_a_thread(main):
        yield f"127.0.0.1:{own}"


@pytest.fixture(scope="module")
def device(deployment: Deployment, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    """A device of its own, whose context is not among the demo's."""
    folder = tmp_path_factory.mktemp(f"device-{deployment.runner}")
    (folder / "me.md").write_text(PROFILE)
    port, to_server = free_port(), list[bytes]()
    with (
        recording_proxy(deployment.server.hub) as (hub, to_hub, _),
        recording_relay(urlsplit(deployment.server.url).netloc, to_server) as server,
    ):
        options = (*EDGE_OPTIONS, "--gateway", f"127.0.0.1:{port}", "--server", f"http://{server}/v1")
        options += ("--no-look-ahead",)  # a guess sent in vain would be among the bytes that are compared
        keys = {"COSTEER_KEY": STEERING_KEY}
        small = deployment.folder / "small"
        with (
            edge_worker(hub, "device", small, folder / "me.md", folder, options, keys) as edge,
            openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=300) as client,
        ):
            yield Device(deployment, edge, client, [to_hub, to_server])


def text_of(answer: Any) -> str:
    return str(answer.choices[0].message.content)


def other_profile(deployment: Deployment) -> Path:
    return deployment.contexts()[3]


def test_an_app_that_knows_only_the_address_gets_the_steered_answer(device: Device) -> None:
    answer = device.chat()
    assert "Clara Novak" in text_of(answer)
    found = answer.costeer
    assert found["tokens_steered"] == answer.usage.completion_tokens
    assert (found["tokens_missed"], found["worker"], found["fusion"]) == (0, "device", "cloud")
    assert found["strength"] == pytest.approx(1.783, abs=1e-3)
    assert found["bytes_up"] > 1000 * found["tokens_steered"] > 0  # lossless: 4 bytes for each of 400 tokens
    assert found["bytes_down"] > len(QUERY)
    assert "note" not in found
    streams = device.deployment.account(answer.id)["streams"]
    assert (found["bytes_up"], found["bytes_down"]) == (streams[0]["bytes_up"], streams[0]["bytes_down"])


def test_the_streamed_answer_is_the_same_and_has_its_account_in_the_last_chunk(device: Device) -> None:
    whole = device.chat({"T": 5})
    *chunks, last = list(device.chat({"T": 5}, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text_of(whole)
    assert last.choices == []
    assert last.id == chunks[0].id
    assert last.costeer == whole.costeer
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_every_choice_is_steered_and_counted(device: Device) -> None:
    answer = device.chat({"T": 5}, n=2, temperature=1.0, seed=7, max_tokens=24, logprobs=True, top_logprobs=2)
    assert len(answer.choices) == 2
    assert len(answer.choices[1].logprobs.content[0].top_logprobs) == 2
    assert answer.costeer["tokens_steered"] == answer.usage.completion_tokens
    assert answer.costeer["tokens_missed"] == 0


def test_completions_and_several_prompts(device: Device) -> None:
    prompt = f"<|im_start|>user\n{QUERY}<|im_end|>\n<|im_start|>assistant\n"
    arguments: dict[str, Any] = {"model": device.deployment.model, "max_tokens": 32, "temperature": 0}
    answer: Any = device.client.completions.create(prompt=[prompt, prompt], **arguments)
    assert "Clara Novak" in answer.choices[0].text
    assert answer.choices[0].text == answer.choices[1].text
    assert answer.costeer["tokens_steered"] == answer.usage.completion_tokens


def test_a_request_may_bring_a_private_context_of_its_own(device: Device) -> None:
    profile = other_profile(device.deployment)
    name = " ".join(word.capitalize() for word in profile.stem.split("-"))
    answer = device.chat({"context": f"{profile.read_text()}\n- Home: {SECRETS[1]}\n"})
    assert name in text_of(answer)
    assert "Clara Novak" not in text_of(answer)
    assert answer.costeer["tokens_missed"] == 0


def test_the_plain_way(device: Device) -> None:
    answer = device.chat(False)
    assert text_of(answer) == text_of(device.deployment.chat(QUERY))
    assert not hasattr(answer, "costeer")


def test_models_are_listed_without_aliases_and_errors_are_the_servers(device: Device) -> None:
    assert [model.id for model in device.client.models.list().data] == [device.deployment.model]
    with pytest.raises(openai.NotFoundError, match="nothing-of-this-name") as caught:
        device.chat(model="nothing-of-this-name")
    direct = httpx.post(f"{device.deployment.server.url}/chat/completions", trust_env=False,
                        json={"model": "nothing-of-this-name", "messages": [{"role": "user", "content": QUERY}]})  # fmt: skip
    assert caught.value.body == direct.json()["error"]
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        device.chat(max_tokens=-1)
    with pytest.raises(openai.BadRequestError, match="strenght"):
        device.chat({"strenght": 1})


def test_an_app_that_hangs_up_ends_the_generation(device: Device) -> None:
    stream = device.chat(stream=True, max_tokens=900, extra_body={"ignore_eos": True})
    request_id = next(itertools.islice(stream, 1, None)).id
    stream.close()
    account = device.deployment.account(request_id)
    assert account["tokens_steered"] < 900
    assert device.chat().costeer["tokens_missed"] == 0


def test_an_edge_that_loses_its_hub_does_not_answer_plainly_in_silence(deployment: Deployment, tmp_path: Path) -> None:
    (tmp_path / "me.md").write_text(PROFILE)
    port = free_port()
    options = (*EDGE_OPTIONS, "--gateway", f"127.0.0.1:{port}", "--server", deployment.server.url)
    url = f"http://127.0.0.1:{port}"
    with edge_worker(
        "127.0.0.1:1", "lost", deployment.folder / "small", tmp_path / "me.md", tmp_path, options, wait=False
    ) as edge:
        wait_until(lambda: "gateway ready" in edge.log_text, edge)
        body = {"model": deployment.model, "messages": [{"role": "user", "content": QUERY}], "max_tokens": 4}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, trust_env=False, timeout=60)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_attached")
        assert httpx.get(f"{url}/healthz", trust_env=False).json()["attached"] is False
        plain = httpx.post(f"{url}/v1/chat/completions", json={**body, "costeer": False}, trust_env=False, timeout=60)
        assert plain.status_code == 200
        wait_until(lambda: "trying again" in edge.log_text, edge)  # the small model is loaded
        start = time.monotonic()
        edge.process.terminate()
        assert edge.process.wait(20) == 0
        assert time.monotonic() - start < 10
    assert "Traceback" not in edge.log_text


def test_nothing_private_crossed_or_was_logged(device: Device) -> None:
    """After all tests above on this device; the request with a context of its own is made once more, to be sure of it."""
    device.chat({"context": PROFILE + SECRETS[1]}, stream=True).close()
    assert text_of(device.chat({"context": PROFILE + SECRETS[1]}))
    assert all(device.sent)
    crossed = b"\0".join(part for record in device.sent for part in record)
    logs = (device.deployment.logs() + device.edge.log_text).encode()
    assert QUERY.encode() in crossed  # the search itself works
    assert STEERING_KEY.encode() in crossed  # to the server, in the request
    assert b"Diary" not in crossed + logs
    assert STEERING_KEY.encode() not in logs
    for secret in (*SECRETS, other_profile(device.deployment).read_text()[:40]):
        for needle in (secret.encode(), secret[::-1].encode(), secret.encode().hex().encode(), secret.lower().encode()):
            assert needle not in crossed
            assert needle not in logs
        for shift in range(3):
            encoded = base64.b64encode(b"x" * shift + secret.encode() + b"x" * (3 - (shift + len(secret.encode())) % 3))
            assert encoded[4:-4] not in crossed + logs
