"""Everything between engine and device fails: requests that wait get the same tokens, the others an error or honest counts.

In every test plain requests run beside the fault, and are answered, rightly, while it lasts.
"""

import contextlib
import itertools
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from costeer_vllm.processes import Running, edge_worker, free_port, serving, wait_until
from costeer_vllm.protocol.messages import Advance, Begin, Candidates, Choice, Delta, End

from .conftest import EDGE_OPTIONS, RUNNERS, SERVER_OPTIONS, Deployment, hub_process
from .links import Fault, Relay, at, delayed, relay_to
from .reference import NUM_TOKENS, PARAMS, queries

FUSIONS = ("cloud", "edge")
HALT_AT = 20  # the position at which a fault strikes, in the middle of 64
LEASE_MS = 60_000  # of a request that shall outlast its fault, on a slow machine as well
on_v1 = pytest.mark.parametrize("deployment", ["v1"], indirect=True)  # what is about links, not about the engine


@dataclass(frozen=True)
class Answer:
    """To one request for greedy tokens, or how it failed."""

    id: str
    tokens: list[int]
    error: str = ""


class Asker:
    """Asks a server for the reference's queries, by number."""

    def __init__(self, deployment: Deployment, pool: ThreadPoolExecutor) -> None:
        self.deployment = deployment
        self._pool = pool

    def ask(
        self, number: int, steering: dict[str, Any] | None = None, stream: bool = False, num_tokens: int = NUM_TOKENS
    ) -> Answer:
        """Wait for the answer or the error."""
        if steering is not None:
            steering = {"T": PARAMS.T, "deadline_ms": LEASE_MS, **steering}
        body = {"ignore_eos": True, "return_token_ids": True}
        tokens: list[int] = []
        try:
            answer = self.deployment.chat(queries()[number], steering, stream=stream, max_tokens=num_tokens, extra_body=body)
            for part in answer if stream else [answer]:
                tokens += itertools.chain.from_iterable(getattr(choice, "token_ids", None) or () for choice in part.choices)
        except openai.APIError as error:
            return Answer("", tokens, error.message)  # of an answer that is not streamed, with its status
        return Answer(part.id, tokens)

    def start(self, number: int, *args: Any, **kwargs: Any) -> "Future[Answer]":
        """The same, at the same time as others."""
        return self._pool.submit(self.ask, number, *args, **kwargs)

    def counts(self, answer: Answer) -> tuple[int, int]:
        """Tokens steered and missed, as the hub has them."""
        account = self.deployment.account(answer.id)
        return account["tokens_steered"], account["tokens_missed"]

    def num_live(self) -> int:
        """Streams at the hub."""
        return num_live(self.deployment.server.hub)


def num_live(hub: str) -> int:
    return int(httpx.get(f"http://{hub}/healthz", trust_env=False, timeout=30.0).json()["streams"])


@pytest.fixture
def asker(deployment: Deployment) -> Iterator[Asker]:
    with ThreadPoolExecutor(32) as pool:
        yield Asker(deployment, pool)


@pytest.fixture(scope="module")
def plain(deployment: Deployment) -> list[list[int]]:
    """The unsteered tokens of some queries, asked one after the other."""
    with ThreadPoolExecutor(1) as pool:
        return [Asker(deployment, pool).ask(number).tokens for number in range(4)]


@pytest.fixture
def right(expected: list[list[int]], expected_of_candidates: list[list[int]]) -> dict[str, list[list[int]]]:
    """By fusion: Algorithm 1's tokens of every query, under the context of ``far``."""
    return {"cloud": expected, "edge": expected_of_candidates}


def start_edge(
    deployment: Deployment, hub: str, name: str, logs: Path, wait: bool = True
) -> contextlib.AbstractContextManager[Running]:
    """An edge worker with the context of the reference."""
    return edge_worker(hub, name, deployment.folder / "small", deployment.contexts()[0], logs, EDGE_OPTIONS, wait=wait)


@pytest.fixture(scope="module")
def far_relay(deployment: Deployment, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relay]:
    """A relay with the edge worker ``far`` behind it."""
    logs = tmp_path_factory.mktemp(f"logs-far-{deployment.runner}")
    with relay_to(deployment.server.hub) as relay, start_edge(deployment, relay.address, "far", logs):
        yield relay


