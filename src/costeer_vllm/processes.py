"""Start a real server and real edge workers, wait until they are ready, stop them again: for the demo, benchmarks and tests."""

import contextlib
import ctypes
import functools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from costeer_vllm.errors import CoSteerError
from costeer_vllm.serve import has_cuda, vllm_executable

START_TIMEOUT_S = 300.0  # loading and warming up a large model
PR_SET_PDEATHSIG = 1  # of prctl(2)


class StartFailed(CoSteerError):
    """A process ended or did not become ready in time; the message holds the end of its log."""


@dataclass(frozen=True, slots=True)
class Running:
    """A process of ours and where its output goes."""

    process: "subprocess.Popen[bytes]"
    log: Path

    @property
    def log_text(self) -> str:
        """Everything that it printed so far."""
        return self.log.read_text(errors="replace")


@dataclass(frozen=True, slots=True)
class Server(Running):
    """A vLLM server with its hub."""

    url: str  # of the OpenAI API, with /v1
    hub: str  # host:port of the hub for edge workers and HTTP

    def workers(self) -> list[str]:
        """Names of the attached edge workers."""
        answer = httpx.get(f"http://{self.hub}/v1/workers", trust_env=False, timeout=30.0).raise_for_status().json()
        return [worker["name"] for worker in answer["workers"]]

    def account(self, request_id: str) -> dict[str, Any]:
        """The hub's account of a request, tokens steered and missed, once all of its streams have ended."""
        url, accounts = f"http://{self.hub}/v1/streams/{request_id}", []

        def is_final() -> bool:
            answer = httpx.get(url, trust_env=False, timeout=30.0)
            if answer.status_code == 404:  # its beginning is still on the way
                return False
            accounts.append(answer.raise_for_status().json())
            return all(stream["state"] == "finished" for stream in accounts[-1]["streams"])

        wait_until(is_final, self, 30.0)
        return dict(accounts[-1])


def free_port() -> int:
    """A TCP port on loopback that nobody uses at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def serving(
    model: Path | str,
    folder: Path,
    options: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    steering: bool = True,
    timeout_s: float = START_TIMEOUT_S,
) -> Iterator[Server]:
    """``vllm serve MODEL [--logits-processor costeer]`` on free ports, ready; logs to ``folder``.

    Raises:
        StartFailed: with the end of the log.
    """
    port, hub_port = free_port(), free_port()
    command = [vllm_executable(), "serve", str(model), "--port", str(port), "--host", "127.0.0.1", *options]
    command += ["--logits-processor", "costeer"] if steering else []
    variables = {"COSTEER_HUB_PORT": str(hub_port), "VLLM_NO_USAGE_STATS": "1", **_offline_if_local(model)}
    if not has_cuda():
        variables["VLLM_CPU_KVCACHE_SPACE"] = "1"
        command += ["--gpu-memory-utilization", "0.3"]
    with running(command, folder / "server.log", {**variables, **(environment or {})}) as started:
        server = Server(started.process, started.log, f"http://127.0.0.1:{port}/v1", f"127.0.0.1:{hub_port}")
        wait_until(lambda: _answers(f"http://127.0.0.1:{port}/health"), started, timeout_s)
        yield server


@contextlib.contextmanager
def edge_worker(
    hub: str,
    name: str,
    model: Path | str,
    context: Path | None,
    folder: Path,
    options: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    wait: bool = True,
    timeout_s: float = START_TIMEOUT_S,
) -> Iterator[Running]:
    """``costeer edge`` under ``name``, attached to the hub at ``host:port`` unless not to ``wait``; logs to ``folder``.

    Raises:
        StartFailed: with the end of the log.
    """
    command = [sys.executable, "-m", "costeer_vllm.cli", "edge", "--hub", f"ws://{hub}", "--name", name]
    command += ["--model", str(model), *options]
    command += [] if context is None else ["--context", str(context)]
    variables = {**_offline_if_local(model), "XDG_STATE_HOME": str(folder)}  # the user's ledger is for the user's own answers
    with running(command, folder / f"edge-{name}.log", {**variables, **(environment or {})}) as edge:
        if wait:
            wait_until(lambda: "attached as" in edge.log_text, edge, timeout_s)
        yield edge


@contextlib.contextmanager
def running(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Iterator[Running]:
    """A child process with its output in ``log``; terminated, and killed after 20 s, at the end."""
    log.parent.mkdir(parents=True, exist_ok=True)
    # The user's own hub and keys are for the user's own servers.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("COSTEER_")}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**inherited, **environment},
            preexec_fn=_end_with_parent(),
        )
    try:
        yield Running(process, log)
    finally:
        stop(process)


def _end_with_parent() -> Callable[[], object] | None:
    """Has the child told to terminate when this process dies, however it dies; None where the system cannot do that."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up here: after the fork little is safe
    return functools.partial(prctl, PR_SET_PDEATHSIG, signal.SIGTERM)


def _offline_if_local(model: Path | str) -> dict[str, str]:
    """A model in a folder needs no model hub, and one that cannot be reached would be waited for."""
    return {"HF_HUB_OFFLINE": "1"} if os.path.isdir(model) else {}


def stop(process: "subprocess.Popen[bytes]") -> None:
    """Terminate, wait, and if need be kill."""
    process.terminate()
    try:
        process.wait(20.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def wait_until(condition: Any, watched: Running, timeout_s: float = START_TIMEOUT_S) -> None:
    """Poll ``condition()`` until it is true; fail at once if the process ends before."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if watched.process.poll() is not None:
            raise StartFailed(f"{watched.log.stem} ended with exit code {watched.process.returncode}:\n{_end_of(watched.log)}")
        if time.monotonic() > deadline:
            raise StartFailed(f"{watched.log.stem} was not ready within {timeout_s:g} s:\n{_end_of(watched.log)}")
        time.sleep(0.05)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2.0, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def _end_of(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-30:])
