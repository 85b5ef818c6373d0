"""What steering one request of the gateway came to: tokens and bytes, added up over its streams. No socket, no clock.

The worker shows them every frame; a request is known by the context_ref that its queries carry, which is used once.
"""

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import anyio

from costeer_vllm.protocol.messages import Advance, Begin, Candidates, Choice, Delta, End

_COUNTED = ("finished", "preempted")  # the reasons of an engine's End, which brings counts; the hub's own have none


@dataclass(slots=True)
class Account:
    """The streams of one request."""

    num_streams: int  # that it should have: n, for every prompt
    num_open: int = 0
    num_over: int = 0  # ended, with their counts
    num_lost: int = 0  # ended without: by this worker, or with the link
    tokens_steered: int = 0
    tokens_missed: int = 0
    num_answers: int = 0  # sent: deltas or choices
    bytes_up: int = 0  # Delta and Choice frames
    bytes_down: int = 0  # Begin, Advance and Candidates frames
    why: str = ""  # a stream was lost: the last sentence about it
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def is_settled(self) -> bool:
        """Whether nothing more is to be expected."""
        return self.num_open == 0 and self.num_over + self.num_lost >= self.num_streams

    @property
    def is_complete(self) -> bool:
        """Whether the counts are those of all tokens."""
        return self.is_settled and self.num_lost == 0

    async def settle(self, timeout_s: float) -> None:
        """Wait until it is settled, but not for longer than ``timeout_s``."""
        with anyio.move_on_after(timeout_s):  # asyncio.wait_for can lose a cancellation before Python 3.12
            await self._settled()

    async def _settled(self) -> None:
        while not self.is_settled:
            self.changed.clear()
            await self.changed.wait()


class Accounts:
    """The accounts of the requests that are under way."""

    def __init__(self) -> None:
        self._by_ref: dict[str, Account] = {}
        self._by_stream: dict[str, Account] = {}  # the open streams

    @contextlib.contextmanager
    def account(self, context_ref: str, num_streams: int) -> Iterator[Account]:
        """An account of the streams whose queries carry ``context_ref``, kept while the block runs."""
        account = self._by_ref[context_ref] = Account(num_streams)
        try:
            yield account
        finally:
            del self._by_ref[context_ref]
            self._by_stream = {stream: other for stream, other in self._by_stream.items() if other is not account}

    def received(self, message: Begin | Advance | Candidates | End, num_bytes: int) -> None:
        """A frame of ``num_bytes`` came from the hub."""
        match message:
            case Begin(stream=stream, query=query):
                account = self._by_ref.get(query.ref or "")
                if account is None:
                    return
                if self._by_stream.get(stream) is not account:
                    self._by_stream[stream] = account
                    account.num_open += 1
                account.bytes_down += num_bytes
            case Advance(stream=stream) | Candidates(stream=stream):
                account = self._by_stream.get(stream)
                if account is not None:
                    account.bytes_down += num_bytes
            case End():
                self._end(message)

    def sent(self, message: Delta | Choice | End, num_bytes: int) -> None:
        """A frame of ``num_bytes`` went to the hub."""
        if isinstance(message, End):
            self._lose(message.stream, message.sentence)
        elif (account := self._by_stream.get(message.stream)) is not None:
            account.num_answers += 1
            account.bytes_up += num_bytes

    def detached(self) -> None:
        """The link to the hub is lost, and all open streams with it."""
        for stream in list(self._by_stream):
            self._lose(stream, "the link to the hub was lost")

    def _end(self, end: End) -> None:
        if end.reason not in _COUNTED:
            self._lose(end.stream, end.sentence or end.reason)
        elif (account := self._close(end.stream)) is not None:
            account.tokens_steered += end.tokens_steered
            account.tokens_missed += end.tokens_missed
            account.num_over += end.reason == "finished"  # after a preemption it goes on as another stream

    def _lose(self, stream: str, why: str) -> None:
        account = self._close(stream)
        if account is not None:
            account.num_lost += 1
            account.why = why

    def _close(self, stream: str) -> Account | None:
        account = self._by_stream.pop(stream, None)
        if account is not None:
            account.num_open -= 1
            account.changed.set()
        return account
