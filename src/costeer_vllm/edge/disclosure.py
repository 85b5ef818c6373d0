"""What the answers of this device can have told the server about the private context, and the budgets on it.

A ``Disclosure`` is kept for each request, over all of its streams: a stream that is preempted goes on as another one, and the
choices of one request are read side by side. It is the device's own: no server can begin it anew by beginning a stream again.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass, field

from costeer_vllm.edge.fusion import Drawn

MAX_REMEMBERED = 4096  # requests


@dataclass(slots=True)
class Disclosure:
    """What one request has told so far."""

    max_bits: float | None = None
    bits: float = 0.0
    is_spent: bool = False  # the rest is drawn without the context
    drawn: list[Drawn] = field(default_factory=list)
    choices: dict[bytes, int] = field(default_factory=dict)  # token by digest of the question: asked again, it is given again

    @property
    def bits_left(self) -> float:
        """What the next token may tell at the most."""
        return math.inf if self.max_bits is None else self.max_bits - self.bits

    def add(self, drawn: Drawn, wanted: float) -> None:
        """Count a token; ``wanted``: the strength that the request asks for at this token."""
        self.drawn.append(drawn)
        self.bits += drawn.bits
        self.is_spent |= drawn.strength == 0 and wanted != 0


class Disclosures:
    """Those of the last requests."""

    def __init__(self, max_bits: float | None = None) -> None:
        """``max_bits``: the device's own budget for each request, whatever it asks for."""
        self._max_bits = max_bits
        self._by_request: OrderedDict[tuple[str, str | None], Disclosure] = OrderedDict()

    def of(self, request: str, context_ref: str | None, max_bits: float | None = None) -> Disclosure:
        """The request's; the smaller of the two budgets holds, and a later one cannot raise it."""
        key = request, context_ref
        found = self._by_request.setdefault(key, Disclosure())
        self._by_request.move_to_end(key)
        if len(self._by_request) > MAX_REMEMBERED:
            self._by_request.popitem(last=False)
        budgets = [budget for budget in (self._max_bits, max_bits, found.max_bits) if budget is not None]
        found.max_bits = min(budgets, default=None)
        return found
