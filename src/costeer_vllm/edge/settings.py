"""How an edge worker is started."""

import math
import re
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias, get_args
from urllib.parse import urlsplit, urlunsplit

import httpx

from costeer_vllm.addresses import is_loopback
from costeer_vllm.errors import InvalidParameter
from costeer_vllm.protocol.messages import Fusion

Encoding: TypeAlias = Literal["lossless", "sparse"]  # of a delta: see delta/
DType: TypeAlias = Literal["auto", "float32", "bfloat16"]


MAX_KEY: Final = 512  # characters, as in protocol.messages.Key


@dataclass(frozen=True)
class GatewaySettings:
    """The endpoint for the apps of this device.

    Raises:
        InvalidParameter: if a value cannot be used, or others could use it without a key; keys are never shown.
    """

    host: str
    port: int  # 0: any free port
    server: str  # base URL of the OpenAI API of the large model's server, with /v1
    key: str | None = field(default=None, repr=False)  # that apps must send
    server_key: str | None = field(default=None, repr=False)  # for the server, instead of what apps send

    def __post_init__(self) -> None:
        if not self.host or not 0 <= self.port < 2**16:
            raise InvalidParameter("gateway", f"{self.host}:{self.port}", "host:port with a port from 0 to 65535")
        if self.key is None and not is_loopback(self.host):
            raise InvalidParameter("gateway", self.host, "a loopback address, or a key must be set (COSTEER_GATEWAY_KEY)")
        check_server(self.server)
        for option, key in (("gateway_key", self.key), ("server_key", self.server_key)):
            if key is not None and not (re.fullmatch(r"[\x21-\x7e]+", key) and len(key) <= MAX_KEY):
                allowed = f"1 to {MAX_KEY} printable ASCII characters without spaces, as a header can carry"
                raise InvalidParameter(option, f"{len(key)} characters long", allowed)


@dataclass(frozen=True)
class EdgeSettings:
    """Everything an edge worker is started with.

    Raises:
        InvalidParameter: if a value cannot be used; keys are never shown.
    """

    hub: str  # ws://, wss://, http://, https:// or host:port
    name: str
    model: str  # a directory, or a name in the model hub
    context: str | None  # path of the private context: a file or a folder
    contexts: str | None = None  # path of a file of contexts that requests choose by name
    context_tokens: int | None = None  # the most of a long context that stands before a query; None: see retrieval.budget
    reranker: str | None = None  # a directory, or a name in the model hub, of a cross-encoder that chooses among it
    template: str | None = None  # path of a chat template instead of the tokenizer's own
    attach_key: str | None = field(default=None, repr=False)
    steering_key: str | None = field(default=None, repr=False)
    delta: Encoding = "sparse"
    dtype: DType = "auto"
    device: str = "auto"
    max_streams: int = 64
    look_ahead: bool = True  # tell deltas before they are asked for, where the round trip is worth it: see ahead.py
    threads: int | None = None
    gateway: GatewaySettings | None = None
    tokens_only: bool = False  # no delta ever leaves this device: edge fusion or none
    ledger: str | None = None  # path of the file in which every stream is entered; None: no ledger
    max_bits: float | None = None  # what a request's answer may tell at the most, whatever it asks for: edge fusion only

    def __post_init__(self) -> None:
        attach_url(self.hub)
        if self.context is None and self.contexts is None:
            raise InvalidParameter("context", None, "a text file or a folder, unless --contexts names a file of contexts")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._@:-]{0,127}", self.name):
            raise InvalidParameter("name", self.name, "1 to 128 letters, digits and ._@:- and begin with a letter or digit")
        for option, value, allowed in (("delta", self.delta, get_args(Encoding)), ("dtype", self.dtype, get_args(DType))):
            if value not in allowed:
                raise InvalidParameter(option, value, f"one of {', '.join(allowed)}")
        for option, key in (("attach_key", self.attach_key), ("steering_key", self.steering_key)):
            if key is not None and not 1 <= len(key) <= MAX_KEY:
                raise InvalidParameter(option, f"{len(key)} characters long", f"1 to {MAX_KEY} characters long")
        if not 1 <= self.max_streams <= 4096:
            raise InvalidParameter("max_streams", self.max_streams, "from 1 to 4096")
        if self.threads is not None and self.threads < 1:
            raise InvalidParameter("threads", self.threads, "1 or more")
        if self.max_bits is not None and not (self.tokens_only and 0 <= self.max_bits < math.inf):
            raise InvalidParameter("max_bits", self.max_bits, "a number of bits, 0 or more, and given with --tokens-only")

    @property
    def fusions(self) -> tuple[Fusion, ...]:
        """What this device consents to, what it prefers first."""
        return ("edge",) if self.tokens_only else ("cloud", "edge")


def attach_url(hub: str) -> str:
    """Where a hub takes attachments: ``host:8770`` -> ``ws://host:8770/v1/attach``; raises InvalidParameter."""
    allowed = "the hub's address, such as ws://server:8770, https://hub.example.org or server:8770"
    try:
        parts = urlsplit(hub if "://" in hub else f"ws://{hub}")
        scheme = {"http": "ws", "https": "wss"}.get(parts.scheme, parts.scheme)
        _ = parts.port  # raises ValueError outside 0-65535
    except ValueError:
        raise InvalidParameter("hub", hub, allowed) from None
    if scheme not in ("ws", "wss") or not parts.hostname or "@" in parts.netloc or parts.query or parts.fragment:
        raise InvalidParameter("hub", hub, allowed)
    path = parts.path.rstrip("/").removesuffix("/v1/attach")
    return urlunsplit((scheme, parts.netloc, f"{path}/v1/attach", "", ""))


def gateway_settings(
    address: str | None, server: str | None, key: str | None = None, server_key: str | None = None
) -> GatewaySettings | None:
    """``--gateway HOST:PORT --server URL``, which belong together -> GatewaySettings; raises InvalidParameter."""
    if address is None and server is None:
        return None
    if address is None:
        raise InvalidParameter("gateway", None, "an address such as 127.0.0.1:8787, since --server is given")
    if server is None:
        raise InvalidParameter("server", None, "the address of the server's API such as http://server:8000/v1, for the gateway")
    host, _, port = address.rpartition(":")
    if not host or not re.fullmatch(r"[0-9]{1,5}", port):
        raise InvalidParameter("gateway", address, "host:port, such as 127.0.0.1:8787")
    return GatewaySettings(host.removeprefix("[").removesuffix("]"), int(port), server.rstrip("/"), key, server_key)


def check_server(server: str) -> None:
    """Raises InvalidParameter unless it is the base URL of an API."""
    try:
        parts = urlsplit(server)
        is_usable = parts.scheme in ("http", "https") and bool(re.fullmatch(r"[A-Za-z0-9._:%-]+", parts.hostname or ""))
        _ = parts.port  # raises ValueError outside 0-65535
        _ = httpx.URL(server).host  # raises what would be raised at every request
    except (ValueError, httpx.InvalidURL):
        is_usable = False
    if not is_usable or "@" in parts.netloc or parts.query or parts.fragment or not server.isascii() or not server.isprintable():
        shown = server if "@" not in server else "one with a user name"
        raise InvalidParameter("server", shown, "the address of the server's API, such as http://server:8000/v1")
