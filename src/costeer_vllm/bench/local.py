"""What is measured in this process: the serial loop on the large model's core, a step of the small model on its own."""

import contextlib
import random
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM

from costeer_vllm.bench import models
from costeer_vllm.bench.machine import Cores, on_core
from costeer_vllm.bench.serial import SerialRun, serial_loop
from costeer_vllm.delta import encode_lossless, encode_sparse
from costeer_vllm.edge.small_model import Pair, SmallModel
from costeer_vllm.steering import SteeringParams

FIRST_WORD = len(models.SPECIAL)


class Local:
    """The pair in this process, on the same devices, cores and in the same number formats as the servers and the edge worker."""

    def __init__(self, small: Path, large: models.Shape, vocab: int, cores: Cores) -> None:
        """``small``: a folder written by ``models.write_small``. On a CPU all of torch has one thread from here on."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cpu":
            torch.set_num_threads(1)
        self._vocab, self._cores, self._rng = vocab, cores, random.Random("local")
        self._large = models.build(models.config(large, vocab), "bfloat16", device)
        self._stepper = SmallModel.load(str(small))
        self._small: Any = AutoModelForCausalLM.from_pretrained(small, dtype=self._stepper.dtype).to(device).eval()

    def serial(self, num_tokens: int) -> SerialRun:
        """The paper's loop for ``num_tokens`` tokens after prompts as long as the others'."""
        query, context = self._ids(models.PROMPT_WORDS), self._ids(models.CONTEXT_WORDS)
        with on_core(self._cores.large):
            return serial_loop(self._large, self._small, query, context + query, query, SteeringParams(), num_tokens)

    def small_step_ms(self, streams: int, num_steps: int, encoding: str) -> tuple[float, float]:
        """Medians of ``num_steps`` steps: two rows per stream to log-probabilities on the host, and their deltas to bytes."""
        with on_core(self._cores.small):
            pairs = [self._pair() for _ in range(streams)]
            times = [self._step(pairs, encoding) for _ in range(num_steps)]
            for pair in pairs:
                self._stepper.close(pair)
        steps, encodings = zip(*times, strict=True)
        return statistics.median(steps), statistics.median(encodings)

    @contextlib.contextmanager
    def at_work(self, streams: int, period_ms: float, encoding: str) -> Iterator[None]:
        """The small model's steps for so many streams, one every ``period_ms``, on its core, in a thread until the block ends."""
        done = threading.Event()

        def work() -> None:
            with on_core(self._cores.small):
                pairs = [self._pair() for _ in range(streams)]
                due = time.perf_counter()
                while not done.wait(max(0.0, due - time.perf_counter())):
                    self._step(pairs, encoding)
                    due = max(due + period_ms / 1000, time.perf_counter())
                for pair in pairs:
                    self._stepper.close(pair)

        with ThreadPoolExecutor(1) as pool:
            working = pool.submit(work)
            try:
                yield
            finally:
                done.set()
                working.result()

    def _pair(self) -> Pair:
        query = self._ids(models.PROMPT_WORDS)
        pair = self._stepper.open(self._ids(models.CONTEXT_WORDS) + query, query)
        while not pair.is_ready:
            self._stepper.prefill(pair)
        self._stepper.step([pair])
        return pair

    def _step(self, pairs: list[Pair], encoding: str) -> tuple[float, float]:
        for pair in pairs:
            pair.rewrite(pair.num_generated, self._ids(1))
        start = time.perf_counter()
        with_context, without_context = (log_probs.cpu().numpy() for log_probs in self._stepper.step(pairs))
        stepped = time.perf_counter()
        for row in zip(with_context, without_context, strict=True):
            _encode(encoding, *row)
        return 1000 * (stepped - start), 1000 * (time.perf_counter() - stepped)

    def _ids(self, count: int) -> list[int]:
        return self._rng.choices(range(FIRST_WORD, self._vocab), k=count)


def _encode(encoding: str, with_context: npt.NDArray[np.float32], without_context: npt.NDArray[np.float32]) -> bytes:
    if encoding == "lossless":
        return encode_lossless(with_context - without_context)
    return encode_sparse(with_context, without_context, SteeringParams().strength)
