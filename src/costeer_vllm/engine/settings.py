"""The environment of the server's processes, read in this one place.

COSTEER_HUB          where the hub is: tcp:// or ipc:// (its engine endpoint), or http://, ws:// or host:port (asked for it)
COSTEER_HUB_PORT     where a hub that the server starts on its own listens for edge workers (8770)
COSTEER_HUB_HOST     on which address (127.0.0.1); any but loopback demands COSTEER_ATTACH_KEY
COSTEER_ATTACH_KEY   the key that edge workers and engines must have
COSTEER_CACHE_SECRET what prefix-cache salts are derived from; made at start if not set
COSTEER_BOARD        where the processes of an engine share what they know of its streams; set by ourselves
"""

import os
import secrets
from pathlib import Path

from costeer_vllm.errors import HubUnavailable, InvalidParameter

HUB = "COSTEER_HUB"
CACHE_SECRET = "COSTEER_CACHE_SECRET"
BOARD = "COSTEER_BOARD"


def hub_endpoint() -> str:
    """The hub's engine endpoint, as ``hub_process.ensure_hub`` left it for this process and its children.

    Raises:
        HubUnavailable: if nothing has set it.
    """
    endpoint = os.environ.get(HUB)
    if not endpoint:
        raise HubUnavailable(f"costeer: {HUB} is not set here; was the server started with --logits-processor costeer?")
    return endpoint


def hub_host() -> str:
    """The address on which a hub of our own listens for edge workers."""
    return os.environ.get("COSTEER_HUB_HOST", "127.0.0.1")


def hub_port() -> int:
    """The port on which a hub of our own listens for edge workers.

    Raises:
        InvalidParameter: if COSTEER_HUB_PORT is not a port number.
    """
    value = os.environ.get("COSTEER_HUB_PORT", "8770")
    if not value.isdecimal() or not 1 <= int(value) <= 65_535:
        raise InvalidParameter("COSTEER_HUB_PORT", value, "a port number from 1 to 65535")
    return int(value)


def attach_key() -> str | None:
    """The attach key, if there is one."""
    return os.environ.get("COSTEER_ATTACH_KEY") or None


def cache_secret() -> bytes:
    """The secret behind the prefix-cache salts, shared by all processes of a server."""
    return os.environ.setdefault(CACHE_SECRET, secrets.token_hex(16)).encode()


def board() -> Path | None:
    """The path of this server's boards without the rank; None where ``hooks.py`` has set none."""
    path = os.environ.get(BOARD)
    return Path(path) if path else None
