"""Triples from real text: interpolated n-gram models over byte-level BPE vocabularies, trained here.

    large    order 5, on all training text
    small    order 3, on half of it
    both also copy from what they have been shown: the small model with context from the user's own profile and history

Held-out are whole users: no text of theirs is trained on.
"""

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from benchmarks.deltas.triples import Triple

HELD_OUT_EVERY = 5  # of the users
LARGE_ORDER, SMALL_ORDER, COPY_ORDER = 5, 3, 4
UNIGRAMS_COPIED, NGRAMS_COPIED = 0.1, 0.3  # weights of the shown text; held-out text is likeliest near these

Ids = npt.NDArray[np.int64]
Probs = npt.NDArray[np.float64]  # [vocab]


@dataclass(frozen=True, slots=True)
class Sample:
    """What a user asks, what the device knows of them, and the answer that was written."""

    context: str
    query: str
    answer: str


def read_samples(folder: Path) -> list[Sample]:
    """The CoGenesis rows and abstracts below ``folder`` (docs/evaluation.md tells how to get them)."""
    samples = []
    for row in _rows(folder / "cogenesis_dev.jsonl"):
        samples.append(Sample(row["personalized_input"].rpartition("## Task")[0], row["input"], row["output"]))
    for row in _rows(folder / "standin_abstract_cogenesis_paper.jsonl"):
        history = "\n\n".join(f"{one['title']}\n{one['abstract']}" for one in row["top_5"])
        samples.append(Sample(history, row["input"], row["output"]))
    return samples


def _rows(path: Path) -> Iterable[dict]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def split(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """To train on, and held out; all samples of one context are on one side."""
    contexts = sorted({sample.context for sample in samples})
    random.Random(0).shuffle(contexts)
    held_out = set(contexts[::HELD_OUT_EVERY])
    return [s for s in samples if s.context not in held_out], [s for s in samples if s.context in held_out]


def train_tokenizer(texts: Iterable[str], vocab: int) -> Tokenizer:
    """Byte-level BPE with at most ``vocab`` tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab, show_progress=False, initial_alphabet=alphabet, max_token_length=24)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


class NGrams:
    """All n-grams of a text up to an order; the contexts of each order are kept sorted by their hash, as an index is."""

    def __init__(self, ids: Ids, order: int) -> None:
        self._ids = ids
        self._keys, self._places = [], []
        for length in range(1, order):
            keys = _hashes(ids, length)[:-1]  # of ids[i : i + length], followed by ids[i + length]
            places = np.argsort(keys, kind="stable")
            self._keys.append(keys[places])
            self._places.append(places + length)

    def interpolate(self, probs: Probs, prefix: Ids) -> Probs:
        """Witten and Bell's smoothing, from the lowest order up: ``probs`` is what is left to where nothing is known."""
        for length, (keys, places) in enumerate(zip(self._keys, self._places, strict=True), 1):
            if len(prefix) < length:
                break
            key = _hashes(prefix[-length:], length)
            start, end = np.searchsorted(keys, key)[0], np.searchsorted(keys, key, "right")[0]
            if start == end:
                break
            found, counts = np.unique(self._ids[places[start:end]], return_counts=True)
            total = len(found) + counts.sum()
            probs = probs * (len(found) / total)
            probs[found] += counts / total
        return probs


def _hashes(ids: Ids, length: int) -> npt.NDArray[np.uint64]:
    """Of every ``length`` successive ids."""
    keys = np.zeros(len(ids) - length + 1, np.uint64)
    with np.errstate(over="ignore"):
        for start in range(length):
            keys = (keys ^ (ids[start : start + len(keys)].astype(np.uint64) + np.uint64(1))) * np.uint64(0x9E3779B97F4A7C15)
            keys ^= keys >> np.uint64(29)
    return keys


def unigrams(ids: Ids, vocab: int) -> Probs:
    """Counts, and for tokens that never occurred what a rank-frequency law gives their id (BPE numbers tokens by frequency)."""
    rest: Probs = 1 / (np.arange(vocab) + 1000.0)
    counts = np.bincount(ids, minlength=vocab)
    seen = np.count_nonzero(counts)
    return (counts + seen * rest / rest.sum()) / (len(ids) + seen)


class Models:
    """Large and small over one vocabulary."""

    def __init__(self, tokenizer: Tokenizer, samples: Sequence[Sample], vocab: int) -> None:
        self._tokenizer = tokenizer
        texts = [self._ids(f"{s.context}\n\n{s.query}\n\n{s.answer}\n\n") for s in samples]
        everything, half = np.concatenate(texts), np.concatenate(texts[::2])
        self._large = unigrams(everything, vocab), NGrams(everything, LARGE_ORDER)
        self._small = unigrams(half, vocab), NGrams(half, SMALL_ORDER)

    def _ids(self, text: str) -> Ids:
        return np.array(self._tokenizer.encode(text).ids, np.int64)

    def triples(self, sample: Sample, every: int) -> Iterator[Triple]:
        """Every ``every``-th position of the sample's answer."""
        context, query, answer = self._ids(sample.context), self._ids(f"{sample.query}\n\n"), self._ids(sample.answer)
        for position in range(every // 2, len(answer), every):
            prefix = np.concatenate([query, answer[:position]])
            shown = np.concatenate([context, prefix])
            base = _copying(*self._large, prefix, prefix)
            yield Triple(base, _copying(*self._small, prefix, shown), _copying(*self._small, prefix, prefix))


def _copying(lowest: Probs, ngrams: NGrams, prefix: Ids, shown: Ids) -> npt.NDArray[np.float32]:
    """Log-probabilities of a model that has been shown a text and is at its end."""
    probs = ngrams.interpolate(lowest, prefix)
    probs = (1 - UNIGRAMS_COPIED) * probs + UNIGRAMS_COPIED * np.bincount(shown, minlength=len(probs)) / len(shown)
    probs = (1 - NGRAMS_COPIED) * probs + NGRAMS_COPIED * NGrams(shown, COPY_ORDER).interpolate(probs, prefix)
    row: npt.NDArray[np.float32] = np.log(probs).astype(np.float32)
    return row
