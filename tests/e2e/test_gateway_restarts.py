"""Kill and restart the edge worker, the hub and the server under the gateway: its apps see a clear error or an honest answer."""

import contextlib
import itertools
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import httpx
import openai
import pytest

from costeer_vllm.demo.task import EVENTS
from costeer_vllm.processes import Running, edge_worker, free_port, running, wait_until

from .conftest import EDGE_OPTIONS, RUNNERS, SERVER_OPTIONS

FUSIONS = ("cloud", "edge")  # every fault meets requests of each
Component: TypeAlias = Literal["edge", "hub", "server"]
COMPONENTS: tuple[Component, ...] = get_args(Component)
ORDERS = tuple(itertools.permutations(COMPONENTS))
TWO_ORDERS = tuple(itertools.permutations(("edge", "hub")))
SIGNALS = (signal.SIGKILL, signal.SIGTERM)

QUERY = f"Write an invitation to the {EVENTS[2].name}."
DEADLINE_MS = 1000
NUM_TOKENS = 40
NUM_TOKENS_LONG, NUM_TOKENS_LONGEST = 300, 900  # one to be waited for, and one that outlasts every grace at the end of a process
NUM_EVENTS_UNDER_WAY = 8  # of a stream, before a fault hits it
PATIENCE_S = 60.0  # of an app: an answer that takes longer is a hang
RESTART_S = 200.0  # until a component is ready, and until all together steer again

# What an error must say for the component that is not there; an app that loses the gateway itself sees its own client's error.
NAMED_BY: dict[Component, str] = {
    "edge": r"^connection lost|worker_stops",
    "hub": r"not_attached|\bhub\b|no edge worker",
    "server": r"server_unreachable|server_broke_off|EngineCore|request was aborted",  # the third is vLLM's own
}
LOOKS_FOR_HUB = "Resolved architecture"  # vLLM's last words in the server's log before it looks for its hub
OWN_SESSION = [sys.executable, "-c", "import os, sys; os.setsid(); os.execv(sys.argv[1], sys.argv[1:])"]


# --- apps ---


@dataclass(frozen=True)
class Outcome:
    """What an app saw: a finished answer, or an error in words."""

    text: str = ""
    num_tokens: int = 0  # as the usage says
    costeer: dict[str, Any] = field(default_factory=dict)
    error: str = ""

    @property
    def counts(self) -> tuple[int | None, int | None]:
        """Tokens steered and missed, as far as they are known."""
        return self.costeer.get("tokens_steered"), self.costeer.get("tokens_missed")

    @property
    def essence(self) -> tuple[object, ...]:
        """What does not differ between two answers to the same request."""
        return self.text, self.num_tokens, self.counts, self.error


OnEvent: TypeAlias = Callable[[], object]
App: TypeAlias = Callable[[str, dict[str, Any], OnEvent], Outcome]  # the gateway's URL, the request, what to do at every event


def whole(url: str, request: dict[str, Any], on_event: OnEvent) -> Outcome:
    """Asks by the ``openai`` client, not streamed."""
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=PATIENCE_S) as client:
        try:
            answer: Any = client.chat.completions.create(**request)
        except openai.APIError as error:
            return Outcome(error=_words(error))
    return Outcome(answer.choices[0].message.content, answer.usage.completion_tokens, answer.costeer)


def streamed(url: str, request: dict[str, Any], on_event: OnEvent) -> Outcome:
    """Asks by the ``openai`` client, streamed."""
    chunks: list[Any] = []
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=PATIENCE_S) as client:
        try:
            for chunk in client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}):
                chunks.append(chunk)
                on_event()
        except (openai.APIError, httpx.TransportError) as error:
            return Outcome(error=_words(error))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    return Outcome(text, next(chunk.usage.completion_tokens for chunk in chunks if chunk.usage), chunks[-1].costeer)


def events(url: str, request: dict[str, Any], on_event: OnEvent) -> Outcome:
    """Asks by ``httpx``, streamed, and looks closely at how the stream ends."""
    body = {**request, **request["extra_body"], "stream": True, "stream_options": {"include_usage": True}}
    del body["extra_body"]
    lines: list[str] = []
    try:
        with (
            httpx.Client(trust_env=False, timeout=PATIENCE_S) as client,
            client.stream("POST", f"{url}/chat/completions", json=body) as answer,
        ):
            for line in filter(None, answer.iter_lines()):
                lines.append(line)
                on_event()
    except httpx.TransportError as error:
        return Outcome(error=_words(error))
    if not answer.is_success:
        return Outcome(error=_words_of(json.loads("".join(lines))["error"]))
    data = [line.removeprefix("data: ") for line in lines]
    chunks = [json.loads(event) for event in data if event != "[DONE]"]
    for i, chunk in enumerate(chunks):
        if error := chunk.get("error"):
            is_servers_own = not isinstance(error["code"], str)  # it goes through as it is, and so does what follows it
            assert is_servers_own or i == len(data) - 1, data[i:]
            return Outcome(error=_words_of(error))
    assert data[-1] == "[DONE]", "a stream that ends with neither an error nor [DONE]"
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"])
    return Outcome(
        text, next(chunk["usage"]["completion_tokens"] for chunk in chunks if chunk.get("usage")), chunks[-1]["costeer"]
    )


