"""The gateway: an OpenAI-compatible endpoint on the device, in the edge worker's process and event loop.

Apps talk to it as they would to the server. It forwards the plain query with the right ``costeer`` object; the private context
stays here. The routes to the server are in ``completions.py``; here is who may use them, and how they are served.
"""

import asyncio
import contextlib
import functools
import logging
import re
import socket
from collections.abc import Callable, Iterator, Mapping

import uvicorn
from fastapi import FastAPI, Request, Response
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from costeer_vllm import __version__
from costeer_vllm.edge.answers import GatewayError
from costeer_vllm.edge.books import Books
from costeer_vllm.edge.completions import Completions, Device, Models
from costeer_vllm.edge.connections import Connection
from costeer_vllm.edge.context import PrivateContexts
from costeer_vllm.edge.page import Page
from costeer_vllm.edge.prompts import where
from costeer_vllm.edge.settings import EdgeSettings, GatewaySettings
from costeer_vllm.edge.upstream import Patience, Upstream
from costeer_vllm.errors import InvalidParameter
from costeer_vllm.protocol import keys

OPEN = ("/", "/healthz")  # without a key, and from wherever a link leads here: they show nothing of anybody
ROUTES = "GET /v1/models, POST /v1/chat/completions, POST /v1/completions, GET /healthz and the page at /"
SPARE_CONNECTIONS = 256  # beyond those that max_streams requests take
STOP_TIMEOUT_S = 5.0

log = logging.getLogger("costeer.edge")


class Gateway:
    """The endpoint of one edge worker. ``serve`` it beside the worker; it ends when that is cancelled."""

    def __init__(
        self,
        settings: EdgeSettings,
        steerable: Callable[[], PrivateContexts | None],
        books: Books,
        patience: Patience | None = None,
    ) -> None:
        """Takes the address, so that another program's use of it is told at once.

        ``steerable``: the contexts while the worker is attached to its hub. ``books``: see all of its frames.

        Raises:
            InvalidParameter: if the address cannot be used.
        """
        assert settings.gateway is not None
        self._settings, patience = settings.gateway, patience or Patience()
        self._listener = _listen(self._settings)
        passes_app_key = self._settings.key is None  # else it is ours
        self._upstream = Upstream(self._settings.server, self._settings.server_key, passes_app_key, patience)
        self._device = Device(
            settings.name,
            settings.steering_key,
            settings.max_streams,
            settings.fusions,
            steerable,
            books.accounts,
            books.disclosures,
            self._upstream,
            patience,
        )
        self._page = Page(self._device, settings, books)

    @property
    def url(self) -> str:
        """The base URL for apps."""
        host, port = self._listener.getsockname()[:2]
        return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"

    async def serve(self) -> None:
        """Answer apps until this is cancelled; then they get two seconds to take what they are being sent."""
        most = self._device.max_streams + SPARE_CONNECTIONS
        config = uvicorn.Config(
            _guarded(self._app(), self._settings),
            http=functools.partial(Connection, self._device.patience.client_s, most),  # type: ignore[arg-type]
            lifespan="off",
            ws="none",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=2,
        )
        server = _Server(config)
        serving = asyncio.create_task(server.serve(sockets=[self._listener]))
        log.info("gateway ready: apps at %s, the server at %s", self.url, self._settings.server)
        try:
            await asyncio.shield(serving)
        finally:
            server.should_exit = True
            await asyncio.wait([serving], timeout=STOP_TIMEOUT_S)
            await self._upstream.close()

    def close(self) -> None:
        """Give the address back, also where it was not served."""
        self._listener.close()

    def _app(self) -> FastAPI:
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
        app.add_route("/v1/models", Models(self._device), methods=["GET"])  # type: ignore[arg-type]
        for path in ("/chat/completions", "/completions"):
            app.add_route(f"/v1{path}", Completions(self._device, path), methods=["POST"])  # type: ignore[arg-type]
        self._page.add_to(app)
        app.add_exception_handler(GatewayError, _told)
        app.add_exception_handler(HTTPException, _told)
        app.add_exception_handler(Exception, _told)

        @app.get("/healthz")
        async def healthz() -> dict[str, str | bool]:
            return {"status": "ok", "version": __version__, "attached": self._device.steerable() is not None}

        return app


class _Server(uvicorn.Server):
    """uvicorn, without handlers of its own for the signals that end the edge worker."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _listen(settings: GatewaySettings) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        return socket.create_server((settings.host, settings.port), family=family)
    except OSError as error:
        address = f"{settings.host}:{settings.port}"
        raise InvalidParameter("gateway", address, f"an address that can be used ({error.strerror})") from None


# --- who may ask ---


def _guarded(app: ASGIApp, settings: GatewaySettings) -> ASGIApp:
    """``app`` behind the checks of ``refusal``. What it raises by mistake is shown without its text, which may be private."""

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        error = refusal(scope["path"], Headers(scope=scope), settings)
        if error is not None:
            await _response(error)(scope, receive, send)
            return
        try:
            await app(scope, receive, send)
        except asyncio.CancelledError:  # the worker ends
            pass
        except Exception as bug:  # which has been answered
            log.error("the gateway fails: %s", where(bug))

    return guarded


def refusal(path: str, headers: Mapping[str, str], settings: GatewaySettings) -> GatewayError | None:
    """Why a request is not answered: it lacks the key or, where there is none, a web page may have sent it.

    A page of any site can make its visitor's browser ask a loopback address: it says so in ``Origin`` and ``Sec-Fetch-Site`` (of
    what needs no permission, as images do, only in the latter), or, if the site's own name leads to that address (DNS rebinding),
    in ``Host``.
    """
    if settings.key is not None:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if path in OPEN or (scheme.lower() == "bearer" and keys.same(key.lstrip(" "), settings.key)):
            return None
        return GatewayError(401, "wrong_key", "the gateway's key is missing or wrong: give it to the app as its API key")
    host, origin = headers.get("host", ""), headers.get("origin")
    if _host_name(host) not in ("localhost", "127.0.0.1", "::1", settings.host):
        return GatewayError(403, "wrong_host", "the gateway answers to its loopback address only, not to this Host")
    is_elsewhere = path not in OPEN and headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
    if is_elsewhere or (origin is not None and origin != f"http://{host}"):
        return GatewayError(403, "wrong_origin", "web pages may not use the gateway (unless it has a key: --gateway-key)")
    return None


def _host_name(host: str) -> str | None:
    found = re.fullmatch(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9._-]+))(?::[0-9]{1,5})?", host.lower())
    return found and (found[1] or found[2])


async def _told(_: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        error = GatewayError(error.status_code, "unknown_route", f"the gateway serves {ROUTES}")
    if not isinstance(error, GatewayError):
        error = GatewayError(500, "gateway_failed", "the gateway failed; the edge worker's log says where")
    return _response(error)


def _response(error: GatewayError) -> Response:
    headers = {"www-authenticate": "Bearer"} if error.status == 401 else None
    return Response(error.body(), error.status, headers, "application/json")
