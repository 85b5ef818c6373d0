"""Edge workers that are late, gone or hostile: the engine lives, other requests do not notice, every token is accounted for."""

import itertools
import math
import os
import signal
import struct
import threading
from contextlib import ExitStack
from typing import Any

import numpy as np
import openai
import pytest

from costeer_vllm.delta import encode_lossless
from costeer_vllm.demo.task import EVENTS
from costeer_vllm.processes import edge_worker, wait_until
from costeer_vllm.protocol.messages import Advance, Begin, Delta, End, encode

from .conftest import EDGE_OPTIONS, Deployment
from .rogue import Answer, recording_proxy, rogue_edge, vocabulary_of

QUERY = f"Write an invitation to the {EVENTS[1].name}."


def lossless(values: list[float]) -> bytes:
    return struct.pack("<BI", 1, len(values)) + struct.pack(f"<{len(values)}f", *values)


def sparse(ids: list[int], first: float) -> bytes:
    """Entries that all have the value ``first``, their ids told by marks alone."""
    marks = sum(1 << (i + place) for place, i in enumerate(ids))
    size = (marks.bit_length() + 7) // 8
    return struct.pack("<BHBBff", 2, len(ids), 0, 0, first, 1.0) + marks.to_bytes(size, "little")


BAD_PAYLOADS = {
    "empty": b"",
    "header only": b"\x01\xff\xff\xff\xff",
    "unknown kind": b"\x09\x00\x00\x00\x00",
    "too short": lossless([0.0] * 8)[:-1],
    "too long": lossless([0.0] * 8) + b"\0",
    "nan": lossless([math.nan] * 400),
    "infinity": lossless([math.inf] + [0.0] * 399),
    "huge": lossless([1e30] * 400),
    "nan, sparse": sparse([1, 2], math.nan),
    "id outside": sparse([1, 10**6], 0.0),
    "ids repeated": sparse([5, 5], 0.0),
    "marks missing": sparse([5, 6], 0.0)[:-1] + b"\x20",
}


def with_payload(payload: bytes) -> Answer:
    return lambda question, position, prefix_hash: [encode(Delta(question.stream, position, prefix_hash, payload))]


def misplaced(position_by: int, hash_by: int, stream: str | None = None) -> Answer:
    payload = encode_lossless(np.full(400, 50.0, np.float32))

    def answer(question: Begin | Advance, position: int, prefix_hash: int) -> list[bytes]:
        moved = position + position_by, prefix_hash ^ hash_by
        return [encode(Delta(stream or question.stream, max(0, moved[0]), moved[1], payload))] * 2

    return answer


HOSTILE: dict[str, Answer] = {name: with_payload(payload) for name, payload in BAD_PAYLOADS.items()} | {
    "other position": misplaced(1, 0),
    "other prefix": misplaced(0, 1),
    "other stream": misplaced(0, 0, "chatcmpl-of-somebody-else"),
    "silence": lambda question, position, prefix_hash: [],
    "end at once": lambda question, position, prefix_hash: [encode(End(question.stream, "failed", "no"))],
}


@pytest.mark.parametrize("name", list(HOSTILE))
def test_hostile_deltas_leave_the_plain_answer_and_are_counted(deployment: Deployment, name: str) -> None:
    plain = deployment.chat(QUERY).choices[0].message.content
    vocabulary = vocabulary_of(deployment.folder / "large")
    with rogue_edge(deployment.server.hub, "rogue", vocabulary, HOSTILE[name]):
        answer = deployment.chat(QUERY, {"worker": "rogue", "on_missing": "continue", "deadline_ms": 200})
        assert answer.choices[0].message.content == plain
        account = deployment.account(answer.id)
        assert (account["tokens_steered"], account["tokens_missed"]) == (0, answer.usage.completion_tokens)
    steered = deployment.chat(QUERY, {"T": 5})
    assert deployment.account(steered.id)["tokens_missed"] == 0


@pytest.mark.parametrize("on_missing", ["wait", "fail"])
@pytest.mark.parametrize("name", list(HOSTILE))
def test_hostile_deltas_fail_a_request_that_needs_them(deployment: Deployment, name: str, on_missing: str) -> None:
    steering = {"worker": "rogue", "on_missing": on_missing, "deadline_ms": 1_000}
    with rogue_edge(deployment.server.hub, "rogue", vocabulary_of(deployment.folder / "large"), HOSTILE[name]):
        with pytest.raises(openai.InternalServerError, match="costeer: edge worker 'rogue', token 0: ") as failure:
            deployment.chat(QUERY, steering)
        assert failure.value.status_code == 503
        streamed = deployment.chat(QUERY, steering, stream=True)
        with pytest.raises(openai.APIError, match="costeer: edge worker 'rogue', token 0: "):
            list(streamed)


def test_an_edge_of_another_vocabulary_is_refused(deployment: Deployment) -> None:
    vocabulary = vocabulary_of(deployment.folder / "large")
    other = type(vocabulary)("0" * 64, vocabulary.size)
    with (
        rogue_edge(deployment.server.hub, "stranger", other, HOSTILE["silence"]),
        pytest.raises(openai.BadRequestError, match="vocabulary"),
    ):
        deployment.chat(QUERY, {"worker": "stranger"})


