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

MAX_REMEMBERED = 256  # requests


@dataclass(slots=True)
class Disclosure:
    """What one request has told so far."""

    max_bits: float | None = None
    bits: float = 0.0
    is_spent: bool = False  # the rest is drawn without the context
    num_cut: int = 0  # tokens that the sampler would have cut off without the context
    drawn: list[Drawn] = field(default_factory=list)
    choices: dict[bytes, int] = field(default_factory=dict)  # token by digest of the question: asked again, it is given again

    @property
    def bits_left(self) -> float:
        """What the next token may tell at the most."""
        return math.inf if self.max_bits is None else self.max_bits - self.bits

    @property
    def share_cut(self) -> float:
        """The share of tokens, among those to come, that the sampler would cut off without the context: see ``fusion``.

        Estimated as by Laplace from the text so far, as if 15 tokens before it had all been none.
        """
        return (self.num_cut + 1) / (len(self.drawn) + 16)

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
        self.drawn.append(drawn)
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
    """Those of the last requests, and the promises made for those under way."""

    def __init__(self, max_bits: float | None = None) -> None:
        """``max_bits``: the device's own budget for each request, whatever it asks for."""
        self._max_bits = max_bits
        self._by_request: OrderedDict[tuple[str, str | None], Disclosure] = OrderedDict()
        self._promises: dict[str, Promise] = {}  # by context_ref

    @contextlib.contextmanager
    def promise(self, context_ref: str, promise: Promise) -> Iterator[None]:
        """While the block runs, streams whose queries carry ``context_ref`` are held to ``promise``."""
        self._promises[context_ref] = promise
        try:
            yield
        finally:
            del self._promises[context_ref]

    def is_allowed(self, context_ref: str | None, fusion: Fusion) -> bool:
        """Whether a stream may be fused like this."""
        promise = self._promises.get(context_ref or "")
        return promise is None or promise.fusion == fusion

    def scope(self, context_ref: str | None) -> str | None:
        """What requests about the same context have in common."""
        promise = self._promises.get(context_ref or "")
        return context_ref if promise is None else promise.scope

    def of(self, request: str, context_ref: str | None, max_bits: float | None = None) -> Disclosure:
        """The request's, for a stream that begins; the smallest of all budgets holds."""
        key = request, context_ref
        found = self._by_request.setdefault(key, Disclosure())
        self._by_request.move_to_end(key)
        if len(self._by_request) > MAX_REMEMBERED:
            self._by_request.popitem(last=False)
        promise = self._promises.get(context_ref or "")
        promised = None if promise is None else promise.max_bits
        budgets = [budget for budget in (self._max_bits, promised, max_bits, found.max_bits) if budget is not None]
        found.max_bits = min(budgets, default=None)
        return found

    def bits(self, context_ref: str) -> float:
        """What the requests with ``context_ref`` have told."""
        return sum(found.bits for (_, ref), found in self._by_request.items() if ref == context_ref)
