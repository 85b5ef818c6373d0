"""The experiments, each a function from a pair of models to figures."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.privacy.attackers import CHANNELS, along, distances, payloads, posteriors
from benchmarks.privacy.cases import NUM_CONTEXTS, SETS, Case, all_rows, cases, queries
from benchmarks.privacy.measures import Point, Share, by_distance, by_tokens
from benchmarks.privacy.mechanism import Setting, Transcript, transcripts
from benchmarks.privacy.outside import ITERATIONS, Outside, outside
from benchmarks.privacy.reader import prompts_of
from benchmarks.privacy.suspects import Floats
from costeer_vllm.demo.scores import Pair
from costeer_vllm.demo.task import Row, score
from costeer_vllm.protocol.messages import Sampling
from costeer_vllm.steering import SteeringParams

SEEN = 64  # tokens that the attacker sees at the most
MAX_TOKENS = 80  # of an answer
BUDGETS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # bits; and none
LEDGER_BUDGET = 4.0  # of the answers whose ledgers alone are looked at
STRENGTHS = {T: SteeringParams(T=T).strength for T in ITERATIONS}

Advance = Callable[[], None]  # a step of the work is done


@dataclass(frozen=True, slots=True)
class Size:
    """How much is run."""

    num_queries: int = 10
    num_fewer: int = 5  # queries, of what takes longer for each: deltas and budgets
    num_contexts: int = NUM_CONTEXTS
    samples: int = 2  # at the paper's strength; one of everything else
    num_answers: int = 200


QUICK = Size(num_queries=2, num_fewer=1, num_contexts=4, samples=1, num_answers=16)


@dataclass(frozen=True, slots=True)
class Curve:
    """One attack on one set of candidates."""

    candidates: str
    channel: str
    sampling: str
    points: list[Point]


@dataclass(frozen=True, slots=True)
class Budgeted:
    """The attack on the tokens of answers under a budget, after SEEN tokens."""

    candidates: str
    max_bits: float | None
    accuracy: Share
    expected: float  # how often it should be right by its own posterior: the same share, with less chance in it
    bound: float  # of the accuracy of any attacker
    ledger: float  # bits, mean
    most: float  # bits, the highest at any token
    shown: float  # of the profile's items, the share that the answers state

    @property
    def holds(self) -> bool:
        """Whether the ledger kept to the budget, and whether the bound lies above the interval's lower end."""
        return self.accuracy.low <= self.bound and (self.max_bits is None or self.most <= self.max_bits + 1e-9)


@dataclass(frozen=True, slots=True)
class Ledgers:
    """Of sampled answers to the evaluation queries, under a budget."""

    max_bits: float
    num_answers: int
    num_tokens: int
    mean: float  # bits, at the end
    most: float  # bits, at any token
    num_above: int  # tokens at which a ledger was above the budget


@dataclass(frozen=True, slots=True)
class Found:
    """Everything."""

    size: Size
    tokens: list[Curve]
    deltas: list[Curve]
    budgets: list[Budgeted]
    ledgers: Ledgers
    outside: list[Outside]

    @property
    def holds(self) -> bool:
        """Whether every budget did what it promises."""
        return all(one.holds for one in self.budgets) and not self.ledgers.num_above


def sampled(T: int, max_bits: float | None = None) -> Setting:
    """Temperature 1, nothing truncated."""
    return Setting(STRENGTHS[T], Sampling(max_bits=max_bits))


def greedy(T: int) -> Setting:
    return Setting(STRENGTHS[T], Sampling(temperature=0))


MAIN = "sampled, T = 20"
SETTINGS = {MAIN: sampled(20), "sampled, T = 1": sampled(1), "greedy, T = 20": greedy(20)}


def attack_tokens(pair: Pair, folder: Path, size: Size, advance: Advance) -> tuple[list[Curve], dict[str, list[Transcript]]]:
    """Edge fusion: the curves, and by set the answers of MAIN."""
    curves, kept = [], {}
    for candidates in SETS:
        for name, setting in SETTINGS.items():
            samples = size.samples if name == MAIN else 1
            found = answers(pair, _cases(folder, candidates, size.num_queries, size), setting, samples, advance)
            curves.append(Curve(candidates, "tokens", name, by_tokens(found)))
            if name == MAIN:
                kept[candidates] = found
    return curves, kept


def attack_deltas(pair: Pair, answered: dict[str, list[Transcript]], size: Size, advance: Advance) -> list[Curve]:
    """Cloud fusion: what the deltas along the same texts give away, one text for each context and query."""
    rounded = Pair(pair.large, copy.deepcopy(pair.small).to(torch.bfloat16), pair.tokenizer)
    attackers = {"": pair, ", attacker in bfloat16": rounded}
    curves = []
    for candidates, texts in answered.items():
        found: dict[tuple[str, str], list[tuple[int, Floats]]] = {(c, a): [] for c in CHANNELS for a in attackers}
        for text in texts[: size.num_fewer * size.num_contexts * size.samples : size.samples]:
            for (channel, attacker), distance in _distances(pair, attackers, text).items():
                found[channel, attacker].append((text.truth, distance))
            advance()
        for (channel, attacker), pairs in found.items():
            points = by_distance(pairs, is_exact=not attacker)
            curves.append(Curve(candidates, f"{channel} deltas{attacker}", MAIN, points))
    return curves


