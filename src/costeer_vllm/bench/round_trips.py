"""The demo pair with the edge worker further and further away: tokens per second of one stream, with look-ahead and without.

A relay lies between the hub and the edge workers, two of them for every round trip. Greedy and with lossless deltas, so that
every answer must be the same in all of them.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from costeer_vllm.bench import machine
from costeer_vllm.bench.bench import Bench
from costeer_vllm.bench.load import Client
from costeer_vllm.bench.relay import relay
from costeer_vllm.demo.export import export, slug
from costeer_vllm.demo.scores import MAX_NEW_TOKENS
from costeer_vllm.demo.served import SERVER_OPTIONS
from costeer_vllm.demo.task import Row, held_out
from costeer_vllm.edge.settings import EdgeSettings
from costeer_vllm.processes import Server, edge_worker, serving, wait_until

EDGE_OPTIONS = ("--delta", "lossless", "--dtype", "float32", "--threads", "1")
# What is measured, and how its edge worker is told. An edge worker that does not know look-ahead does without.
KNOWS_LOOK_AHEAD = "look_ahead" in EdgeSettings.__dataclass_fields__
MODES = {"waiting": ("--no-look-ahead",), "look_ahead": ("--look-ahead",)} if KNOWS_LOOK_AHEAD else {"waiting": ()}


def num_steps(bench: Bench) -> int:
    """Two starts, and every round trip in every repetition and in the warm-up."""
    return 2 + (1 + bench.settings.repetitions) * len(bench.settings.round_trips_ms)


def measure(bench: Bench) -> None:
    """All round trips of all repetitions into ``bench.samples``; a query of its own for each repetition."""
    rows = held_out(1 + bench.settings.repetitions)
    with started(bench, slug(rows[0].items["name"])) as client:
        for label, row in zip(["warming up", *bench.repetitions()], rows, strict=True):
            for round_trip_ms in bench.settings.round_trips_ms:
                bench.say(f"{label}: a round trip of {round_trip_ms} ms", settle=True)
                _ask(bench, client, row, round_trip_ms, keep=label != "warming up")


@contextlib.contextmanager
def started(bench: Bench, profile: str) -> Iterator[Client]:
    """The server, and for every round trip a relay with its edge workers, all with the context of ``profile``."""
    bench.say("starting vLLM on the demo's large model")
    folder = export(bench.folder / "demo")
    environment = machine.worker_environment(bench.cores)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serving(folder / "large", folder / "logs", SERVER_OPTIONS, environment))
        machine.keep_off(server.process.pid, bench.cores)
        bench.say("starting relays and edge workers")
        _start_edges(bench, stack, server, folder, folder / "contexts" / f"{profile}.md")
        yield stack.enter_context(contextlib.closing(Client(server, vocab=0, max_streams=1)))


def _start_edges(bench: Bench, stack: contextlib.ExitStack, server: Server, folder: Path, context: Path) -> None:
    edges = []
    for round_trip_ms in bench.settings.round_trips_ms:
        hub = stack.enter_context(relay(server.hub, round_trip_ms, folder / "logs"))
        for mode, options in MODES.items():
            given = [*EDGE_OPTIONS, *options]
            name = _worker(mode, round_trip_ms)
            edges.append(
                stack.enter_context(edge_worker(hub, name, folder / "small", context, folder / "logs", given, wait=False))
            )
    wait_until(lambda: len(server.workers()) == len(edges), edges[-1])
    for edge in edges:
        machine.pin(edge.process.pid, bench.cores.small)


def _ask(bench: Bench, client: Client, row: Row, round_trip_ms: int, keep: bool) -> None:
    texts = set()
    for mode in MODES:
        steering = {"worker": _worker(mode, round_trip_ms), "deadline_ms": 60_000, "T": 1}
        reply, result = client.answer(row.messages, MAX_NEW_TOKENS, steering)
        texts.add(reply.text)
        if keep:
            bench.samples.add(mode, "tokens/s", result.tokens_per_s, round_trip_ms=round_trip_ms)
            bench.samples.add(f"{mode}_missed", "tokens", result.missed, round_trip_ms=round_trip_ms)
    if keep:
        bench.samples.add("other_answers", "answers", len(texts) - 1, round_trip_ms=round_trip_ms)


def _worker(mode: str, round_trip_ms: int) -> str:
    return f"{mode}-{round_trip_ms}"


def notes(_: Bench) -> list[str]:
    """What a reader must know of this part."""
    compared = "" if KNOWS_LOOK_AHEAD else " This edge worker knows no look-ahead."
    return [
        "Round trips: the demo pair, held-out queries with one profile as context, one stream, T = 1, greedy, lossless deltas; "
        f"a relay between edge worker and hub delays every byte.{compared}"
    ]
