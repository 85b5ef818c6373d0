"""A number of streams at once against one server, and what came of it."""

import contextlib
import random
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
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


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer."""

    request: str
    text: str
    num_tokens: int


class Client:
    """Asks one server, every stream a prompt of its own that was never asked before."""

    def __init__(self, server: Server, vocab: int, max_streams: int) -> None:
        """``vocab``: of the prompts that it makes up, see ``models.text``."""
        self._server, self._vocab, self._rng = server, vocab, random.Random("prompts")
        self._http = httpx.Client(trust_env=False, timeout=600.0, limits=httpx.Limits(max_connections=max_streams + 1))
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
        replies = list(self._pool.map(self._ask, bodies))
        elapsed_s = time.perf_counter() - start
        total_s, count = (after - earlier for after, earlier in zip(self._step_times(), before, strict=True))
        counts = [self._counts(reply) for reply in replies] if costeer is not None else []
        if short := [reply.num_tokens for reply in replies if reply.num_tokens != num_tokens]:
            raise Incomplete(f"an answer has {short[0]} tokens where {num_tokens} were asked for")
        return Result(
            tokens_per_s=streams * num_tokens / elapsed_s,
            step_ms=1000 * total_s / max(count, 1),
            steered=sum(steered for steered, _ in counts),
            missed=sum(missed for _, missed in counts),
        )

    def answer(self, messages: Sequence[Mapping[str, str]], num_tokens: int, costeer: Mapping[str, Any]) -> tuple[Reply, Result]:
        """One request for at most ``num_tokens`` tokens, greedy and steered; the tokens missed are in the result.

        Raises:
            Incomplete: if the hub has no account of it.
        """
        body = self._question(messages, num_tokens) | {"costeer": dict(costeer)}
        start = time.perf_counter()
        reply = self._ask(body)
        elapsed_s = time.perf_counter() - start
        steered, missed = self._counts(reply)
        return reply, Result(reply.num_tokens / elapsed_s, 1000 * elapsed_s / reply.num_tokens, steered, missed)

    @contextlib.contextmanager
    def companion(self, costeer: Mapping[str, Any], num_tokens: int) -> Iterator[None]:
        """One more stream, from its first token until the block ends; ``num_tokens``: more than it can reach."""
        begun, enough = threading.Event(), threading.Event()
        task = self._pool.submit(self._stream, self._body(num_tokens, costeer), begun, enough)
        try:
            while not begun.wait(0.1):
                if task.done():
                    task.result()
                    raise Incomplete("the stream beside the others ended before they began")
            yield
            if task.done():
                raise Incomplete(f"the stream beside the others ended before them, after {num_tokens} tokens")
        finally:
            enough.set()
        task.result()

    def _stream(self, body: dict[str, Any], begun: threading.Event, enough: threading.Event) -> None:
        with self._http.stream("POST", f"{self._server.url}/chat/completions", json={**body, "stream": True}) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                if '"content"' in line:
                    begun.set()
                if enough.is_set():
                    return

    def _body(self, num_tokens: int, costeer: Mapping[str, Any] | None) -> dict[str, Any]:
        messages = [{"role": "user", "content": text(self._rng, PROMPT_WORDS, self._vocab)}]
        body = self._question(messages, num_tokens) | {"ignore_eos": True}
        return body if costeer is None else {**body, "costeer": dict(costeer)}

    def _question(self, messages: Sequence[Mapping[str, str]], num_tokens: int) -> dict[str, Any]:
        return {"model": self._model, "messages": list(messages), "max_tokens": num_tokens, "temperature": 0}

    def _ask(self, body: Mapping[str, Any]) -> Reply:
        answer = self._http.post(f"{self._server.url}/chat/completions", json=body).raise_for_status().json()
        return Reply(answer["id"], answer["choices"][0]["message"]["content"] or "", answer["usage"]["completion_tokens"])

    def _counts(self, reply: Reply) -> tuple[int, int]:
        """Tokens steered and missed of one request."""
        account = self._server.account(reply.request)
        steered, missed = account["tokens_steered"], account["tokens_missed"]
        if steered + missed != reply.num_tokens:
            raise Incomplete(f"the hub accounts for {steered + missed} tokens of {reply.request}, which has {reply.num_tokens}")
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
