"""How quick an edge worker is, on this machine's CPU: ``python -m benchmarks.edge [--only PARTS] [--json FILE]``.

warm      a request about a context that a former request was about, against the first one: time to the first delta
step      where the time of a step goes: the small model, and what stands around it
variants  the same step compiled, or with int8 weights: time against the plain one, and how far off its log-probabilities are
guesses   how often the token is chosen that a rule takes for the likeliest, or for the second, on the demo pair
"""

import argparse
import contextlib
import copy
import json
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from costeer_vllm.bench import models
from costeer_vllm.demo.export import MODELS
from costeer_vllm.demo.scores import load_pair
from costeer_vllm.demo.task import held_out
from costeer_vllm.edge.context import PrivateContexts
from costeer_vllm.edge.evaluator import Evaluator
from costeer_vllm.edge.prompts import Surround, prompts
from costeer_vllm.edge.retrieval import Retriever
from costeer_vllm.edge.small_model import SmallModel
from costeer_vllm.edge.streams import Answer, Order
from costeer_vllm.offline import Policy, Steering, end_ids, generate
from costeer_vllm.protocol.messages import Query, Turn
from costeer_vllm.protocol.stream import extend_hash
from costeer_vllm.steering import SteeringParams

REALISTIC, TINY = models.Shape(512, 2048, 8, 8, 2), models.ON_CPU.small
VOCAB, LARGE_VOCAB = 8192, 151_936
POSITIONS = 8192
CONTEXT_TOKENS, QUERY_TOKENS, NUM_CONTEXTS = 2000, 64, 7
STEPS = 40  # per repetition


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured number, all of its repetitions."""

    name: str
    unit: str
    values: list[float]

    def row(self) -> dict[str, Any]:
        values = self.values
        numbers = {"minimum": min(values), "median": statistics.median(values), "maximum": max(values)}
        return {"name": self.name, "unit": self.unit, "repetitions": len(values), **numbers}


class Device:
    """An evaluator and its streams, without a worker around it."""

    def __init__(self, model: SmallModel, tokenizer: Any, contexts: PrivateContexts, encoding: Any = "sparse") -> None:
        self.evaluator = Evaluator(model, tokenizer, None, contexts, encoding, Retriever(tokenizer, POSITIONS // 2, None))
        self.tokens: dict[int, list[int]] = {}

    def begin(self, query: Query) -> float:
        """Seconds from a question to its first delta."""
        serial = len(self.tokens) + 1
        self.tokens[serial] = []
        start = time.perf_counter()
        orders = [Order(serial, 0, (), 0, 0, query)]
        while not any(isinstance(result, Answer) for result in self.evaluator.turn(orders, [])):
            orders = []
        return time.perf_counter() - start

    def advance(self, token: int) -> float:
        """Seconds that the next delta of all streams takes."""
        orders = []
        for serial, tokens in self.tokens.items():
            tokens.append(token)
            orders.append(Order(serial, len(tokens) - 1, (token,), len(tokens), extend_hash(0, tokens)))
        start = time.perf_counter()
        results = self.evaluator.turn(orders, [])
        seconds = time.perf_counter() - start
        assert len(results) == len(orders), results
        return seconds

    def end(self) -> None:
        """Close the newest stream."""
        serial = max(self.tokens)
        self.evaluator.turn([], [serial])
        self.tokens[serial] = []


# --- warm ---


def warm(repetitions: int) -> Iterator[Figure]:
    """Fresh against warm, in pairs; other contexts may have come in between, and another stream may be open."""
    rng = random.Random(0)
    configuration = models.config(REALISTIC, VOCAB)
    configuration.max_position_embeddings = POSITIONS
    tokenizer = models.tokenizer(VOCAB)
    for between, is_open in ((0, False), (0, True), (3, False), (NUM_CONTEXTS - 1, False)):
        fresh, again = list[float](), list[float]()
        for _ in track(range(repetitions), f"warm, {between} others between", transient=True):
            model = SmallModel(models.build(configuration, "float32"))
            with named_contexts(rng) as contexts:
                device = Device(model, tokenizer, contexts)
                if is_open:
                    device.begin(query(rng, f"c{NUM_CONTEXTS - 1}"))
                fresh.append(device.begin(query(rng, "c0")))
                device.end()
                for i in range(between):
                    device.begin(query(rng, f"c{i + 1}"))
                    device.end()
                again.append(device.begin(query(rng, "c0")))
        name = f"{between} other contexts between" + (", another stream open" if is_open else "")
        yield Figure(f"first delta, fresh; {name}", "ms", [1000 * seconds for seconds in fresh])
        yield Figure(f"first delta, warm; {name}", "ms", [1000 * seconds for seconds in again])
        yield Figure(f"warm / fresh; {name}", "ratio", [b / a for a, b in zip(fresh, again, strict=True)])


@contextlib.contextmanager
def named_contexts(rng: random.Random) -> Iterator[PrivateContexts]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "contexts.jsonl"
        before = [f"{models.text(rng, CONTEXT_TOKENS, VOCAB)} " for _ in range(NUM_CONTEXTS)]
        file.write_text("".join(json.dumps({"ref": f"c{i}", "before": part}) + "\n" for i, part in enumerate(before)))
        yield PrivateContexts.load(None, str(file))


def query(rng: random.Random, ref: str | None = None, vocab: int = VOCAB) -> Query:
    return Query(messages=[Turn("user", models.text(rng, QUERY_TOKENS, vocab))], ref=ref)


# --- step ---


def step(repetitions: int) -> Iterator[Figure]:
    """The turn of an evaluator and the model's share of it; then the parts around the model, as they are called there."""
    with tempfile.TemporaryDirectory() as name:
        context = Path(name) / "me.md"
        context.write_text(models.text(random.Random(1), 128, VOCAB))
        large = models.write_small(Path(name) / "large", TINY, LARGE_VOCAB)
        realistic = models.write_small(Path(name) / "realistic", REALISTIC, VOCAB)
        folders = {"demo's small model": MODELS / "small", "2 layers of 64, 151,936 ids": large, "8 layers of 512": realistic}
        for label, folder in folders.items():
            for num_streams in (1, 8):
                yield from times_of_steps(f"{label}, {num_streams} streams", folder, context, num_streams, repetitions)