APPS: tuple[App, ...] = (whole, streamed, events)


def _words(error: Exception) -> str:
    if isinstance(error, (openai.APITimeoutError, httpx.TimeoutException)):
        raise AssertionError(f"an app waited {PATIENCE_S:g} s in vain") from error
    if isinstance(error, (openai.APIConnectionError, httpx.TransportError)):
        return f"connection lost: {type(error).__name__}"
    assert isinstance(error, openai.APIError)
    assert isinstance(error.body, dict), f"not in OpenAI's format: {error}"
    return _words_of(error.body)


def _words_of(error: dict[str, Any]) -> str:
    assert {"message", "type", "param", "code"} <= error.keys(), error
    return f"{error['code']}: {error['message']}"


def assert_clear(outcome: Outcome, *missing: Component) -> None:
    """It is an error that names what is missing, or an answer that is honest about every token."""
    if outcome.error:
        assert any(re.search(NAMED_BY[name], outcome.error) for name in missing), (outcome.error, missing)
    elif None in outcome.counts:
        assert outcome.costeer["note"]
    else:
        assert sum(filter(None, outcome.counts)) == outcome.num_tokens, outcome


# --- the components ---


@dataclass
class System:
    """A server, a hub of its own process and an edge worker with its gateway, each at the same addresses after every restart."""

    pair: Path
    logs: Path
    hub_port: int = field(default_factory=free_port)
    engine_port: int = field(default_factory=free_port)
    server_port: int = field(default_factory=free_port)
    gateway_port: int = field(default_factory=free_port)
    reference: dict[str, Outcome] = field(default_factory=dict)  # by fusion: the answer before all faults
    _running: dict[Component, Running] = field(default_factory=dict)
    _stacks: dict[Component, ExitStack] = field(default_factory=lambda: {name: ExitStack() for name in COMPONENTS})
    _starts: Iterator[int] = field(default_factory=itertools.count)

    # processes

    def start(self, *names: Component) -> None:
        """Start those that are not running, without waiting until they are ready."""
        for name in names:
            if not self.is_running(name):
                self._stacks[name].close()
                launch = {"edge": self._edge, "hub": self._hub, "server": self._server}[name]
                self._running[name] = self._stacks[name].enter_context(launch(self.logs / f"{next(self._starts)}-{name}"))

    def kill(self, name: Component, signum: signal.Signals) -> None:
        """Send a signal and wait for the end."""
        process = self._running[name].process
        process.send_signal(signum)
        process.wait(2 * PATIENCE_S)  # if it waits for answers that hang, the apps shall be the first to say so
        if signum == signal.SIGTERM and name != "server":  # vLLM's exit code is vLLM's affair
            assert process.returncode == 0, name

    def close(self) -> None:
        """End all of them."""
        for stack in self._stacks.values():
            stack.close()

    def is_running(self, name: Component) -> bool:
        """Whether it is running, ready or not."""
        return name in self._running and self._running[name].process.poll() is None

    def await_ready(self, name: Component) -> None:
        """Wait until it answers or, if that is a server that has no hub, until it waits for one."""
        process = self._running[name]
        if name == "server" and not self.is_running("hub"):
            wait_until(lambda: LOOKS_FOR_HUB in process.log_text, process, RESTART_S)
        else:
            wait_until(lambda: self.health(name) is not None, process, RESTART_S)

    def health(self, name: Component) -> dict[str, Any] | None:
        """What it says of its health; None if it does not answer."""
        port = {"edge": self.gateway_port, "hub": self.hub_port, "server": self.server_port}[name]
        try:
            answer = httpx.get(f"http://127.0.0.1:{port}/health{'' if name == 'server' else 'z'}", trust_env=False)
        except httpx.TransportError:
            return None
        return dict(answer.json() if answer.content else {}) if answer.is_success else None

    def _hub(self, folder: Path) -> Any:
        command = [sys.executable, "-m", "costeer_vllm.cli", "hub", "--port", str(self.hub_port)]
        return running([*command, "--engine-endpoint", f"tcp://127.0.0.1:{self.engine_port}"], folder / "hub.log", {})

    def _edge(self, folder: Path) -> Any:
        context = sorted((self.pair / "contexts").glob("*.md"))[0]
        server = f"http://127.0.0.1:{self.server_port}/v1"
        options = (*EDGE_OPTIONS, "--gateway", f"127.0.0.1:{self.gateway_port}", "--server", server)
        return edge_worker(f"127.0.0.1:{self.hub_port}", "device", self.pair / "small", context, folder, options, wait=False)

    @contextlib.contextmanager
    def _server(self, folder: Path) -> Iterator[Running]:
        command = [*OWN_SESSION, sys.executable, "-m", "costeer_vllm.cli", "serve", str(self.pair / "large")]
        command += ["--host", "127.0.0.1", "--port", str(self.server_port), *SERVER_OPTIONS]
        environment = {**RUNNERS["v1"], "HF_HUB_OFFLINE": "1", "COSTEER_HUB": f"127.0.0.1:{self.hub_port}"}
        environment["VLLM_SERVER_DEV_MODE"] = "1"  # for /pause
        try:
            with running(command, folder / "server.log", environment) as server:
                yield server
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.process.pid, signal.SIGKILL)  # a front end that was killed leaves its engine behind

    def tell_server(self, what: str) -> None:
        """One of vLLM's routes for whoever runs it."""
        httpx.post(f"http://127.0.0.1:{self.server_port}/{what}", trust_env=False, timeout=PATIENCE_S).raise_for_status()

    # requests

    def ask(
        self,
        app: App,
        fusion: str,
        on_event: OnEvent = lambda: None,
        num_tokens: int = NUM_TOKENS,
        deadline_ms: int = DEADLINE_MS,
    ) -> Outcome:
        """One greedy request for exactly so many tokens, which goes on without deltas where it must, answered in time."""
        costeer = {"on_missing": "continue", "deadline_ms": deadline_ms, **({} if fusion == "cloud" else {"fusion": fusion})}
        request = {
            "model": str(self.pair / "large"),
            "messages": [{"role": "user", "content": QUERY}],
            "temperature": 0,
            "max_tokens": num_tokens,
            "extra_body": {"costeer": costeer, "ignore_eos": True},
        }
        start = time.monotonic()
        outcome = app(f"http://127.0.0.1:{self.gateway_port}/v1", request, on_event)
        assert time.monotonic() - start < PATIENCE_S
        if not outcome.error:
            assert outcome.num_tokens == num_tokens, "an answer that was broken off looks finished"
            assert outcome.costeer["fusion"] == fusion
        return outcome

    def ask_all(self, *unready: Component) -> None:
        """Requests of every app and fusion end clearly; ``unready``: components that are running and may not work yet."""
        missing = [name for name in COMPONENTS if name in unready or not self.is_running(name)]
        for fusion, app in itertools.product(FUSIONS, APPS):
            assert_clear(self.ask(app, fusion), *missing)

    @contextlib.contextmanager
    def answers_under_way(self, *doomed: Component) -> Iterator[None]:
        """The block runs in the middle of long answers, of every app and fusion; all of them end clearly."""
        asked = list(itertools.product(FUSIONS, APPS))
        num_tokens = NUM_TOKENS_LONG if doomed == ("hub",) else NUM_TOKENS_LONGEST
        progress = [threading.Semaphore(0) for _ in asked]
        with ThreadPoolExecutor(len(asked)) as pool:
            answers = [
                pool.submit(self.ask, app, fusion, seen.release, num_tokens)
                for (fusion, app), seen in zip(asked, progress, strict=True)
            ]
            for (_, app), seen in zip(asked, progress, strict=True):
                for _ in range(NUM_EVENTS_UNDER_WAY if app is not whole else 0):
                    assert seen.acquire(timeout=PATIENCE_S)
            all_ = (1, 1, len(asked))
            wait_until(lambda: self._hub_holds() == all_ or any(answer.done() for answer in answers), self._running["hub"])
            yield
            for answer in answers:
                assert_clear(answer.result(), *doomed)

    def await_steering(self) -> None:
        """Ask until all is as before the faults, for a bounded time; what comes before that is clear, too."""
        deadline = time.monotonic() + RESTART_S
        for fusion, app in itertools.product(FUSIONS, APPS):
            while (outcome := self.ask(app, fusion)).essence != self.reference[fusion].essence:
                assert_clear(outcome, "hub", "server")
                assert all(self.is_running(name) for name in COMPONENTS)
                assert time.monotonic() < deadline, outcome
                time.sleep(0.1)
        wait_until(self._is_tidy, self._running["hub"], PATIENCE_S)

    def _is_tidy(self) -> bool:
        """Whether nothing is left of former answers and former processes."""
        edge = self.health("edge") or {}
        return self._hub_holds() == (1, 1, 0) and edge.get("attached") is True

    def _hub_holds(self) -> tuple[object, ...]:
        """Edge workers, engines and streams."""
        hub = self.health("hub") or {}
        return hub.get("workers"), hub.get("engines"), hub.get("streams")