def test_an_edge_that_is_late_for_some_tokens_is_used_for_the_others(deployment: Deployment) -> None:
    payload = encode_lossless(np.zeros(400, np.float32))

    def every_second(question: Begin | Advance, position: int, prefix_hash: int) -> list[bytes]:
        return [] if position % 2 else [encode(Delta(question.stream, position, prefix_hash, payload))]

    with rogue_edge(deployment.server.hub, "rogue", vocabulary_of(deployment.folder / "large"), every_second):
        steering = {"worker": "rogue", "on_missing": "continue", "deadline_ms": 1000}
        answer = deployment.chat(QUERY, steering, max_tokens=8, extra_body={"ignore_eos": True})
        account = deployment.account(answer.id)
    # After a miss the engine does not wait again until it hears from the edge: some even positions are missed as well.
    assert account["tokens_steered"] + account["tokens_missed"] == 8
    assert account["tokens_steered"] >= 1
    assert account["tokens_missed"] >= 4


def another_edge(deployment: Deployment, name: str, logs: Any, hub: str | None = None) -> Any:
    context = deployment.contexts()[2]
    return edge_worker(hub or deployment.server.hub, name, deployment.folder / "small", context, logs, EDGE_OPTIONS)


def test_an_edge_that_is_killed_mid_answer_costs_only_its_own_tokens(deployment: Deployment, tmp_path: Any) -> None:
    with ExitStack() as stack:
        edge = stack.enter_context(another_edge(deployment, "mortal", tmp_path))
        steering = {"worker": "mortal", "on_missing": "continue", "deadline_ms": 60_000}
        stream = deployment.chat(QUERY, steering, stream=True, max_tokens=400, extra_body={"ignore_eos": True})
        chunks = list(itertools.islice(stream, 10))
        os.kill(edge.process.pid, signal.SIGKILL)
        beside = threading.Thread(target=deployment.chat, args=(QUERY, {"T": 5}))
        beside.start()
        chunks += list(stream)
        beside.join(60)
        assert not beside.is_alive()
        account = deployment.account(chunks[0].id)
        assert account["tokens_steered"] + account["tokens_missed"] == 400
        assert account["tokens_steered"] > 0
        assert account["tokens_missed"] > 0
        with pytest.raises(openai.BadRequestError, match="mortal"):
            deployment.chat(QUERY, steering)
        stack.enter_context(another_edge(deployment, "mortal", tmp_path / "again"))
        assert deployment.account(deployment.chat(QUERY, steering).id)["tokens_missed"] == 0


def test_an_edge_that_is_stopped_and_goes_on_is_used_again(deployment: Deployment, tmp_path: Any) -> None:
    with another_edge(deployment, "sleeper", tmp_path) as edge:
        steering = {"worker": "sleeper", "on_missing": "continue", "deadline_ms": 100}
        stream = deployment.chat(QUERY, steering, stream=True, max_tokens=150, extra_body={"ignore_eos": True})
        chunks = list(itertools.islice(stream, 10))
        os.kill(edge.process.pid, signal.SIGSTOP)
        try:
            chunks += list(stream)
        finally:
            os.kill(edge.process.pid, signal.SIGCONT)
        account = deployment.account(chunks[0].id)
        assert account["tokens_steered"] + account["tokens_missed"] == 150
        assert account["tokens_missed"] > 40
        wait_until(lambda: "sleeper" in deployment.server.workers(), edge, 30.0)
        assert deployment.account(deployment.chat(QUERY, {**steering, "deadline_ms": 60_000}).id)["tokens_missed"] == 0


def test_the_context_leaves_in_no_frame_and_no_log(deployment: Deployment, tmp_path: Any) -> None:
    import base64

    from transformers import AutoTokenizer

    secret = "Zanzibar-Quokka 7741"
    context = tmp_path / "me.md"
    context.write_text(f"# About me\n\n- Name: Clara Novak\n- Diary: {secret}\n- Town: Bergen\n")
    tokenizer = AutoTokenizer.from_pretrained(deployment.folder / "small")
    ids = tokenizer(f" {secret}", add_special_tokens=False)["input_ids"]
    needles = {secret.encode(), secret[::-1].encode(), b"Diary", secret.encode().hex().encode(), secret.lower().encode()}
    for shift in range(3):
        encoded = base64.b64encode(b"x" * shift + secret.encode() + b"x" * (3 - (shift + len(secret)) % 3))
        needles.add(encoded[4:-4])
    for width in ("<u2", "<u4", ">u2", ">u4"):
        needles.add(np.array(ids[1:-1], width).tobytes())
    needles.add(encode(ids[1:-1])[1:])
    with recording_proxy(deployment.server.hub) as (address, up, down):
        folder = deployment.folder / "small"
        with edge_worker(address, "private", folder, context, tmp_path, EDGE_OPTIONS) as edge:
            steered = deployment.chat(QUERY, {"worker": "private", "T": 5})
            assert deployment.account(steered.id)["tokens_missed"] == 0
            logs = deployment.logs() + edge.log_text
    assert len(up) > steered.usage.completion_tokens
    everything = b"\0".join(up + down) + logs.encode()
    assert QUERY.encode() in everything  # the search itself works: the query is public and is found
    for needle in needles:
        assert needle not in everything, needle
