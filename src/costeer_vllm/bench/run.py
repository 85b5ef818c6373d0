"""The benchmark: two servers, one edge worker and the serial loop, measured in turns.

    (a) plain     vLLM without the plugin
    (b) idle      vLLM with the plugin, no request steered
    (c) steered   the same server, every request steered by one edge worker
    (d) serial    the paper's loop in one process: see serial.py

Every repetition measures all of them, one after the other, so that a ratio is one of neighbours in time.
"""

import contextlib
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.progress import Progress

from costeer_vllm.bench import machine, models
from costeer_vllm.bench.load import Client, Result
from costeer_vllm.bench.machine import Cores
from costeer_vllm.bench.report import PHASES, Samples, show, write_json
from costeer_vllm.errors import InvalidParameter
from costeer_vllm.processes import Server, edge_worker, serving
from costeer_vllm.serve import has_cuda
from costeer_vllm.steering import SteeringParams

if TYPE_CHECKING:
    from costeer_vllm.bench.local import Local

WORKER = "bench"
STEERING = {"worker": WORKER, "deadline_ms": 60_000}  # so generous that no token is missed
WARM_UP_TOKENS = 8
SMALL_STEPS = 10  # per repetition, of which the median is taken
NUM_STARTS = 5  # of which the progress bar tells
SETTLE_S = 1.2  # vLLM's processes spin on their queues for a second after their last step: not into the next phase

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class BenchSettings:
    """What is measured.

    Raises:
        InvalidParameter: if a value cannot be used.
    """

    streams: tuple[int, ...] = (1, 8)
    tokens: int = 64  # per stream
    repetitions: int = 5
    vocab: int = 151_936
    serial_tokens: int = 16
    delta: Literal["lossless", "sparse"] = "sparse"

    def __post_init__(self) -> None:
        longest = models.MAX_POSITIONS - models.PROMPT_WORDS - models.CONTEXT_WORDS - 64
        ranges = {
            "tokens": (2, longest), "repetitions": (1, 1000), "vocab": (1000, 1_000_000), "serial_tokens": (1, longest),
        }  # fmt: skip
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise InvalidParameter(name, getattr(self, name), f"from {low} to {high}")
        if not self.streams or not all(1 <= streams <= 64 for streams in self.streams):
            raise InvalidParameter("streams", self.streams, "numbers from 1 to 64")

    @property
    def num_phases(self) -> int:
        """All that are measured, the warm-up included."""
        return (1 + self.repetitions) * (3 * len(self.streams) + 1)


def parse_streams(text: str) -> tuple[int, ...]:
    """``8,1`` -> (1, 8).

    Raises:
        InvalidParameter: if there is something else than numbers between the commas.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise InvalidParameter("streams", text, "numbers with commas between them, such as 1,8")
    return tuple(sorted({int(part) for part in parts}))


def run_bench(settings: BenchSettings, json_path: Path | None = None) -> None:
    """Measure, print tables and notes, and write the figures to ``json_path`` if one is given.

    Raises:
        CoSteerError, httpx.HTTPError: if anything does not work.
    """
    console, cores, load = Console(), machine.choose_cores(), machine.load()
    pair = models.ON_GPU if has_cuda() else models.ON_CPU
    with tempfile.TemporaryDirectory(prefix="costeer-bench-") as folder, Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=NUM_STARTS + settings.num_phases)

        def say(what: str) -> None:
            progress.update(task, description=what, advance=1)

        with started(Path(folder), settings, pair, cores, say) as turns:
            samples = turns.measure()
    figures, facts = samples.figures(), machine.facts() | {"load_before": load}
    show(console, figures, facts, notes(settings, pair, cores))
    if json_path is not None:
        write_json(json_path, figures, facts)


@contextlib.contextmanager
def started(folder: Path, settings: BenchSettings, pair: models.PairShape, cores: Cores, say: Say) -> Iterator["Turns"]:
    """Two servers, the edge worker and the serial loop, all ready; their files in ``folder``."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # we have one
    say("making two models")
    large = models.write_large(folder / "large", pair.large, settings.vocab)
    small = models.write_small(folder / "small", pair.small, settings.vocab)
    context = folder / "context.md"
    context.write_text(models.text(random.Random("context"), models.CONTEXT_WORDS, settings.vocab))
    with contextlib.ExitStack() as stack:
        say("starting vLLM without the plugin")
        plain = stack.enter_context(_server(large, folder / "plain", settings, cores, steering=False))
        say("starting vLLM with the plugin")
        plugged = stack.enter_context(_server(large, folder / "plugged", settings, cores, steering=True))
        say("starting the edge worker")
        options = ["--delta", settings.delta, *([] if has_cuda() else ["--threads", "1"])]
        edge = stack.enter_context(edge_worker(plugged.hub, WORKER, small, context, folder / "edge", options))
        machine.pin(edge.process.pid, cores.small)
        say("loading the serial loop")
        from costeer_vllm.bench.local import Local

        local = Local(small, pair.large, settings.vocab, cores)
        clients = [stack.enter_context(_client(server, settings)) for server in (plain, plugged)]
        yield Turns(settings, clients[0], clients[1], local, say)


