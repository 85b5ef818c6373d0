"""The last streams as the device's own page shows them: what each token owes to the context, and what crossed. Memory only.

The worker shows the traces every frame, and the probabilities as they become known.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from costeer_vllm.protocol.messages import Advance, Begin, Candidates, Choice, Delta, End, EndReason, Fusion

MAX_TRACES = 50
MAX_TOKENS = 4096  # of one trace
TOKENS_OF_A_CHARACTER = 6  # at the most, in UTF-8 and its modifiers
BROKEN = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True, slots=True)
class Moved:
    """A token and how far the context moved it.

    In edge fusion the probabilities are the base policy's and the personalized policy's, at the temperature of the request
    (greedy: 1); in cloud fusion, where this device never sees the large model's, the small model's without and with the context.
    """

    token: int
    text: str
    plain: float
    personal: float


@dataclass(slots=True, eq=False)
class Trace:
    """One stream."""

    stream: str
    request: str
    fusion: Fusion
    strength: float
    began: float  # seconds since the epoch
    tokens: list[Moved] = field(default_factory=list)
    num_before: int = 0  # tokens that it had when it began, after a preemption: they are in the former trace
    num_tokens: int = 0
    bytes_up: int = 0  # Delta and Choice frames
    bytes_down: int = 0  # Begin, Advance and Candidates frames
    bits: float | None = None  # told so far; None in cloud fusion, where nobody on the device can know
    max_bits: float | None = None  # budget of the whole request
    ended: float | None = None
    reason: EndReason | None = None
    tokens_steered: int | None = None  # the engine's count
    tokens_missed: int | None = None


class Traces:
    """The newest streams for which something left this device, open and ended."""

    def __init__(self) -> None:
        self._newest: deque[Trace] = deque(maxlen=MAX_TRACES)
        self._open: dict[str, Trace] = {}
        self.decode: Callable[[list[int]], str] | None = None  # once the tokenizer is loaded

    @property
    def num_open(self) -> int:
        """Streams that are not over."""
        return len(self._open)

    def find(self, stream: str) -> Trace | None:
        """The newest trace of a stream."""
        return next((trace for trace in self if trace.stream == stream), None)

    def __iter__(self) -> Iterator[Trace]:
        """The newest first."""
        return reversed(self._newest)

    def received(self, message: Begin | Advance | Candidates | End, num_bytes: int) -> Trace | None:
        """A frame of ``num_bytes`` came from the hub; returns the trace of a stream that ends."""
        if isinstance(message, End):
            return self._end(message.stream, message.reason, message.tokens_steered, message.tokens_missed)
        former = None
        if isinstance(message, Begin):
            former = self._end(message.stream, "preempted")
            num = len(message.tokens)
            trace = Trace(
                message.stream, message.request, message.fusion, message.strength, time.time(), num_before=num, num_tokens=num
            )
            if message.sampling is not None:
                trace.bits, trace.max_bits = 0.0, message.sampling.max_bits
            self._open[message.stream] = trace
        elif (found := self._open.get(message.stream)) is None:
            return None
        else:
            trace = found
        trace.bytes_down += num_bytes
        if isinstance(message, Advance):
            trace.num_tokens = message.position
        return former

    def sent(self, message: Delta | Choice | End, num_bytes: int) -> Trace | None:
        """A frame of ``num_bytes`` went to the hub; returns the trace of a stream that ends."""
        if isinstance(message, End):
            return self._end(message.stream, message.reason)
        if (trace := self._open.get(message.stream)) is not None:
            if not trace.bytes_up:  # refused ones, for which nothing leaves, shall not drive out others
                self._newest.append(trace)
            trace.bytes_up += num_bytes
        return None

    def moved(self, stream: str, token: int, plain: float, personal: float) -> None:
        """A token's probabilities are known."""
        trace = self._open.get(stream)
        if trace is not None and len(trace.tokens) < MAX_TOKENS:
            trace.tokens.append(Moved(token, self._text(trace, token), plain, personal))

    def disclosed(self, stream: str, bits: float, max_bits: float | None) -> None:
        """What the stream has told by now, and the budget of its request, in edge fusion."""
        if (trace := self._open.get(stream)) is not None:
            trace.bits, trace.max_bits = bits, max_bits

    def detached(self) -> list[Trace]:
        """The link to the hub is lost, and all open streams with it: their traces."""
        return [trace for stream in list(self._open) if (trace := self._end(stream, "detached"))]

    def _text(self, trace: Trace, token: int) -> str:
        """What the token adds to the text; nothing while it ends in the middle of a character.

        It is decoded together with the tokens since the last character's end, and these after those that made that character:
        many tokenizers drop a space at the beginning of what they decode.
        """
        try:
            return "" if self.decode is None else self._decoded(self.decode, trace, token)
        except Exception:  # a tokenizer without a text for an id that its model has
            return ""

    def _decoded(self, decode: Callable[[list[int]], str], trace: Trace, token: int) -> str:
        after_last = _since_text(trace.tokens, len(trace.tokens))
        before = [moved.token for moved in trace.tokens[_since_text(trace.tokens, after_last - 1) :]]
        num_pending = len(trace.tokens) - after_last
        former = decode(before[: len(before) - num_pending])
        text = decode([*before, token])[len(former) :]
        return "" if text.endswith(BROKEN) and num_pending < TOKENS_OF_A_CHARACTER - 1 else text

    def _end(
        self, stream: str, reason: EndReason, tokens_steered: int | None = None, tokens_missed: int | None = None
    ) -> Trace | None:
        trace = self._open.pop(stream, None)
        if trace is None:
            return None
        trace.ended, trace.reason = time.time(), reason
        trace.tokens_steered, trace.tokens_missed = tokens_steered, tokens_missed
        return trace if trace.bytes_up else None


def _since_text(tokens: list[Moved], end: int) -> int:
    """Where the tokens without a text begin that stand before ``end``."""
    least = max(0, end - TOKENS_OF_A_CHARACTER)
    while end > least and not tokens[end - 1].text:
        end -= 1
    return max(end, 0)
