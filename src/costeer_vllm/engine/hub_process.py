"""Where the hub is: the one named in COSTEER_HUB, or one started here that lives and ends with the server."""

import atexit
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from costeer_vllm.engine import settings
from costeer_vllm.engine.link import check_hub
from costeer_vllm.errors import HubUnavailable, InvalidParameter

_START_TIMEOUT_S = 30.0


def ensure_hub() -> str:
    """Leave the hub's engine endpoint in COSTEER_HUB, for this process and its children, and return it.

    Raises:
        InvalidParameter: if COSTEER_HUB is not an address.
        HubUnavailable: if the hub cannot be reached, or cannot be started.
    """
    address = os.environ.get(settings.HUB)
    endpoint = resolve(address) if address else _start()
    check_hub(endpoint, settings.attach_key(), _START_TIMEOUT_S)
    os.environ[settings.HUB] = endpoint
    settings.cache_secret()
    return endpoint


def resolve(address: str, timeout_s: float = _START_TIMEOUT_S) -> str:
    """An address of a hub -> its engine endpoint; an HTTP address is asked for it, and awaited for up to ``timeout_s``."""
    if address.startswith(("tcp://", "ipc://")):
        return address
    url = urlsplit(address if "://" in address else f"http://{address}")
    scheme = {"ws": "http", "wss": "https"}.get(url.scheme, url.scheme)
    if scheme not in ("http", "https") or not url.hostname:
        raise InvalidParameter(
            settings.HUB, address, "host:port, http://host:port, ws://host:port, tcp://host:port or ipc://path"
        )
    health = _await_health(f"{scheme}://{url.netloc}/healthz", timeout_s)
    endpoint = str(health["engine_endpoint"])
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    if endpoint.startswith("tcp://") and host in ("0.0.0.0", "[::]", "*"):
        shown = f"[{url.hostname}]" if ":" in url.hostname else url.hostname
        return f"tcp://{shown}:{port}"
    return endpoint


def _start() -> str:
    host, port = settings.hub_host(), settings.hub_port()
    folder = Path(tempfile.mkdtemp(prefix="costeer-"))  # mode 0700: no other user can reach the socket in it
    endpoint = f"ipc://{folder}/engines"
    command = [sys.executable, "-m", "costeer_vllm.cli", "hub", "--host", host, "--port", str(port)]
    command += ["--engine-endpoint", endpoint, "--exit-with-parent"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    atexit.register(_stop, process, folder, os.getpid())
    reachable = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    shown = f"[{reachable}]" if ":" in reachable else reachable
    health = _await_health(f"http://{shown}:{port}/healthz", _START_TIMEOUT_S, process)
    if health.get("engine_endpoint") != endpoint:
        raise HubUnavailable(f"costeer: another hub listens on port {port}: set COSTEER_HUB=127.0.0.1:{port} or COSTEER_HUB_PORT")
    return endpoint


def _await_health(url: str, timeout_s: float, process: "subprocess.Popen[bytes] | None" = None) -> dict[str, object]:
    deadline = time.monotonic() + timeout_s
    problem = "no answer"
    while time.monotonic() < deadline:
        if process is not None and process.poll() is not None:
            raise HubUnavailable(
                f"costeer: the hub ended at start with exit code {process.returncode}; its own words are above. If the port is "
                "taken, set COSTEER_HUB_PORT, or COSTEER_HUB to use the hub that runs there"
            )
        try:
            answer = httpx.get(url, timeout=2.0, trust_env=False)
            health = answer.raise_for_status().json()
            if isinstance(health, dict) and "engine_endpoint" in health:
                return health
            problem = "the answer is not a hub's"
        except (httpx.HTTPError, ValueError) as error:
            problem = type(error).__name__
        time.sleep(0.05)
    raise HubUnavailable(f"costeer: no hub at {url} within {timeout_s:g} s ({problem}); start one with: costeer hub")


def _stop(process: "subprocess.Popen[bytes]", folder: Path, owner: int) -> None:
    if os.getpid() != owner:  # a forked child of the server must not end the server's hub
        return
    process.terminate()
    try:
        process.wait(3.0)
    except subprocess.TimeoutExpired:
        process.kill()
    (folder / "engines").unlink(missing_ok=True)
    folder.rmdir()