def _server(
    large: Path, folder: Path, settings: BenchSettings, cores: Cores, steering: bool
) -> contextlib.AbstractContextManager[Server]:
    options = ["--load-format", "dummy", "--dtype", "bfloat16", "--max-model-len", str(models.MAX_POSITIONS)]
    options += ["--max-num-seqs", str(max(settings.streams))]
    options += ["--gpu-memory-utilization", "0.3"] if has_cuda() else ["--enforce-eager"]
    environment = {} if cores.large is None else {"VLLM_CPU_OMP_THREADS_BIND": str(cores.large)}
    return serving(large, folder, options, environment, steering)


def _client(server: Server, settings: BenchSettings) -> contextlib.AbstractContextManager[Client]:
    return contextlib.closing(Client(server, settings.vocab, max(settings.streams)))


class Turns:
    """The phases, each in its turn."""

    def __init__(self, settings: BenchSettings, plain: Client, plugged: Client, local: "Local", say: Say) -> None:
        self._settings, self._plain, self._plugged, self._local, self._say = settings, plain, plugged, local, say
        self._samples = Samples()

    def measure(self) -> Samples:
        """Every phase once unmeasured, then all of them in every repetition."""
        self._turn("warming up", min(WARM_UP_TOKENS, self._settings.tokens))
        self._samples = Samples()
        for repetition in range(1, self._settings.repetitions + 1):
            self._turn(f"repetition {repetition} of {self._settings.repetitions}", self._settings.tokens)
        return self._samples

    def _turn(self, label: str, num_tokens: int) -> None:
        serial: float | None = None
        for streams in self._settings.streams:
            self._vllm(label, streams, num_tokens)
            if serial is None:
                self._begin(label, PHASES["serial"])
                serial = self._serial(streams, num_tokens)
            self._samples.add("serial", streams, "tokens/s", serial)
            self._small_step(streams)

    def _vllm(self, label: str, streams: int, num_tokens: int) -> None:
        phases = (("plain", self._plain, None), ("idle", self._plugged, None), ("steered", self._plugged, STEERING))
        for phase, client, steering in phases:
            self._begin(label, f"{PHASES[phase]}, {streams} at a time")
            self._record(phase, streams, client.load(streams, num_tokens, steering))

    def _begin(self, label: str, phase: str) -> None:
        self._say(f"{label}: {phase}")
        time.sleep(SETTLE_S)

    def _record(self, phase: str, streams: int, result: Result) -> None:
        self._samples.add(phase, streams, "tokens/s", result.tokens_per_s)
        self._samples.add(f"{phase}_step", streams, "ms", result.step_ms)
        if phase == "steered":
            self._samples.add("steered_tokens", streams, "tokens", result.steered)
            self._samples.add("missed", streams, "tokens", result.missed)

    def _serial(self, streams: int, num_tokens: int) -> float:
        run = self._local.serial(min(self._settings.serial_tokens, num_tokens))
        for part, seconds in (("large", run.large_s), ("small", run.small_s), ("iterations", run.iterations_s)):
            self._samples.add(f"serial_{part}", streams, "ms", 1000 * seconds / len(run.ids))
        return run.tokens_per_s(num_tokens)

    def _small_step(self, streams: int) -> None:
        step_ms, encode_ms = self._local.small_step_ms(streams, SMALL_STEPS, self._settings.delta)
        self._samples.add("small_step", streams, "ms", step_ms)
        self._samples.add("encode", streams, "ms", encode_ms)


def notes(settings: BenchSettings, pair: models.PairShape, cores: Cores) -> list[str]:
    """What a reader of the tables must know."""
    return [
        f"Large model: {pair.large}, bfloat16; small model: {pair.small}; vocabulary {settings.vocab:,}; random weights. "
        f"{settings.repetitions} repetitions, {settings.tokens} tokens per stream after queries of {models.PROMPT_WORDS} words, "
        f"{models.CONTEXT_WORDS} words of private context, {settings.delta} deltas, T = {SteeringParams().T}. Tokens/s "
        "include the reading of prompts.",
        cores.note,
        "Ratios are taken within each repetition, in which the phases follow one another.",
        "(d) has a batch of one, one stream after another, so its tokens/s do not depend on their number. It is measured over "
        f"{min(settings.serial_tokens, settings.tokens)} tokens per repetition and reckoned for {settings.tokens}.",
        "Milliseconds per step of (a) to (c) are vLLM's own mean time between two tokens of a stream; those of the small model "
        "are measured alone: two rows per stream to log-probabilities, then their deltas to bytes.",
    ]
