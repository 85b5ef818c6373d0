"""Mixed load for a while, edge workers coming and going: every answer is right, an error or honestly counted, and nothing grows.

COSTEER_SOAK_S says for how long, in seconds (60); the schedule is random with a fixed seed. One edge worker stays well, one is
killed and started again and again, and one is behind a link that delays, loses, repeats, stands still and breaks.
"""

import contextlib
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from costeer_vllm.processes import Running, edge_worker, free_port, serving, wait_until
from costeer_vllm.protocol.messages import Advance, Candidates, Choice, Delta

from .conftest import EDGE_OPTIONS, RUNNERS, SERVER_OPTIONS, Deployment, family, hub_process
from .links import PASSED, Fault, Relay, at, delayed, relay_to
from .reference import NUM_TOKENS, PARAMS, queries

SOAK_S = float(os.environ.get("COSTEER_SOAK_S", "60"))
WARM_UP_S = min(max(20.0, SOAK_S / 4), 60.0)  # by then every process has grown to its size
NUM_CLIENTS, NUM_QUERIES = 8, 16
WORKERS = ("steady", "coming", "far")
CLIENT_S = 120.0  # an answer that takes longer is a hang
SMALL_CACHE = ("--num-gpu-blocks-override", "40", "--block-size", "32")  # all of it is used early, and requests are preempted
MOST_MIB = {"hub": 16, "server": 64, "steady": 32}  # that a process may grow by after the warm-up
MOST_DESCRIPTORS = 4  # more than before: connections that a client or a monitor has just closed
MOST_THREADS = 4  # more than before: asyncio's pool has (cores + 4) at the most and starts them one by one


@dataclass
class System:
    """A server, its hub and its edge workers."""

    deployment: Deployment
    hub: Running
    steady: Running
    far: Relay
    start_coming: Callable[[], contextlib.AbstractContextManager[Running]]
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)

    def health(self) -> dict[str, Any]:
        """What the hub says."""
        return dict(httpx.get(f"http://{self.deployment.server.hub}/healthz", trust_env=False).json())


@pytest.fixture
def system(pair_folder: Path, tmp_path: Path) -> Iterator[System]:
    port = free_port()
    with ExitStack() as stack:
        hub = stack.enter_context(hub_process(port, free_port(), tmp_path / "hub.log"))
        environment = {**RUNNERS["v1"], "COSTEER_HUB": f"127.0.0.1:{port}"}
        server = stack.enter_context(serving(pair_folder / "large", tmp_path, (*SERVER_OPTIONS, *SMALL_CACHE), environment))
        deployment = Deployment("v1", pair_folder, replace(server, hub=f"127.0.0.1:{port}"))

        def edge(name: str, hub_address: str, wait: bool = True) -> contextlib.AbstractContextManager[Running]:
            context, small = deployment.contexts()[0], pair_folder / "small"
            return edge_worker(hub_address, name, small, context, tmp_path, EDGE_OPTIONS, wait=wait)

        relay = stack.enter_context(relay_to(f"127.0.0.1:{port}"))
        stack.enter_context(edge("far", relay.address))
        steady = stack.enter_context(edge("steady", f"127.0.0.1:{port}"))
        yield System(deployment, hub, steady, relay, lambda: edge("coming", f"127.0.0.1:{port}", wait=False))


# --- clients ---


@dataclass(frozen=True)
class Ask:
    """One request of the schedule."""

    number: int
    worker: str | None  # None: plain
    fusion: str
    on_missing: str
    deadline_ms: int
    is_streamed: bool
    leaves_after: int | None  # chunks; None: stays until the end

    @property
    def costeer(self) -> dict[str, Any] | None:
        """The request's object."""
        if self.worker is None:
            return None
        return {"worker": self.worker, "fusion": self.fusion, "T": PARAMS.T, "on_missing": self.on_missing,
                "deadline_ms": self.deadline_ms}  # fmt: skip


