"""One slow edge among many: the tokens per second of seven streams, beside an eighth whose edge worker is far away, or is not."""

import contextlib
from typing import Any

from costeer_vllm.bench import models
from costeer_vllm.bench.bench import Bench
from costeer_vllm.bench.load import Client
from costeer_vllm.bench.pair import STEERING, BenchPair
from costeer_vllm.bench.relay import relay

SLOW_MS = 500  # the slow edge's answers
STREAMS = 7
MOST_TOKENS = 24  # of each of the seven
SLOW_WORKER = "slow"
SLOW = STEERING | {"worker": SLOW_WORKER}
BESIDE = {"beside_fast": STEERING, "beside_slow": SLOW}  # who steers the eighth stream
REACH = models.MAX_POSITIONS - models.PROMPT_WORDS - 64  # tokens of the eighth stream, which is cut off before


def num_steps(bench: Bench) -> int:
    """Two starts, and both in every repetition and in the warm-up."""
    return 2 + (1 + bench.settings.repetitions) * len(BESIDE)


def measure(bench: Bench) -> None:
    """Both of all repetitions into ``bench.samples``."""
    vocab, tokens = bench.settings.vocab, min(MOST_TOKENS, bench.settings.tokens)
    with contextlib.ExitStack() as stack:
        bench.say("starting vLLM with the plugin")
        pair = BenchPair(bench)
        server = stack.enter_context(pair.server("neighbors", STREAMS + 1, steering=True))
        bench.say("starting a fast edge worker and a slow one")
        stack.enter_context(pair.edge(server.hub))
        far = stack.enter_context(relay(server.hub, SLOW_MS, bench.folder / "relays"))
        stack.enter_context(pair.edge(far, SLOW_WORKER))
        client = stack.enter_context(contextlib.closing(Client(server, vocab, STREAMS + 1)))
        for beside in BESIDE.values():
            bench.say("warming up", settle=True)
            _seven(client, 4, beside)
        for label in bench.repetitions():
            for name, beside in BESIDE.items():
                bench.say(f"{label}: seven streams {name.replace('_', ' a ')} one", settle=True)
                tokens_per_s, missed = _seven(client, tokens, beside)
                bench.samples.add(name, "tokens/s", tokens_per_s)
                bench.samples.add(f"{name}_missed", "tokens", missed)


def _seven(client: Client, num_tokens: int, beside: dict[str, Any]) -> tuple[float, int]:
    with client.companion(beside, REACH):
        result = client.load(STREAMS, num_tokens, STEERING)
    return result.tokens_per_s, result.missed


def notes(bench: Bench) -> list[str]:
    """What a reader must know of this part."""
    tokens = min(MOST_TOKENS, bench.settings.tokens)
    return [
        f"One slow edge: {STREAMS} streams of {tokens} tokens, steered by a fast edge worker, begin when an eighth has its first "
        f"token, and it goes on until they have ended. Its edge worker is the same, or one behind a relay of {SLOW_MS} ms."
    ]
