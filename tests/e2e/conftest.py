"""Real servers for the end-to-end tests: the demo pair on both of vLLM's model runners, with real hubs and edge workers."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from costeer_vllm.demo.export import export
from costeer_vllm.processes import Running, Server, edge_worker, running, serving, wait_until
from costeer_vllm.request import DEFAULT_CANDIDATES

from . import reference

RUNNERS = {
    "v1": {"VLLM_USE_V2_MODEL_RUNNER": "0"},
    # Model Runner V2 on a CPU: under Triton's interpreter, see mrv2_on_cpu/sitecustomize.py
    "v2": {
        "COSTEER_MRV2_ON_CPU": "1",
        "TRITON_INTERPRET": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(Path(__file__).parent / "mrv2_on_cpu"), os.environ.get("PYTHONPATH")))),
    },
}
SERVER_OPTIONS = ("--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "16", "--dtype", "float32")
EDGE_OPTIONS = ("--delta", "lossless", "--dtype", "float32", "--threads", "1")
STEERING_KEY = "a-steering-key-that-no-log-may-hold"


@dataclass
class Deployment:
    """A server with two edge workers: ``open`` for anyone, ``keyed`` for those who have the steering key."""

    runner: str
    folder: Path
    server: Server
    edges: dict[str, Running] = field(default_factory=dict)

    def logs(self) -> str:
        """Every line of every process so far; the hub writes into the server's log."""
        return "".join(process.log_text for process in (self.server, *self.edges.values()))

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.server.url, api_key="none", max_retries=0, timeout=300)

    @property
    def model(self) -> str:
        return str(self.folder / "large")

    def contexts(self) -> list[Path]:
        return sorted((self.folder / "contexts").glob("*.md"))

    def chat(self, content: str, steering: dict[str, Any] | None = None, **options: Any) -> Any:
        """One greedy chat completion unless ``options`` say otherwise; steered if ``steering`` is given."""
        body = dict(options.pop("extra_body", {}))
        if steering is not None:
            body["costeer"] = {"worker": "open", "deadline_ms": 60_000, **steering}
        arguments: dict[str, Any] = {"model": self.model, "max_tokens": 48, "temperature": 0, **options}
        return self.client.chat.completions.create(messages=[{"role": "user", "content": content}], extra_body=body, **arguments)

    def account(self, request_id: str) -> dict[str, Any]:
        """The hub's account of a request once all of its streams have ended."""
        return self.server.account(request_id)


def family(process: Running) -> list[psutil.Process]:
    """A process and all that it has started."""
    parent = psutil.Process(process.process.pid)
    return [parent, *parent.children(recursive=True)]


@contextmanager
def hub_process(port: int, engine_port: int, log: Path) -> Iterator[Running]:
    """A hub of its own process on loopback, as COSTEER_HUB names it, ready."""
    command = [sys.executable, "-m", "costeer_vllm.cli", "hub", "--port", str(port)]
    with running([*command, "--engine-endpoint", f"tcp://127.0.0.1:{engine_port}"], log, {}) as process:
        wait_until(lambda: "hub ready" in process.log_text, process)
        yield process


@pytest.fixture(scope="session")
def pair_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo pair, its contexts and queries, as ``costeer demo --export`` writes them."""
    return export(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="session")
def expected(pair_folder: Path) -> list[list[int]]:
    """The tokens that Algorithm 1 generates for each of ``reference.queries()`` under the context of ``open``."""
    return reference.generate(pair_folder)


@pytest.fixture(scope="session")
def expected_of_candidates(pair_folder: Path) -> list[list[int]]:
    """The same where the device sees only the 64 likeliest tokens of the large model."""
    return reference.generate(pair_folder, DEFAULT_CANDIDATES)


@pytest.fixture(scope="session")
def deploy(pair_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """A context manager that brings a deployment up on one of the runners."""

    def start(stack: ExitStack, runner: str, *options: str) -> Deployment:
        logs = tmp_path_factory.mktemp(f"logs-{runner}")
        started = serving(
            pair_folder / "large", logs, (*SERVER_OPTIONS, *options), {**RUNNERS[runner], "VLLM_LOGGING_LEVEL": "DEBUG"}
        )
        deployment = Deployment(runner, pair_folder, stack.enter_context(started))
        for name, context, key in (("open", 0, None), ("keyed", 1, STEERING_KEY)):
            environment = {} if key is None else {"COSTEER_KEY": key}
            edge = edge_worker(
                deployment.server.hub,
                name,
                pair_folder / "small",
                deployment.contexts()[context],
                logs,
                EDGE_OPTIONS,
                environment,
            )
            deployment.edges[name] = stack.enter_context(edge)
        return deployment

    return start


@pytest.fixture(scope="session", params=list(RUNNERS))
def deployment(request: pytest.FixtureRequest, deploy: Callable[..., Deployment]) -> Iterator[Deployment]:
    """The pair served on each runner in turn, with logging at its most talkative."""
    with ExitStack() as stack:
        yield deploy(stack, request.param, "--enable-log-requests", "--enable-prompt-tokens-details")