def times_of_steps(label: str, folder: Path, context: Path, num_streams: int, repetitions: int) -> Iterator[Figure]:
    model = SmallModel.load(str(folder), "float32")
    rng, counted = random.Random(2), list[float]()
    run = model.step

    def timed(*args: Any) -> Any:
        start = time.perf_counter()
        found = run(*args)
        counted.append(time.perf_counter() - start)
        return found

    model.step = timed  # type: ignore[method-assign]
    device = Device(model, AutoTokenizer.from_pretrained(folder), PrivateContexts.load(str(context)))
    for _ in range(num_streams):
        device.begin(query(rng))
    turns, steps = list[float](), list[float]()
    for _ in track(range(repetitions), label, transient=True):
        counted.clear()
        turns.append(statistics.median(device.advance(5) for _ in range(STEPS)))
        steps.append(statistics.median(counted))
    yield Figure(f"turn; {label}", "ms", [1000 * seconds for seconds in turns])
    yield Figure(f"of it the small model; {label}", "ms", [1000 * seconds for seconds in steps])
    yield Figure(f"of it all else; {label}", "ms", [1000 * (a - b) for a, b in zip(turns, steps, strict=True)])


# --- variants ---


def variants(repetitions: int) -> Iterator[Figure]:
    """One step of one stream, each variant and the plain one in turns."""
    plain = {
        "demo's small model": AutoModelForCausalLM.from_pretrained(MODELS / "small", dtype=torch.float32).eval(),
        "8 layers of 512": models.build(models.config(REALISTIC, VOCAB), "float32"),
    }
    changes: dict[str, Callable[[Any], Any]] = {"int8": quantized, "compiled": compiled}
    for label, model in plain.items():
        for name, change in changes.items():
            try:
                changed = Steps(change(copy.deepcopy(model)))
                unchanged = Steps(copy.deepcopy(model))
                pairs = [(changed.run(), unchanged.run()) for _ in track(range(repetitions), f"{label}, {name}", transient=True)]
            except Exception as error:
                print(f"{label}, {name}: {type(error).__name__}: {error}".splitlines()[0][:200])
                continue
            yield Figure(f"{name}; {label}", "ms", [1000 * a for a, _ in pairs])
            yield Figure(f"{name} / plain; {label}", "ratio", [a / b for a, b in pairs])
            off = (changed.log_probs() - unchanged.log_probs()).abs()
            yield Figure(f"{name}: log-probability off; {label}", "nats", [off.mean().item(), off.max().item()])


class Unchecked(SmallModel):
    """Also one that gives another result in windows than at once: int8, whose scales are those of everything in a window."""

    def _check_exact(self, sample: list[int], expected: torch.Tensor) -> None:
        pass


