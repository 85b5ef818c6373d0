"""Steering against plain vLLM and against the paper's loop: two servers, one edge worker and the serial loop, in turns.

    (a) plain       vLLM without the plugin
    (b) idle        vLLM with the plugin, no request steered
    (c) steered     the same server, every request steered by one edge worker on this machine, cloud fusion
    (d) edge_fused  the same in edge fusion
    (e) serial      the paper's loop in one process: see serial.py
    (f) beside      (a), while the small model takes the steps of (c) in this process: what sharing one machine costs

Every repetition measures all of them, one after the other, so that a ratio is one of neighbors in time.
"""

import contextlib
from collections.abc import Iterator

from costeer_vllm.bench import models
from costeer_vllm.bench.bench import Bench
from costeer_vllm.bench.figures import Samples
from costeer_vllm.bench.load import Client, Result
from costeer_vllm.bench.local import Local
from costeer_vllm.bench.pair import STEERING, BenchPair, shapes_here
from costeer_vllm.bench.report import PHASES
from costeer_vllm.steering import SteeringParams

WARM_UP_TOKENS = 8
SMALL_STEPS = 10  # per repetition, of which the median is taken
EDGE_FUSED = STEERING | {"fusion": "edge"}


def num_steps(bench: Bench) -> int:
    """Four starts, and every phase in every repetition and in the warm-up."""
    settings = bench.settings
    return 4 + (1 + settings.repetitions) * (5 * len(settings.streams) + 1)


def measure(bench: Bench) -> None:
    """All phases of all repetitions into ``bench.samples``."""
    with started(bench) as turns:
        turns.turn("warming up", WARM_UP_TOKENS, Samples())
        for label in bench.repetitions():
            turns.turn(label, bench.settings.tokens, bench.samples)


@contextlib.contextmanager
def started(bench: Bench) -> Iterator["Turns"]:
    """Two servers, the edge worker and the serial loop, all ready."""
    max_streams = max(bench.settings.streams)
    with contextlib.ExitStack() as stack:
        bench.say("making two models")
        pair = BenchPair(bench)
        bench.say("starting vLLM without the plugin")
        plain = stack.enter_context(pair.server("plain", max_streams, steering=False))
        bench.say("starting vLLM with the plugin, and the edge worker")
        plugged = stack.enter_context(pair.server("plugged", max_streams, steering=True))
        stack.enter_context(pair.edge(plugged.hub))
        bench.say("loading the serial loop")
        local = Local(pair.small, pair.shapes.large, bench.settings.vocab, bench.cores)
        clients = [
            stack.enter_context(contextlib.closing(Client(server, bench.settings.vocab, max_streams)))
            for server in (plain, plugged)
        ]
        yield Turns(bench, clients[0], clients[1], local)


class Turns:
    """The phases, each in its turn."""

    def __init__(self, bench: Bench, plain: Client, plugged: Client, local: Local) -> None:
        self._bench, self._plain, self._plugged, self._local = bench, plain, plugged, local

    def turn(self, label: str, most_tokens: int, samples: Samples) -> None:
        """One repetition, of at most ``most_tokens`` per stream."""
        settings = self._bench.settings
        tokens = {streams: min(most_tokens, settings.tokens_of(streams)) for streams in settings.streams}
        for streams in settings.streams:
            self._vllm(label, streams, tokens[streams], samples)
            self._beside(label, streams, tokens[streams], samples)
            self._small_step(streams, samples)
        self._bench.say(f"{label}: {PHASES['serial']}", settle=True)
        run = self._local.serial(min(settings.serial_tokens, most_tokens))
        for streams in settings.streams:
            samples.add("serial", "tokens/s", run.tokens_per_s(tokens[streams]), streams=streams)
        for part, seconds in (("large", run.large_s), ("small", run.small_s), ("iterations", run.iterations_s)):
            samples.add(f"serial_{part}", "ms", 1000 * seconds / len(run.ids), streams=1)

    def _vllm(self, label: str, streams: int, num_tokens: int, samples: Samples) -> None:
        phases = (
            ("plain", self._plain, None),
            ("idle", self._plugged, None),
            ("steered", self._plugged, STEERING),
            ("edge_fused", self._plugged, EDGE_FUSED),
        )
        for phase, client, steering in phases:
            self._bench.say(f"{label}: {PHASES[phase]}, {streams} at a time", settle=True)
            result = client.load(streams, num_tokens, steering)
            samples.add(phase, "tokens/s", result.tokens_per_s, streams=streams)
            samples.add(f"{phase}_step", "ms", result.step_ms, streams=streams)
            if steering is not None:
                self._counts(phase, streams, result, samples)

    def _beside(self, label: str, streams: int, num_tokens: int, samples: Samples) -> None:
        self._bench.say(f"{label}: {PHASES['beside']}, {streams} at a time", settle=True)
        period_ms = samples.last("steered_step", streams=streams)
        with self._local.at_work(streams, period_ms, self._bench.settings.delta):
            result = self._plain.load(streams, num_tokens)
        samples.add("beside", "tokens/s", result.tokens_per_s, streams=streams)
        samples.add("beside_step", "ms", result.step_ms, streams=streams)

    def _counts(self, phase: str, streams: int, result: Result, samples: Samples) -> None:
        samples.add(f"{phase}_tokens", "tokens", result.steered, streams=streams)
        samples.add(f"{phase}_missed", "tokens", result.missed, streams=streams)

    def _small_step(self, streams: int, samples: Samples) -> None:
        self._bench.settle()
        step_ms, encode_ms = self._local.small_step_ms(streams, SMALL_STEPS, self._bench.settings.delta)
        samples.add("small_step", "ms", step_ms, streams=streams)
        samples.add("encode", "ms", encode_ms, streams=streams)


def notes(bench: Bench) -> list[str]:
    """What a reader must know of this part."""
    settings, shapes, most = bench.settings, shapes_here(), max(bench.settings.streams)
    tokens = f"{settings.tokens_of(1)} tokens per stream ({settings.tokens_of(most)} of {most} streams)"
    return [
        f"Large model: {shapes.large}, bfloat16; small model: {shapes.small}; vocabulary {settings.vocab:,}; random weights; "
        f"local edge. {tokens} after queries of {models.PROMPT_WORDS} words, {models.CONTEXT_WORDS} words of private context, "
        f"{settings.delta} deltas, T = {SteeringParams().T}; {settings.repetitions} repetitions. Tokens/s include the prompts.",
        bench.cores.note,
        "Ratios are taken within each repetition, in which the phases follow one another.",
        "(e) has a batch of one, one stream after another, so its tokens/s hardly depend on their number. It is measured over "
        f"{min(settings.serial_tokens, settings.tokens)} tokens per repetition and reckoned for as many as the others.",
        "(f): the edge worker's place is another machine; here the two models share caches and memory, and the core that is left "
        "for all else. Against (f) steering has to answer for what it does itself; against (a) also for that.",
        "Milliseconds per step of (a) to (d) are vLLM's own mean time between two tokens of a stream; those of the small model "
        "are measured alone: two rows per stream to log-probabilities, then their deltas to bytes.",
    ]