@pytest.fixture
def far(far_relay: Relay, asker: Asker) -> Iterator[Relay]:
    """The same without any fault; after the test nothing may be left of its streams, at the hub or at the edge worker."""
    yield far_relay
    far_relay.restore()
    wait_until(lambda: asker.num_live() == 0, asker.deployment.server, 60.0)


# --- the edge worker ends ---


def test_an_edge_worker_is_killed_and_comes_back(
    asker: Asker, plain: list[list[int]], right: dict[str, list[list[int]]], tmp_path: Path
) -> None:
    deployment = asker.deployment
    with relay_to(deployment.server.hub) as relay, ExitStack() as stack:
        edge = stack.enter_context(start_edge(deployment, relay.address, "mortal", tmp_path))
        relay.stand_still()  # so that all begin at the same time
        waiting, brief, failing, going_on = (
            [asker.start(i, {"worker": "mortal", "fusion": FUSIONS[i], **kind}, stream=i == 0) for i in range(2)]
            for kind in KINDS
        )
        relay.wait_for(lambda: len(relay.streams(Begin)) == 8)
        relay.stand_still_at(HALT_AT)
        relay.move()
        assert relay.stands_still.wait(120)
        os.kill(edge.process.pid, signal.SIGKILL)
        again = stack.enter_context(start_edge(deployment, relay.address, "mortal", tmp_path / "again", wait=False))
        beside = [asker.start(number) for number in range(4)]
        for in_the_stream, whole in (failing, brief):
            assert in_the_stream.result(60).error.startswith("costeer: edge worker 'mortal', token ")
            assert whole.result(60).error.startswith("Error code: 503 - costeer: edge worker 'mortal', token ")
        assert [answer.result(120).tokens for answer in beside] == plain
        for answer in going_on:
            steered, missed = asker.counts(answer.result(120))
            assert (steered + missed, len(answer.result().tokens)) == (NUM_TOKENS, NUM_TOKENS)
            assert 0 < steered <= HALT_AT
        assert not any(answer.done() for answer in waiting)
        relay.restore()
        wait_until(lambda: "attached as" in again.log_text, again)
        for number, (fusion, answer) in enumerate(zip(FUSIONS, waiting, strict=True)):
            assert answer.result(120).tokens == right[fusion][number]
            assert asker.counts(answer.result()) == (NUM_TOKENS, 0)


KINDS: list[dict[str, Any]] = [
    {},
    {"deadline_ms": 10_000},
    {"on_missing": "fail", "deadline_ms": 60_000},
    {"on_missing": "continue", "deadline_ms": 60_000},
]


# --- nothing comes, and nobody is gone ---


def test_a_frozen_edge_worker_holds_eight_requests_and_nobody_else(
    asker: Asker, far: Relay, plain: list[list[int]], right: dict[str, list[list[int]]]
) -> None:
    far.stand_still()
    answers = [asker.start(i, {"worker": "far", "fusion": FUSIONS[i % 2]}, stream=i % 4 < 2) for i in range(8)]
    far.wait_for(lambda: len(far.streams(Begin) - far.streams(End)) == 8)
    assert [asker.ask(number).tokens for number in range(4)] == plain
    near = asker.ask(8, {"worker": "open"})
    assert near.tokens == right["cloud"][8]
    wait_until(lambda: asker.num_live() == 8, asker.deployment.server, 60.0)  # its End comes a step after its answer
    assert not any(answer.done() for answer in answers)
    far.move()
    for i, answer in enumerate(answers):
        assert answer.result(120).tokens == right[FUSIONS[i % 2]][i]
        assert asker.counts(answer.result()) == (NUM_TOKENS, 0)
    wait_until(lambda: asker.num_live() == 0, asker.deployment.server, 60.0)


def test_clients_leave_requests_that_are_held(asker: Asker, far: Relay, plain: list[list[int]]) -> None:
    before = far.streams(Begin)
    far.stand_still_at(HALT_AT)
    with contextlib.ExitStack() as clients:
        for number, fusion in enumerate(FUSIONS):
            body = {
                "model": asker.deployment.model,
                "messages": [{"role": "user", "content": queries()[number]}],
                "max_tokens": NUM_TOKENS,
                "ignore_eos": True,
                "stream": True,
                "costeer": {"worker": "far", "fusion": fusion, "deadline_ms": LEASE_MS},
            }
            url = f"{asker.deployment.server.url}/chat/completions"
            clients.enter_context(httpx.stream("POST", url, json=body, trust_env=False, timeout=120))
        assert far.stands_still.wait(60)
        wait_until(lambda: asker.num_live() == 2, asker.deployment.server, 60.0)
    wait_until(lambda: asker.num_live() == 0, asker.deployment.server, 60.0)  # while the edge worker hears nothing
    assert [asker.ask(number).tokens for number in range(4)] == plain
    far.restore()
    far.wait_for(lambda: far.streams(Begin) - before <= far.streams(End))