class Steps:
    """A model and one stream of it."""

    def __init__(self, model: Any) -> None:
        self.model = Unchecked(model)
        rng = random.Random(3)
        ids = [rng.randrange(self.model.num_tokens) for _ in range(QUERY_TOKENS)]
        self.pair = self.model.open([*ids, *ids, *ids], ids)
        while not self.pair.is_ready:
            self.model.prefill(self.pair)
        self.run()

    def run(self) -> float:
        """Seconds of a step, a median."""
        return statistics.median(self._timed(i) for i in range(STEPS))

    def log_probs(self) -> torch.Tensor:
        """Of the next id after a fixed text, without context."""
        self.pair.rewrite(0, [7, 8, 9])
        return self.model.step([self.pair])[1][0]

    def _timed(self, i: int) -> float:
        self.pair.rewrite(i, [5])
        start = time.perf_counter()
        self.model.step([self.pair])
        return time.perf_counter() - start


def quantized(model: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)


def compiled(model: Any) -> Any:
    model.forward = torch.compile(model.forward, dynamic=True)
    return model


# --- guesses ---

RULES: dict[str, Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]] = {
    "with context": lambda log_with, log_without, c: log_with,
    "without context": lambda log_with, log_without, c: log_without,
    "without + c * delta": lambda log_with, log_without, c: torch.lerp(log_without, log_with, c),
    "with + c * delta": lambda log_with, log_without, c: torch.lerp(log_without, log_with, 1 + c),
}


def guesses(repetitions: int) -> Iterator[Figure]:
    """Texts of the demo pair, greedy and sampled; a repetition is a tenth of the held-out queries."""
    pair = load_pair()
    for T in (1, 20):
        for name, choose in {"greedy": {}, "sampled": {"choose": sample}}.items():
            hits: dict[str, list[float]] = {}
            for part in track(range(repetitions), f"guesses, T={T}, {name}", transient=True):
                rows = held_out(200)[part::10]
                for rule, share in hit_rates(pair, rows, SteeringParams(T=T).strength, choose).items():
                    hits.setdefault(rule, []).append(share)
            for rule, shares in hits.items():
                yield Figure(f"guessed by {rule}; T={T}, {name}", "share of tokens", shares)


def sample(logits: torch.Tensor) -> torch.Tensor:
    return torch.multinomial(torch.softmax(logits, -1), 1)[:, 0]


@torch.inference_mode()
def hit_rates(pair: Any, rows: Any, strength: float, choose: Any) -> dict[str, float]:
    asked = [Query(messages=[Turn(**message) for message in row.messages]) for row in rows]
    ids = [prompts(query, Surround(f"{row.context}\n\n"), pair.tokenizer) for query, row in zip(asked, rows, strict=True)]
    with_ids, without_ids = zip(*ids, strict=True)
    steering = Steering(Policy(pair.small, with_ids), Policy(pair.small, without_ids), strength)
    found = generate(Policy(pair.large, without_ids), steering, end_ids(pair.large), 100, **choose)
    hits, num_tokens = dict.fromkeys([f"{rule}{nth}" for rule in RULES for nth in ("", ", or the second")], 0.0), 0
    for (with_prompt, without_prompt), text in zip(ids, found, strict=True):
        log_with, log_without = (log_probs(pair.small, prompt, text.ids) for prompt in (with_prompt, without_prompt))
        num_tokens += len(text.ids)
        for rule, policy in RULES.items():
            is_hit = policy(log_with, log_without, strength).topk(2).indices == torch.tensor(text.ids)[:, None]
            hits[rule] += is_hit[:, 0].sum().item()
            hits[f"{rule}, or the second"] += is_hit.any(-1).sum().item()
    return {rule: count / num_tokens for rule, count in hits.items()}


def log_probs(model: Any, prompt: list[int], text: list[int]) -> torch.Tensor:
    """Of every token of ``text``: [tokens, vocab]."""
    logits = model(input_ids=torch.tensor([[*prompt, *text]])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits.float(), -1)


PARTS: dict[str, Callable[[int], Iterator[Figure]]] = {"warm": warm, "step": step, "variants": variants, "guesses": guesses}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.edge", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between them (default: all)")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    unknown = set(options.only.split(",")) - set(PARTS)
    if unknown:
        parser.error(f"--only {','.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = []
    for part in options.only.split(","):
        for figure in PARTS[part](options.repetitions):
            rows.append(figure.row())
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1) + "\n")
    Console(width=130).print(table(rows))


def table(rows: list[dict[str, Any]]) -> Table:
    view = Table("figure", "unit", title="Edge worker on a CPU: medians of repetitions")
    for column in ("minimum", "median", "maximum"):
        view.add_column(column, justify="right")
    for row in rows:
        view.add_row(row["name"], row["unit"], *(f"{row[column]:.3g}" for column in ("minimum", "median", "maximum")))
    return view


if __name__ == "__main__":
    main()