def next_ask(chance: random.Random) -> Ask:
    is_streamed = chance.random() < 0.5
    return Ask(
        number=chance.randrange(NUM_QUERIES),
        worker=None if chance.random() < 0.25 else chance.choice(WORKERS),
        fusion=chance.choice(("cloud", "edge")),
        on_missing=chance.choice(("wait", "continue", "fail")),
        deadline_ms=chance.choice((500, 3_000, 30_000)),
        is_streamed=is_streamed,
        leaves_after=chance.randrange(1, NUM_TOKENS // 2) if is_streamed and chance.random() < 0.3 else None,
    )


def answered(system: System, ask: Ask) -> tuple[str, list[int]] | str | None:
    """The answer's id and tokens, the words of an error, or None if the client left."""
    client = system.deployment.client.with_options(timeout=CLIENT_S)
    tokens: list[int] = []
    try:
        answer: Any = client.chat.completions.create(
            model=system.deployment.model,
            messages=[{"role": "user", "content": queries()[ask.number]}],
            max_tokens=NUM_TOKENS,
            temperature=0,
            stream=ask.is_streamed,
            extra_body={"ignore_eos": True, "return_token_ids": True, "costeer": ask.costeer},
        )
        for i, part in enumerate(answer if ask.is_streamed else [answer]):
            tokens += [token for choice in part.choices for token in getattr(choice, "token_ids", None) or ()]
            if i == ask.leaves_after:
                answer.close()
                return None
    except openai.APIError as error:
        return error.message
    finally:
        client.close()
    return part.id, tokens


def check(system: System, ask: Ask, right: dict[str, list[list[int]]]) -> str:
    """Ask, and say which of the outcomes that are allowed it was."""
    found = answered(system, ask)
    if found is None:
        return "left"
    if isinstance(found, str):
        assert ask.worker is not None, (ask, found)
        if "no edge worker" in found:
            assert ask.worker in ("coming", "far"), (ask, found)
            return "refused"
        assert f"costeer: edge worker '{ask.worker}', token " in found, (ask, found)
        assert ask.on_missing != "continue", (ask, found)
        return f"error, {ask.on_missing}"
    request_id, tokens = found
    assert len(tokens) == NUM_TOKENS, (ask, tokens)
    if ask.worker is None:
        assert tokens == right["plain"][ask.number], ask
        return "plain"
    account = system.deployment.account(request_id)
    steered, missed = account["tokens_steered"], account["tokens_missed"]
    assert steered + missed == NUM_TOKENS, (ask, account)
    if missed:
        assert ask.on_missing == "continue", (ask, account)
        return "with missed tokens"
    assert tokens == right[ask.fusion][ask.number], (ask, account)
    return "fully steered"


# --- faults ---


def disturb_far(system: System, chance: random.Random, stop: threading.Event) -> None:
    """One fault after the other on the link of ``far``."""
    far = system.far

    def begin(up: Fault = lambda message: PASSED, down: Fault = lambda message: PASSED) -> None:
        far.up, far.down = up, down

    answers, questions, somewhere = (Delta, Choice), (Advance, Candidates), range(0, NUM_TOKENS, 10)
    while not stop.is_set():
        faults: dict[str, Callable[[], None]] = {
            "delayed": lambda: begin(delayed(0.03), delayed(0.03)),
            "answers lost": lambda: begin(up=at(somewhere, answers, ())),
            "questions lost": lambda: begin(down=at(somewhere, questions, ())),
            "answers repeated": lambda: begin(up=at(somewhere, answers, (0.0, 0.05))),
            "questions repeated": lambda: begin(down=at(somewhere, questions, (0.0, 0.05))),
            "stands still": far.stand_still,
            "cut": far.cut,
        }
        name = chance.choice(list(faults))
        system.faults[name] += 1
        faults[name]()
        stop.wait(chance.uniform(0.5, 5.0))
        if name == "stands still" and chance.random() < 0.5:
            far.cut()
        far.restore()
        stop.wait(chance.uniform(0.5, 3.0))


def start_and_kill(system: System, chance: random.Random, stop: threading.Event) -> None:
    """``coming`` comes and goes."""
    while not stop.is_set():
        with system.start_coming() as edge:
            stop.wait(chance.uniform(8.0, 20.0))
            if not stop.is_set():
                system.faults["killed"] += 1
                edge.process.send_signal(chance.choice((signal.SIGKILL, signal.SIGTERM)))
                edge.process.wait(60)
        stop.wait(chance.uniform(0.5, 6.0))


def soak(system: System, right: dict[str, list[list[int]]], seconds: float, seed: int) -> None:
    """Clients and faults for so long, then peace: nothing is live any more."""
    stop = threading.Event()
    until = time.monotonic() + seconds

    def client(i: int) -> None:
        chance = random.Random(seed * 1000 + i)
        while time.monotonic() < until:
            system.outcomes[check(system, next_ask(chance), right)] += 1

    with ThreadPoolExecutor(NUM_CLIENTS + 2) as pool:
        try:
            nuisances = [
                pool.submit(disturb, system, random.Random(seed * 1000 + 100 + i), stop)
                for i, disturb in enumerate((disturb_far, start_and_kill))
            ]
            clients = [pool.submit(client, i) for i in range(NUM_CLIENTS)]
            for future in as_completed(clients):
                future.result()
        finally:
            stop.set()
        for future in nuisances:
            future.result()

    def is_idle() -> bool:
        health = system.health()
        return (health["streams"], health["workers"], health["engines"]) == (0, 2, 1)

    wait_until(is_idle, system.hub, 120.0)


# --- what must not grow ---


def measured(system: System) -> dict[str, dict[str, int]]:
    """Of each component: resident memory in MiB, open descriptors, threads and processes."""
    components = {"hub": system.hub, "server": system.deployment.server, "steady": system.steady}
    return {
        name: {
            "MiB": sum(process.memory_info().rss for process in family(component)) // 2**20,
            "descriptors": sum(process.num_fds() for process in family(component)),
            "threads": sum(process.num_threads() for process in family(component)),
            "processes": len(family(component)),
        }
        for name, component in components.items()
    }


@pytest.mark.timeout(SOAK_S + WARM_UP_S + 600)
def test_mixed_load_with_edge_workers_that_come_and_go(
    system: System, expected: list[list[int]], expected_of_candidates: list[list[int]], tmp_path: Path
) -> None:
    plain = [system.deployment.chat(query, max_tokens=NUM_TOKENS, extra_body={"ignore_eos": True, "return_token_ids": True})
             for query in queries()[:NUM_QUERIES]]  # fmt: skip
    right = {"plain": [answer.choices[0].token_ids for answer in plain], "cloud": expected, "edge": expected_of_candidates}
    soak(system, right, WARM_UP_S, seed=1)
    before = measured(system)
    soak(system, right, SOAK_S, seed=2)
    after = measured(system)
    print(json.dumps({"outcomes": system.outcomes, "faults": system.faults, "before": before, "after": after}))
    for name, most_mib in MOST_MIB.items():
        assert after[name]["MiB"] <= before[name]["MiB"] + most_mib, (before, after)
        assert after[name]["descriptors"] <= before[name]["descriptors"] + MOST_DESCRIPTORS, (before, after)
        assert after[name]["threads"] <= before[name]["threads"] + MOST_THREADS, (before, after)
        assert after[name]["processes"] == before[name]["processes"], (before, after)
    assert {"plain", "fully steered", "left"} <= system.outcomes.keys(), system.outcomes
