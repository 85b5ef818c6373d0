"""What every part of the report works with."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from costeer_vllm.bench.figures import Samples
from costeer_vllm.bench.machine import Cores
from costeer_vllm.bench.settings import BenchSettings

SETTLE_S = 1.2  # vLLM's processes spin on their queues for a second after their last step: not into what is timed next


@dataclass(slots=True)
class Bench:
    """How much to measure and where, what was found, and whom to tell."""

    settings: BenchSettings
    cores: Cores
    folder: Path  # for models and logs, empty
    on_step: Callable[[str], None]
    samples: Samples = field(default_factory=Samples)

    def say(self, what: str, settle: bool = False) -> None:
        """What begins now; first the machine comes to rest if it is to be timed."""
        self.on_step(what)
        if settle:
            self.settle()

    def settle(self) -> None:
        """Let the machine come to rest."""
        time.sleep(SETTLE_S)

    def repetitions(self) -> Iterator[str]:
        """A label for each."""
        for repetition in range(1, self.settings.repetitions + 1):
            yield f"repetition {repetition} of {self.settings.repetitions}"
