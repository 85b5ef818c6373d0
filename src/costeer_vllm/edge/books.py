"""The books of a device, which are shown every frame of its link: what requests come to, and what they told."""

import math
from dataclasses import dataclass, field

from costeer_vllm.edge.accounts import Accounts
from costeer_vllm.edge.choices import Chooser
from costeer_vllm.edge.disclosure import Disclosures
from costeer_vllm.edge.ledger import Ledger
from costeer_vllm.edge.traces import Trace, Traces
from costeer_vllm.protocol.messages import Advance, Begin, Candidates, Choice, Delta, End


@dataclass(slots=True)
class Books:
    """All that an edge worker keeps about its streams, beside the streams themselves."""

    accounts: Accounts = field(default_factory=Accounts)
    disclosures: Disclosures = field(default_factory=Disclosures)
    traces: Traces = field(default_factory=Traces)
    ledger: Ledger | None = None

    def received(self, message: Begin | Advance | Candidates | End, num_bytes: int) -> None:
        """A frame of ``num_bytes`` came from the hub."""
        self.accounts.received(message, num_bytes)
        self._enter(self.traces.received(message, num_bytes))

    def sent(self, message: Delta | Choice | End, num_bytes: int) -> None:
        """A frame of ``num_bytes`` went to the hub."""
        self.accounts.sent(message, num_bytes)
        self._enter(self.traces.sent(message, num_bytes))

    def chosen(self, choice: Choice, chooser: Chooser) -> None:
        """A choice is about to go out."""
        drawn = chooser.take_drawn()
        if drawn is not None:
            self.traces.moved(choice.stream, drawn.token, math.exp(drawn.log_p), math.exp(drawn.log_pi))
            self.traces.disclosed(choice.stream, chooser.bits, chooser.disclosure.max_bits)

    def detached(self) -> None:
        """The link to the hub is lost, and all open streams with it."""
        self.accounts.detached()
        for trace in self.traces.detached():
            self._enter(trace)

    def _enter(self, ended: Trace | None) -> None:
        if ended is not None and self.ledger is not None:
            self.ledger.add(ended)
