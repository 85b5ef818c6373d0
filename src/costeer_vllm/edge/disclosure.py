"""What the answers of this device can have told the server about the private context, and what each of them may tell.

A ``Disclosure`` is kept for each request, over all of its streams: a stream that is preempted goes on as another one, and the
choices of one request are read side by side. To begin a stream again does not begin it anew, and what the gateway has promised an
app cannot be widened. But which streams are one request, the server says: if it invents requests, each gets a new one.
"""

import contextlib
import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from costeer_vllm.candidates import BasePolicy
from costeer_vllm.edge.fusion import Drawn, draw
from costeer_vllm.protocol.messages import Fusion, Sampling

MAX_REMEMBERED = 256  # requests that are over
MAX_DRAWN_KEPT = 256  # tokens of a request


@dataclass(slots=True)
class Disclosure:
    """What one request has told so far."""

    max_bits: float | None = None
    bits: float = 0.0
    is_spent: bool = False  # the rest is drawn without the context
    num_cut: int = 0  # tokens that the sampler would have cut off without the context
    num_drawn: int = 0
    drawn: list[Drawn] = field(default_factory=list)  # the newest
    choices: dict[bytes, int] = field(default_factory=dict)  # token by digest of the question: asked again, it is given again
    num_open: int = 0  # streams
    num_over: int = 0  # times that all of its streams were over
    has_no_room: bool = False  # the context did not fit into the small model's positions, or not to the end
    is_over: bool = False  # the app has its answer: nothing more may be told

    @property
    def bits_left(self) -> float:
        """What the next token may tell at the most."""
        return math.inf if self.max_bits is None else self.max_bits - self.bits

    @property
    def share_cut(self) -> float:
        """The share of tokens, among those to come, that the sampler would cut off without the context: see ``fusion``.

        Estimated as by Laplace from the text so far, as if 15 tokens before it had all been none.
        """
        return (self.num_cut + 1) / (self.num_drawn + 16)

    def begun(self) -> None:
        """A stream of it begins."""
        self.num_open += 1

    def ended(self, for_good: bool) -> None:
        """A stream of it ends; ``for_good``: not because the link was lost, or because it begins again."""
        self.num_open -= 1
        if for_good and not self.num_open:
            self.num_over += 1
            self.choices.clear()  # should the same be asked again, it is drawn anew, with other numbers, and counted

    def draw(
        self, base: BasePolicy, delta: npt.NDArray[np.floating], strength: float, sampling: Sampling, uniform: float
    ) -> Drawn:
        """Draw the next token within the budget, and count it; the arguments are those of ``fusion.draw``.

        Where the base policy is as sure as the request's ``confidence`` it is left alone. A budget that leaves no strength at all
        is spent for good.
        """
        is_sure = sampling.confidence < 1 and math.exp(base.log_probs.max()) >= sampling.confidence
        wanted = 0.0 if self.is_spent or is_sure else strength
        drawn = draw(base, delta, wanted, sampling, uniform, self.bits_left, self.share_cut)
        self.drawn = [*self.drawn[1 - MAX_DRAWN_KEPT :], drawn]
        self.num_drawn += 1
        self.bits += drawn.bits
        self.num_cut += drawn.is_cut
        self.is_spent |= drawn.strength == 0 and wanted != 0
        return drawn


@dataclass(frozen=True, slots=True)
class Promise:
    """What an app was promised of one request."""

    fusion: Fusion
    max_bits: float | None = None
    scope: str | None = None  # the same for requests about the same context, whose refs differ; never shown


class Disclosures:
    """Those of the last requests, and of those whose apps were promised something."""

    def __init__(self, max_bits: float | None = None) -> None:
        """``max_bits``: the device's own budget for each request, whatever it asks for."""
        self._max_bits = max_bits
        self._by_request: OrderedDict[tuple[str, str | None], Disclosure] = OrderedDict()
        self._promised: dict[str, tuple[Promise, Disclosure]] = {}  # by context_ref, which is used for one request only

    @contextlib.contextmanager
    def promise(self, context_ref: str, promise: Promise) -> Iterator[Disclosure]:
        """While the block runs, streams whose queries carry ``context_ref`` are held to ``promise``; behind it they are over."""
        disclosure = Disclosure(_least(self._max_bits, promise.max_bits))
        self._promised[context_ref] = promise, disclosure
        try:
            yield disclosure
        finally:
            del self._promised[context_ref]
            disclosure.is_over = True

    def is_allowed(self, context_ref: str | None, fusion: Fusion) -> bool:
        """Whether a stream may be fused like this."""
        promised = self._promised.get(context_ref or "")
        return promised is None or promised[0].fusion == fusion

    def scope(self, context_ref: str | None) -> str | None:
        """What requests about the same context have in common."""
        promised = self._promised.get(context_ref or "")
        return context_ref if promised is None else promised[0].scope

    def of(self, request: str, context_ref: str | None, max_bits: float | None = None) -> Disclosure:
        """The request's, for a stream that begins; the smallest of all budgets holds."""
        promised = self._promised.get(context_ref or "")
        found = self._remembered(request, context_ref) if promised is None else promised[1]
        found.max_bits = _least(self._max_bits, max_bits, found.max_bits)
        return found

    def _remembered(self, request: str, context_ref: str | None) -> Disclosure:
        found = self._by_request.setdefault((request, context_ref), Disclosure())
        self._by_request.move_to_end((request, context_ref))
        if len(self._by_request) > MAX_REMEMBERED:  # and not all of them open: there are fewer streams
            oldest = next((key for key, other in self._by_request.items() if not other.num_open and other is not found), None)
            self._by_request.pop(oldest or ("", None), None)
        return found


def _least(*budgets: float | None) -> float | None:
    return min((budget for budget in budgets if budget is not None), default=None)