@on_v1
def test_a_half_open_connection_fails_a_brief_wait_and_is_outlasted_by_a_long_one(
    asker: Asker, far: Relay, plain: list[list[int]], right: dict[str, list[list[int]]]
) -> None:
    far.stand_still_at(HALT_AT)
    long = [asker.start(i, {"worker": "far", "fusion": fusion}) for i, fusion in enumerate(FUSIONS)]
    brief = [asker.start(i, {"worker": "far", "fusion": fusion, "deadline_ms": 2_000}) for i, fusion in enumerate(FUSIONS)]
    assert far.stands_still.wait(60)
    for answer in brief:
        assert "costeer: edge worker 'far', token" in answer.result(60).error
        assert "within 2000 ms" in answer.result().error
    assert [asker.ask(number).tokens for number in range(4)] == plain
    assert not any(answer.done() for answer in long)
    far.cut()
    far.restore()
    for i, fusion in enumerate(FUSIONS):
        assert long[i].result(120).tokens == right[fusion][i]
        assert asker.counts(long[i].result()) == (NUM_TOKENS, 0)


# --- frames ---

SOME = (7, 31)  # positions at which they strike
ANSWERS, QUESTIONS = (Delta, Choice), (Advance, Candidates)
LOST, REPEATED, OVERTAKEN = (), (0.0, 0.05), (3.5,)  # seconds; the engine asks again after three
FAULTS: dict[str, Callable[[], dict[str, Fault]]] = {
    "answers lost": lambda: {"up": at(SOME, ANSWERS, LOST)},
    "questions lost": lambda: {"down": at(SOME, QUESTIONS, LOST)},
    "repeated": lambda: {"up": at(SOME, ANSWERS, REPEATED), "down": at(SOME, QUESTIONS, REPEATED)},
    "answers overtaken": lambda: {"up": at(SOME, ANSWERS, OVERTAKEN)},
    "questions overtaken": lambda: {"down": at(SOME, Advance, OVERTAKEN)},
}


@on_v1
@pytest.mark.parametrize("name", list(FAULTS))
def test_frames_that_are_lost_repeated_or_overtaken_change_no_token(
    asker: Asker, far: Relay, plain: list[list[int]], right: dict[str, list[list[int]]], name: str
) -> None:
    for way, fault in FAULTS[name]().items():
        setattr(far, way, fault)
    steered = [asker.start(i, {"worker": "far", "fusion": FUSIONS[i % 2]}) for i in range(4)]
    beside = [asker.start(i) for i in range(4)]
    assert [answer.result(120).tokens for answer in beside] == plain
    for i, answer in enumerate(steered):
        assert answer.result(120).tokens == right[FUSIONS[i % 2]][i]
        assert asker.counts(answer.result()) == (NUM_TOKENS, 0)


@pytest.mark.parametrize("delay_s", [0.05, pytest.param(0.15, marks=on_v1)])
def test_a_far_edge_worker_beside_a_near_one_and_plain_requests(
    asker: Asker, far: Relay, plain: list[list[int]], right: dict[str, list[list[int]]], delay_s: float
) -> None:
    far.up, far.down = delayed(delay_s), delayed(delay_s)
    at_far = [asker.start(i, {"worker": "far", "fusion": FUSIONS[i % 2]}) for i in range(4)]
    near = [asker.start(i, {"worker": "open", "fusion": FUSIONS[i % 2]}) for i in range(4)]
    beside = [asker.start(i) for i in range(4)]
    assert [answer.result(120).tokens for answer in beside] == plain
    for answers in (near, at_far):
        for i, answer in enumerate(answers):
            assert answer.result(120).tokens == right[FUSIONS[i % 2]][i]
            assert asker.counts(answer.result()) == (NUM_TOKENS, 0)


# --- the hub ends; requests that are held are preempted ---


