"""The pair of models with random weights, as servers and edge workers on their cores."""

import contextlib
import random
from collections.abc import Iterator

from costeer_vllm.bench import machine, models
from costeer_vllm.bench.bench import Bench
from costeer_vllm.processes import Running, Server, edge_worker, serving
from costeer_vllm.serve import has_cuda

WORKER = "bench"
STEERING = {"worker": WORKER, "deadline_ms": 60_000}  # so generous that no token is missed


def shapes_here() -> models.PairShape:
    """As large as this machine can bear."""
    return models.ON_GPU if has_cuda() else models.ON_CPU


class BenchPair:
    """Both models in the benchmark's folder."""

    def __init__(self, bench: Bench) -> None:
        from transformers.utils.logging import disable_progress_bar

        self._settings, self._cores, self._folder = bench.settings, bench.cores, bench.folder
        disable_progress_bar()  # we have one
        self.shapes = shapes_here()
        vocab = bench.settings.vocab
        self._large = models.write_large(bench.folder / "large", self.shapes.large, vocab)
        self.small = models.write_small(bench.folder / "small", self.shapes.small, vocab)
        self._context = bench.folder / "context.md"
        self._context.write_text(models.text(random.Random("context"), models.CONTEXT_WORDS, vocab))

    @contextlib.contextmanager
    def server(self, name: str, max_streams: int, steering: bool) -> Iterator[Server]:
        """The large model in vLLM, ready."""
        options = ["--load-format", "dummy", "--dtype", "bfloat16", "--max-model-len", str(models.MAX_POSITIONS)]
        options += ["--max-num-seqs", str(max_streams)]
        options += ["--gpu-memory-utilization", "0.3"] if has_cuda() else ["--enforce-eager"]
        with serving(self._large, self._folder / name, options, machine.worker_environment(self._cores), steering) as server:
            machine.keep_off(server.process.pid, self._cores)
            yield server

    @contextlib.contextmanager
    def edge(self, hub: str, name: str = WORKER) -> Iterator[Running]:
        """The small model at the hub at ``host:port``."""
        options = ["--delta", self._settings.delta, *([] if has_cuda() else ["--threads", "1"])]
        with edge_worker(hub, name, self.small, self._context, self._folder / "edges", options) as edge:
            machine.pin(edge.process.pid, self._cores.small)
            yield edge
