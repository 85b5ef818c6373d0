"""The apps' connections to the gateway: uvicorn's own, with bounds that it lacks, and refusals in OpenAI's format."""

import asyncio
from typing import Any

import h11
from starlette.responses import Response
from uvicorn.protocols.http.h11_impl import H11Protocol

from costeer_vllm.edge.answers import GatewayError


class Connection(H11Protocol):
    """HTTP/1.1 by h11, which bounds the length of a request's head; here the wait for it is bounded, too.

    uvicorn does not promise to keep the attributes that are used here (app, connections, conn, cycle, loop, transport) and the
    method that is replaced (send_400_response): tests/edge/test_gateway_connections.py fails if they change.
    """

    def __init__(self, patience_s: float, most: int, **options: Any) -> None:
        """``most``: open connections, this one included, beyond which a request is refused. ``options``: uvicorn's."""
        super().__init__(**options)
        self._patience_s, self._most = patience_s, most
        self._giving_up: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._most:
            error = GatewayError(429, "busy", f"the gateway has more than {self._most} open connections: try again later")
            self.app = Response(error.body(), error.status, {"connection": "close"}, "application/json")
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unwatch()

    def send_400_response(self, msg: str) -> None:
        """What came is no HTTP, which in the middle of an answer, or behind it, can only end the connection."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = GatewayError(400, "bad_request", "what the app sent is not HTTP/1.1").body()
            headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
            head = h11.Response(status_code=400, headers=list(headers.items()), reason=b"Bad Request")
            for event in (head, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _watch(self) -> None:
        """While no request is being answered, the next head must come in time.

        The time begins with the connection, and after an answer with the next byte: uvicorn closes what is silent then.
        """
        if self.cycle is not None and not self.cycle.response_complete:
            self._unwatch()
        elif self._giving_up is None and not self.transport.is_closing():
            self._giving_up = self.loop.call_later(self._patience_s, self.transport.abort)

    def _unwatch(self) -> None:
        if self._giving_up is not None:
            self._giving_up.cancel()
            self._giving_up = None