def spend_budgets(
    pair: Pair, folder: Path, answered: dict[str, list[Transcript]], size: Size, advance: Advance
) -> list[Budgeted]:
    """Edge fusion with budgets, sampled at T = 20, one text for each context and query; ``answered``: those without a budget."""
    table = []
    for candidates in SETS:
        asked = _cases(folder, candidates, size.num_fewer, size)
        for max_bits in BUDGETS:
            found = answers(pair, asked, sampled(20, max_bits), 1, advance)
            table.append(_budgeted(pair, candidates, max_bits, found))
        table.append(_budgeted(pair, candidates, None, answered[candidates]))
    return table


def keep_ledgers(pair: Pair, folder: Path, size: Size, advance: Advance) -> Ledgers:
    """Sampled answers to the evaluation's queries, each with its own context, under LEDGER_BUDGET."""
    asked = [Case((row,)) for row in all_rows(folder)[: size.num_answers]]
    found = transcripts(pair, asked, sampled(20, LEDGER_BUDGET), 1, MAX_TOKENS, np.random.default_rng(0), advance)
    bits = np.concatenate([one.bits for one in found])
    mean = float(np.mean([one.bits[-1] for one in found]))
    return Ledgers(LEDGER_BUDGET, len(found), len(bits), mean, float(bits.max()), int((bits > LEDGER_BUDGET + 1e-9).sum()))


def look_outside(pair: Pair, folder: Path, size: Size, advance: Advance) -> list[Outside]:
    rows: Sequence[Row] = all_rows(folder)[: size.num_answers]
    return [one for T in ITERATIONS for one in outside(pair, rows, T, MAX_TOKENS, advance)]


def bound_of(max_bits: float | None, num_contexts: int) -> float:
    """The most often that anybody can be right who guesses one of ``num_contexts`` equally likely contexts from the tokens.

    At every position max_bits bounds log2 q_c(y) / p(y) by what is left, for every token y that can be drawn; so a whole text
    has q_c(text) <= 2^max_bits * p(text), where p is the base policy cut to the candidates: the same for every context. The best
    guess is right with probability sum_text max_c q_c(text) / N <= 2^max_bits * sum_text p(text) / N = 2^max_bits / N.

    This needs random numbers that the server does not know, and pure temperature sampling, so that what is drawn without the
    context is drawn with p. Greedy or truncated, it is drawn with another policy p' from the moment on at which the budget is
    spent. That moment depends on the context: a text of n tokens has n + 1 of them, and summing over them gives
    (n + 1) * 2^max_bits / N.
    """
    return 1.0 if max_bits is None else min(1.0, 2**max_bits / num_contexts)


def answers(pair: Pair, asked: Sequence[Case], setting: Setting, samples: int, advance: Advance) -> list[Transcript]:
    """Case by case; every case has random numbers of its own."""
    found: list[Transcript] = []
    for i, case in enumerate(asked):
        found += transcripts(pair, [case], setting, samples, MAX_TOKENS, np.random.default_rng(i))
        advance()
    return found


def _cases(folder: Path, candidates: str, num_queries: int, size: Size) -> list[Case]:
    return cases(candidates, queries(folder, num_queries), size.num_contexts)


def _budgeted(pair: Pair, candidates: str, max_bits: float | None, found: list[Transcript]) -> Budgeted:
    [point] = by_tokens(found, (SEEN,))
    assert point.ledger is not None
    texts = pair.tokenizer.batch_decode([one.tokens for one in found], skip_special_tokens=True)
    return Budgeted(
        candidates=candidates,
        max_bits=max_bits,
        accuracy=point.accuracy,
        expected=float(np.mean([posteriors(one.log_q)[:SEEN][-1].max() for one in found])),
        bound=bound_of(max_bits, len(found[0].case.rows)),
        ledger=point.ledger,
        most=float(max(one.bits.max() for one in found)),
        shown=float(np.mean([score(text, one.row)[0] for text, one in zip(texts, found, strict=True)])),
    )


def _distances(pair: Pair, attackers: dict[str, Pair], text: Transcript) -> dict[tuple[str, str], Floats]:
    """By channel and attacker, how far the payloads of every candidate are from those that the device would have sent."""
    prompts = [prompts_of(row, pair.tokenizer) for row in text.case.rows]
    rows = [*(with_context for with_context, _ in prompts), prompts[0][1]]
    seen = {name: along(attacker.small, rows, text.tokens[:SEEN]) for name, attacker in attackers.items()}
    found = {}
    for channel, encode in CHANNELS.items():
        made = {name: payloads(log_probs, encode) for name, log_probs in seen.items()}
        for name, suspected in made.items():
            found[channel, name] = distances(made[""][text.truth], suspected, pair.small.config.vocab_size)
    return found
