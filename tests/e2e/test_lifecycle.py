"""Starting and ending: `costeer serve`, a hub that dies with its server, a hub elsewhere that restarts, and the examples."""

import contextlib
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from costeer_vllm.demo.task import EVENTS
from costeer_vllm.processes import edge_worker, free_port, running, serving, stop, wait_until

from .conftest import EDGE_OPTIONS, RUNNERS, SERVER_OPTIONS, family

ROOT = Path(__file__).parents[2]
QUERY = f"Write an invitation to the {EVENTS[2].name}."

# Runner V2's grammar kernel does not run under Triton's interpreter, so grammars are seen to on V1 only.
GRAMMAR: dict[str, Any] = {"extra_body": {"structured_outputs": {"choice": ["yes", "no"]}}}


def healthy(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/healthz", trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def chat(url: str, worker: str, **options: Any) -> Any:
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)
    steering = {"worker": worker, "on_missing": options.pop("on_missing", "wait"), "deadline_ms": 30_000}
    body = {"costeer": steering, **options.pop("extra_body", {"ignore_eos": True})}
    arguments: dict[str, Any] = {"max_tokens": 40, "temperature": 0, **options}
    return client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": QUERY}],
        extra_body=body,
        **arguments,
    )


def test_costeer_serve_runs_the_examples_and_takes_its_hub_along(pair_folder: Path, tmp_path: Path) -> None:
    port, hub_port = free_port(), free_port()
    command = [sys.executable, "-m", "costeer_vllm.cli", "serve", str(pair_folder / "large"), "--port", str(port)]
    command += ["--hub-port", str(hub_port), "--host", "127.0.0.1", *SERVER_OPTIONS]
    context = sorted((pair_folder / "contexts").glob("*.md"))[0]
    name = " ".join(word.capitalize() for word in context.stem.split("-"))
    with running(command, tmp_path / "server.log", {**RUNNERS["v1"], "HF_HUB_OFFLINE": "1"}) as server:
        wait_until(lambda: "Application startup complete" in server.log_text, server)
        with edge_worker(
            f"127.0.0.1:{hub_port}", "martin-laptop", pair_folder / "small", context, tmp_path, EDGE_OPTIONS
        ) as edge:
            for example in ("chat.py", "stream.py"):
                arguments = [sys.executable, str(ROOT / "examples" / example), f"http://127.0.0.1:{port}/v1", "martin-laptop"]
                printed = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=True).stdout
                assert name in printed.rpartition("---")[2]
                assert name not in printed.rpartition("---")[0]
            assert healthy(hub_port)
            assert chat(f"http://127.0.0.1:{port}/v1", "martin-laptop", **GRAMMAR).choices[0].message.content in ("yes", "no")
            _, *orphans = family(server)  # vLLM's engine outlives its front end
            os.kill(server.process.pid, signal.SIGKILL)
            server.process.wait()
            try:
                wait_until(lambda: not healthy(hub_port), edge, 30.0)
            finally:
                for process in orphans:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()


def test_a_hub_elsewhere_with_a_key_may_restart(pair_folder: Path, tmp_path: Path) -> None:
    port, engine_port, key = free_port(), free_port(), "an-attach-key"
    hub = [sys.executable, "-m", "costeer_vllm.cli", "hub", "--port", str(port)]
    hub += ["--engine-endpoint", f"tcp://127.0.0.1:{engine_port}"]
    secret = {"COSTEER_ATTACH_KEY": key}
    context = sorted((pair_folder / "contexts").glob("*.md"))[0]
    with ExitStack() as stack:
        first = stack.enter_context(running(hub, tmp_path / "hub.log", secret))
        wait_until(lambda: healthy(port), first)
        environment = {**RUNNERS["v1"], **secret, "COSTEER_HUB": f"127.0.0.1:{port}"}
        server = stack.enter_context(serving(pair_folder / "large", tmp_path, SERVER_OPTIONS, environment))
        small = pair_folder / "small"
        edge = stack.enter_context(edge_worker(f"127.0.0.1:{port}", "here", small, context, tmp_path, EDGE_OPTIONS, secret))
        before = chat(server.url, "here")
        stream = chat(
            server.url, "here", stream=True, stream_options={"include_usage": True}, max_tokens=600, on_missing="continue"
        )
        answered = [next(stream)]
        stop(first.process)
        with pytest.raises(openai.BadRequestError, match="hub"):
            chat(server.url, "here")
        answered += list(stream)
        assert answered[-1].usage.completion_tokens > 500  # the answer under way went on, its tokens plain
        second = stack.enter_context(running(hub, tmp_path / "hub-again.log", secret))
        wait_until(lambda: "attached now" in second.log_text, edge, 60.0)
        after = chat(server.url, "here")
        assert after.choices[0].message.content == before.choices[0].message.content
        logs = "".join(log.read_text() for log in tmp_path.glob("*.log"))
        assert key not in logs
        wrong = {"COSTEER_ATTACH_KEY": "another-key"}
        with pytest.raises(Exception, match="attach key"):
            stack.enter_context(edge_worker(f"127.0.0.1:{port}", "thief", small, context, tmp_path, EDGE_OPTIONS, wrong))


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({}, ["port", "COSTEER_HUB_PORT"]),
        ({"COSTEER_HUB_PORT": "many"}, ["COSTEER_HUB_PORT", "many"]),
        ({"COSTEER_HUB_HOST": "0.0.0.0"}, ["COSTEER_ATTACH_KEY"]),
        ({"COSTEER_HUB": "gopher://x"}, ["COSTEER_HUB", "gopher", "host:port"]),
    ],
)
def test_a_server_that_cannot_have_its_hub_says_so_and_ends(
    pair_folder: Path, tmp_path: Path, environment: dict[str, str], words: list[str]
) -> None:
    with ExitStack() as stack:
        if not environment:
            port = free_port()
            blocker = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"]
            process = stack.enter_context(running(blocker, tmp_path / "blocker.log", {}))
            wait_until(lambda: _listens(port), process, 30.0)
            environment = {"COSTEER_HUB_PORT": str(port)}
        with pytest.raises(Exception, match="ended with exit code") as failure:
            stack.enter_context(serving(pair_folder / "large", tmp_path, SERVER_OPTIONS, {**RUNNERS["v1"], **environment}))
    log = (tmp_path / "server.log").read_text()
    assert all(word in log for word in words), str(failure.value)


def _listens(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}", trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False
