"""The large model's server, as the gateway calls it: every wait is bounded, and every failure becomes one sentence."""

import contextlib
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

import anyio
import httpx

from costeer_vllm import __version__
from costeer_vllm.addresses import is_loopback
from costeer_vllm.edge.answers import GatewayError

MAX_ANSWER_BYTES = 64 * 2**20  # of an answer that is not streamed
PROBE_S = 5.0
_PASSED_UP = ("accept", "x-request-id")  # headers of the app's request; others are made here
_PASSED_DOWN = ("content-type", "cache-control", "retry-after", "www-authenticate", "x-request-id")


@dataclass(frozen=True, slots=True)
class Patience:
    """How long the gateway waits, in seconds."""

    connect_s: float = 10.0
    answer_s: float = 600.0  # for the next byte of the server, as the openai client does
    client_s: float = 60.0  # for the app to send its request, and to take the next part of the answer
    counts_s: float = 2.0  # for the engine's counts, after the answer
    silence_s: float = 5.0  # for the next byte of an answer that nobody steers (any more): then the server is looked for
    end_s: float = 5.0  # for the server to end a stream, after its [DONE]


class Upstream:
    """A connection pool to one OpenAI-compatible server."""

    def __init__(self, server: str, key: str | None, passes_app_key: bool, patience: Patience) -> None:
        """``server``: its base URL, with /v1. ``key``: for it. ``passes_app_key``: what an app sends as its key is for it too."""
        self.server = server
        self._key, self._passes_app_key = key, passes_app_key
        # Other proxies than those of the environment are not known; to this machine itself none leads.
        use_environment = not is_loopback(urlsplit(server).hostname or "")
        timeout = httpx.Timeout(patience.answer_s, connect=patience.connect_s, write=patience.client_s, pool=patience.connect_s)
        # A server closes idle connections after a while (vLLM: 5 s); ours must be the first to close them.
        limits = httpx.Limits(max_connections=None, keepalive_expiry=2.0)
        headers = {"user-agent": f"costeer-gateway/{__version__}", "accept-encoding": "identity"}
        self._client = httpx.AsyncClient(
            headers=headers, timeout=timeout, limits=limits, trust_env=use_environment, follow_redirects=False
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    @contextlib.asynccontextmanager
    async def asked(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes | None = None
    ) -> AsyncIterator[httpx.Response]:
        """The server's answer, of which only the head has come; leaving the block early hangs up.

        Raises:
            GatewayError: 502 if the server cannot be reached, 504 if it takes too long.
        """
        request = self._client.build_request(method, f"{self.server}{path}", headers=self._headers(headers, body), content=body)
        with self.failures_told():
            response = await self._client.send(request, stream=True)
        try:
            if response.is_redirect:
                sentence = f"the server at {self.server} redirects elsewhere: give the address meant with --server"
                raise GatewayError(502, "server_redirects", sentence)
            yield response
        finally:
            await response.aclose()

    async def parts(self, response: httpx.Response) -> AsyncIterator[bytes]:
        """The body as it comes; raises GatewayError as ``asked`` does."""
        with self.failures_told():
            async for part in response.aiter_bytes():
                yield part

    async def read(self, response: httpx.Response) -> bytes:
        """The whole answer; raises GatewayError as ``asked`` does, and if it is longer than 64 MiB."""
        parts, num_bytes = [], 0
        async for part in self.parts(response):
            num_bytes += len(part)
            if num_bytes > MAX_ANSWER_BYTES:
                raise GatewayError(502, "bad_answer", f"the server's answer is longer than {MAX_ANSWER_BYTES} bytes")
            parts.append(part)
        return b"".join(parts)

    async def listens(self) -> bool:
        """Whether the server takes connections."""
        request = self._client.build_request("GET", f"{self.server}/models", headers={"connection": "close"})
        with anyio.move_on_after(PROBE_S):
            try:
                await (await self._client.send(request, stream=True)).aclose()  # its head is enough
            except httpx.ConnectError:
                return False
            except httpx.HTTPError:
                pass
        return True

    @contextlib.contextmanager
    def failures_told(self) -> Iterator[None]:
        """What httpx raises in the block becomes a GatewayError with a sentence of ours, for its own may quote anything."""
        try:
            yield
            return
        except httpx.TimeoutException as error:
            told = GatewayError(504, "server_timeout", f"the server at {self.server} took too long ({type(error).__name__})")
        except httpx.ConnectError:
            told = GatewayError(502, "server_unreachable", f"the server at {self.server} cannot be reached: is it running?")
        except httpx.HTTPError as error:
            sentence = f"the server at {self.server} broke off its answer ({type(error).__name__})"
            told = GatewayError(502, "server_broke_off", sentence)
        raise told

    def _headers(self, headers: Mapping[str, str], body: bytes | None) -> dict[str, str]:
        passes = (*_PASSED_UP, "authorization") if self._passes_app_key else _PASSED_UP
        passed = _chosen(headers, passes)
        if body is not None:
            passed["content-type"] = "application/json"
        if self._key is not None:
            passed["authorization"] = f"Bearer {self._key}"
        return passed


def passed_down(response: httpx.Response) -> dict[str, str]:
    """The headers of the server's answer that an app gets to see."""
    return _chosen(response.headers, _PASSED_DOWN)


def _chosen(headers: Mapping[str, str], names: tuple[str, ...]) -> dict[str, str]:
    """Those that are there, and can be written again as they were read."""
    return {name: headers[name] for name in names if name in headers and headers[name].isascii()}
