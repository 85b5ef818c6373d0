"""The demo through the real thing: ``vllm serve``, the hub, edge workers and the ``openai`` client, on the shipped pair."""

import contextlib
import itertools
import json
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
from rich.console import Console
from rich.panel import Panel
from rich.progress import Progress

from costeer_vllm.demo.export import export, slug
from costeer_vllm.demo.scores import MAX_NEW_TOKENS, STEERED_T, as_table, load_pair, scores
from costeer_vllm.demo.task import Row, held_out, score
from costeer_vllm.errors import InvalidParameter
from costeer_vllm.processes import Server, edge_worker, serving, wait_until

ROWS_PER_PROFILE = 25
BASELINES = ("small_without", "small_with", "large_without", "large_with")
SERVER_OPTIONS = ("--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "16", "--dtype", "float32")


@dataclass(frozen=True, slots=True)
class Served:
    """What the served path gave: one answer per row, and what the hub counted."""

    answers: list[str]
    tokens_steered: int
    tokens_missed: int


def run_demo(T: int, num_profiles: int, num_rows: int, as_json: bool) -> None:
    """Serve the pair, ask held-out queries plain and steered, print answers and scores; with ``as_json`` one JSON line last.

    Raises:
        CoSteerError, openai.OpenAIError: if anything does not work.
    """
    if not 1 <= num_profiles <= 8:
        raise InvalidParameter("profiles", num_profiles, "a number from 1 to 8")
    console = Console(stderr=as_json)
    rows = held_out(8 * ROWS_PER_PROFILE)[: num_profiles * ROWS_PER_PROFILE]
    with tempfile.TemporaryDirectory(prefix="costeer-demo-") as name, Progress(console=console, transient=True) as progress:
        folder = export(Path(name))
        task = progress.add_task("starting vLLM, the hub and the edge workers", total=None)
        with attached(folder, [row.items["name"] for row in rows]) as server:
            progress.update(task, description="asking, plain", total=2 * len(rows))
            plain = ask_all(server, rows, None, lambda: progress.advance(task))
            progress.update(task, description="asking, steered")
            steered = ask_all(server, rows, {"T": T}, lambda: progress.advance(task))
        progress.update(task, description="scoring offline", total=None)
        offline = scores(load_pair(), held_out(num_rows))
    show(console, rows, plain, steered)
    served = {"large_without": _shares(plain.answers, rows), f"steered_T{T}": _shares(steered.answers, rows)}
    console.print(as_table(offline, num_rows), as_table({f"{name}, served": row for name, row in served.items()}, len(rows)))
    favored = max(STEERED_T, key=lambda T: sum(offline[f"steered_T{T}"].values()))
    console.print(f"Served through the OpenAI API at T = {T}; of {STEERED_T} the offline scores favor T = {favored}.")
    console.print(f"{steered.tokens_steered} tokens steered, {steered.tokens_missed} missed.")
    if as_json:
        table = {name: offline[name] for name in BASELINES} | {"steered": served[f"steered_T{T}"]}
        print(json.dumps({"scores": table, "tokens_steered": steered.tokens_steered, "tokens_missed": steered.tokens_missed}))


@contextlib.contextmanager
def attached(folder: Path, names: Sequence[str]) -> Iterator[Server]:
    """The exported pair served from ``folder``, with one edge worker for every profile in ``names``."""
    with serving(folder / "large", folder / "logs", SERVER_OPTIONS) as server, contextlib.ExitStack() as stack:
        options = ("--delta", "lossless", "--dtype", "float32", "--threads", "1")
        workers = list(dict.fromkeys(slug(name) for name in names))
        for worker in workers:
            context = folder / "contexts" / f"{worker}.md"
            edge = edge_worker(server.hub, worker, folder / "small", context, folder / "logs", options, wait=False)
            last = stack.enter_context(edge)
        wait_until(lambda: len(server.workers()) == len(workers), last)
        yield server


def ask_all(server: Server, rows: Sequence[Row], steering: dict[str, Any] | None, done: Any) -> Served:
    """Every row's query through the OpenAI API, eight at a time, greedy; ``steering`` becomes the ``costeer`` extra body."""
    client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)
    model = client.models.list().data[0].id

    def ask(row: Row) -> tuple[str, str]:
        body = None if steering is None else {"costeer": {"worker": slug(row.items["name"]), "deadline_ms": 60_000, **steering}}
        messages: Any = row.messages
        answer = client.chat.completions.create(
            model=model, messages=messages, max_tokens=MAX_NEW_TOKENS, temperature=0, extra_body=body
        )
        done()
        return answer.id, answer.choices[0].message.content or ""

    with ThreadPoolExecutor(8) as pool:
        ids, answers = zip(*pool.map(ask, rows), strict=True)
    if steering is None:
        return Served(list(answers), 0, 0)
    counts = [server.account(request_id) for request_id in ids]
    return Served(
        list(answers), sum(count["tokens_steered"] for count in counts), sum(count["tokens_missed"] for count in counts)
    )


def show(console: Console, rows: Sequence[Row], plain: Served, steered: Served) -> None:
    """One row of every profile: the context that stayed on the device, the query, the plain and the steered answer."""
    for _, group in itertools.groupby(range(len(rows)), key=lambda i: rows[i].items["name"]):
        i = next(group)
        console.print(Panel(rows[i].context.strip(), title="private context: stays on the device", border_style="dim"))
        console.print(Panel(rows[i].messages[-1]["content"], title="query: all that the server is told"))
        console.print(Panel(plain.answers[i], title="plain", border_style="yellow"))
        console.print(Panel(steered.answers[i], title="steered", border_style="green"))


def _shares(answers: Sequence[str], rows: Sequence[Row]) -> dict[str, float]:
    shares = [score(answer, row) for answer, row in zip(answers, rows, strict=True)]
    profile, facts = (sum(column) / len(rows) for column in zip(*shares, strict=True))
    return {"profile": profile, "facts": facts}