@dataclass
class OwnHub:
    """A hub of its own process, at the same addresses after every start."""

    logs: Path
    port: int = field(default_factory=free_port)
    engine_port: int = field(default_factory=free_port)
    _stack: ExitStack = field(default_factory=ExitStack)
    _process: Running | None = None
    _starts: Iterator[int] = field(default_factory=itertools.count)

    @property
    def address(self) -> str:
        """For edge workers and HTTP."""
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Until it is ready."""
        hub = hub_process(self.port, self.engine_port, self.logs / f"hub-{next(self._starts)}.log")
        self._process = self._stack.enter_context(hub)

    def kill(self) -> None:
        """At once, and wait for the end."""
        assert self._process is not None
        self._process.process.kill()
        self._process.process.wait(60)

    def close(self) -> None:
        """End it."""
        self._stack.close()


NUM_BLOCKS, BLOCK_SIZE, NUM_LONG = 24, 32, 200  # of the key-value cache; tokens; tokens of a long answer
SMALL_CACHE = ("--max-model-len", "256", "--num-gpu-blocks-override", str(NUM_BLOCKS), "--block-size", str(BLOCK_SIZE))


@pytest.fixture(scope="module")
def own_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnHub]:
    with contextlib.closing(OwnHub(tmp_path_factory.mktemp("own-hub"))) as hub:
        hub.start()
        yield hub


@pytest.fixture(scope="module")
def small(pair_folder: Path, own_hub: OwnHub) -> Iterator[tuple[Asker, Relay]]:
    """A server with a small key-value cache at a hub of its own process, and ``far`` behind a relay."""
    environment = {**RUNNERS["v1"], "COSTEER_HUB": own_hub.address}
    with ExitStack() as stack:
        server = stack.enter_context(serving(pair_folder / "large", own_hub.logs, (*SERVER_OPTIONS, *SMALL_CACHE), environment))
        deployment = Deployment("v1", pair_folder, replace(server, hub=own_hub.address))
        relay = stack.enter_context(relay_to(own_hub.address))
        stack.enter_context(start_edge(deployment, relay.address, "far", own_hub.logs))
        yield Asker(deployment, stack.enter_context(ThreadPoolExecutor(32))), relay


def test_the_hub_is_killed_and_comes_back(small: tuple[Asker, Relay], own_hub: OwnHub, right: dict[str, list[list[int]]]) -> None:
    asker, far = small
    undisturbed = asker.ask(0).tokens
    far.stand_still_at(HALT_AT)
    answers = [asker.start(i, {"worker": "far", "fusion": FUSIONS[i % 2]}, stream=i < 2) for i in range(4)]
    assert far.stands_still.wait(60)
    own_hub.kill()
    assert asker.ask(0).tokens == undisturbed
    assert not any(answer.done() for answer in answers)
    far.restore()
    own_hub.start()
    for i, answer in enumerate(answers):
        assert answer.result(120).tokens == right[FUSIONS[i % 2]][i]
        assert asker.counts(answer.result()) == (NUM_TOKENS, 0)
    wait_until(lambda: asker.num_live() == 0, asker.deployment.server, 60.0)


def test_requests_that_are_held_are_preempted(small: tuple[Asker, Relay], right: dict[str, list[list[int]]]) -> None:
    asker, far = small
    url = f"{asker.deployment.server.url.removesuffix('/v1')}/metrics"

    def num_preempted() -> float:
        lines = httpx.get(url, trust_env=False).text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("vllm:num_preemptions_total"))

    before = num_preempted()
    undisturbed = [asker.ask(i, num_tokens=NUM_LONG).tokens for i in range(4)]
    far.stand_still_at(4)
    older = [asker.start(i, num_tokens=NUM_LONG) for i in range(4)]  # vLLM preempts whoever came last
    answers = [asker.start(i, {"worker": "far", "fusion": FUSIONS[i % 2]}) for i in range(4)]
    assert far.stands_still.wait(60)
    assert [answer.result(120).tokens for answer in older] == undisturbed
    assert num_preempted() > before
    assert not any(answer.done() for answer in answers)
    far.restore()
    for i, answer in enumerate(answers):
        assert answer.result(120).tokens == right[FUSIONS[i % 2]][i]
        assert asker.counts(answer.result()) == (NUM_TOKENS, 0)
    wait_until(lambda: asker.num_live() == 0, asker.deployment.server, 60.0)
