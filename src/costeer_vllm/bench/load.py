"""A number of streams at once against one server, and what came of it."""

import random
import re
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx

from costeer_vllm.bench.models import PROMPT_WORDS, text
from costeer_vllm.errors import CoSteerError
from costeer_vllm.processes import Server


class Incomplete(CoSteerError):
    """An answer without as many tokens as were asked for: the figures would be wrong."""


@dataclass(frozen=True, slots=True)
class Result:
    """One phase: all streams from the first request to the last answer, prompts included."""

    tokens_per_s: float  # of all streams together
    step_ms: float  # from a token of a stream to its next one, mean, as the server took it
    steered: int
    missed: int


class Client:
    """Asks one server, every stream a prompt of its own that was never asked before."""

    def __init__(self, server: Server, vocab: int, max_streams: int) -> None:
        self._server, self._vocab, self._rng = server, vocab, random.Random("prompts")
        self._http = httpx.Client(trust_env=False, timeout=600.0, limits=httpx.Limits(max_connections=max_streams))
        self._pool = ThreadPoolExecutor(max_streams)
        self._model = self._get(f"{server.url}/models").json()["data"][0]["id"]

    def close(self) -> None:
        """Close the connections."""
        self._pool.shutdown()
        self._http.close()

    def load(self, streams: int, num_tokens: int, costeer: Mapping[str, Any] | None = None) -> Result:
        """``streams`` requests at once for exactly ``num_tokens`` tokens each, greedy; steered if ``costeer`` is given.

        Raises:
            Incomplete: if an answer is not as long as asked for, or the hub has no account of it.
        """
        bodies = [self._body(num_tokens, costeer) for _ in range(streams)]
        before = self._step_times()
        start = time.perf_counter()
        ids = list(self._pool.map(self._ask, bodies))
        elapsed_s = time.perf_counter() - start
        total_s, count = (after - earlier for after, earlier in zip(self._step_times(), before, strict=True))
        counts = [self._counts(request, num_tokens) for request in ids] if costeer is not None else []
        return Result(
            tokens_per_s=streams * num_tokens / elapsed_s,
            step_ms=1000 * total_s / max(count, 1),
            steered=sum(steered for steered, _ in counts),
            missed=sum(missed for _, missed in counts),
        )

    def _body(self, num_tokens: int, costeer: Mapping[str, Any] | None) -> dict[str, Any]:
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": text(self._rng, PROMPT_WORDS, self._vocab)}],
            "max_tokens": num_tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        return body if costeer is None else {**body, "costeer": dict(costeer)}

    def _ask(self, body: Mapping[str, Any]) -> str:
        answer = self._http.post(f"{self._server.url}/chat/completions", json=body).raise_for_status().json()
        tokens = answer["usage"]["completion_tokens"]
        if tokens != body["max_tokens"]:
            raise Incomplete(f"an answer has {tokens} tokens where {body['max_tokens']} were asked for")
        return str(answer["id"])

    def _counts(self, request: str, num_tokens: int) -> tuple[int, int]:
        """Tokens steered and missed of one request."""
        account = self._server.account(request)
        steered, missed = account["tokens_steered"], account["tokens_missed"]
        if steered + missed != num_tokens:
            raise Incomplete(f"the hub accounts for {steered + missed} tokens of {request}, which has {num_tokens}")
        return steered, missed

    def _step_times(self) -> tuple[float, float]:
        """Seconds between tokens, over all requests so far, and their number; from the server's own metrics."""
        metrics = self._get(self._server.url.removesuffix("/v1") + "/metrics").text
        return _sum(metrics, "vllm:inter_token_latency_seconds_sum"), _sum(metrics, "vllm:inter_token_latency_seconds_count")

    def _get(self, url: str) -> httpx.Response:
        return self._http.get(url).raise_for_status()


def _sum(metrics: str, name: str) -> float:
    """A metric in Prometheus' text format, over all of its labels; 0 if it is absent."""
    return sum(float(value) for value in re.findall(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)", metrics, re.MULTILINE))