@pytest.fixture(scope="module")
def components(pair_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """All three, and what they answer before any fault."""
    with contextlib.closing(System(pair_folder, tmp_path_factory.mktemp("restarts"))) as system:
        system.start("hub", "edge", "server")
        system.await_ready("hub")
        system.await_ready("server")
        for fusion in FUSIONS:
            found = system.reference[fusion] = system.ask(whole, fusion, deadline_ms=60_000)
            assert found.counts == (found.num_tokens, 0), found
        yield system


@pytest.fixture
def system(components: System) -> Iterator[System]:
    """All three, well, whatever the test before left behind; after the test no log holds an error of ours."""
    for name in ("hub", "edge", "server"):
        components.start(name)
        components.await_ready(name)
    components.await_steering()
    yield components
    for log in components.logs.rglob("*.log"):
        for traceback in log.read_text(errors="replace").split("Traceback (most recent call last)")[1:]:
            is_ours = log.stem != "server" or ("costeer_vllm/" in traceback and "EngineDeadError" not in traceback)
            assert not is_ours, (log, traceback[:4000])  # vLLM's own end passes through what we wrap


# --- faults ---

signals = pytest.mark.parametrize("signum", SIGNALS, ids=lambda signum: signum.name)


@signals
@pytest.mark.parametrize("name", COMPONENTS)
def test_one_ends_in_the_middle_of_answers(system: System, name: Component, signum: signal.Signals) -> None:
    with system.answers_under_way(name):
        system.kill(name, signum)
    system.ask_all()
    system.start(name)
    system.await_ready(name)
    system.await_steering()


def test_a_server_gives_up_what_it_answers(system: System) -> None:
    """As on SIGTERM, where it depends on the moment whether the short answers still get out."""
    with system.answers_under_way("server"):
        system.tell_server("pause?mode=abort")
    system.tell_server("resume")
    system.await_steering()


@signals
@pytest.mark.parametrize("name", ["edge", "hub"])  # a server's end between requests costs most and is among the orders below
def test_one_ends_between_requests(system: System, name: Component, signum: signal.Signals) -> None:
    system.kill(name, signum)
    system.ask_all()
    system.start(name)
    system.await_ready(name)
    system.await_steering()


@signals
def test_a_hub_is_back_before_the_answers_end(system: System, signum: signal.Signals) -> None:
    with system.answers_under_way("hub"):
        system.kill("hub", signum)
        system.start("hub")
        system.await_ready("hub")
    system.await_steering()


@pytest.mark.parametrize("restarted", TWO_ORDERS, ids="-".join)
@pytest.mark.parametrize("killed", TWO_ORDERS, ids="-".join)
@signals
def test_edge_and_hub_end_and_come_back_in_every_order(
    system: System, signum: signal.Signals, killed: tuple[Component, ...], restarted: tuple[Component, ...]
) -> None:
    with system.answers_under_way(*killed):
        for name in killed:
            system.kill(name, signum)
    come_back(system, restarted)


# Every order of ends and every order of restarts; each component is the first to end both in the middle of answers and between.
BUSY_SIGNAL = zip(itertools.cycle((True, False)), itertools.cycle((*SIGNALS, *reversed(SIGNALS))), strict=False)


@pytest.mark.parametrize(
    ("killed", "restarted", "is_busy", "signum"),
    [(*orders, *how) for *orders, how in zip(ORDERS, reversed(ORDERS), BUSY_SIGNAL, strict=False)],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else getattr(value, "name", f"busy={value}"),
)
def test_all_end_and_come_back_in_every_order(
    system: System, killed: tuple[Component, ...], restarted: tuple[Component, ...], is_busy: bool, signum: signal.Signals
) -> None:
    with system.answers_under_way(*killed) if is_busy else contextlib.nullcontext():
        for name in killed:
            system.kill(name, signum)
            if not is_busy:
                system.ask_all()
    come_back(system, restarted)


def come_back(system: System, names: tuple[Component, ...]) -> None:
    """Start in this order, with requests all the while, until all is well."""
    for name in names:
        system.ask_all("hub", "server")
        system.start(name)
        system.await_ready(name)
        system.ask_all("hub", "server")
    system.await_steering()
