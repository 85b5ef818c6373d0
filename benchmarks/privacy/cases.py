"""Queries, each with N candidate contexts of which one is the true one; made by the demo's own generators."""

import json
import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path

from costeer_vllm.demo.task import FIRST_NAMES, HOBBIES, Row, context_of, held_out_profiles

NUM_CONTEXTS = 16
SETS = {
    "people": "different people",
    "hobby": "one person, another hobby: the answer states it, late",
    "sister": "one person, a sister of another name: no answer states it",
}


@dataclass(frozen=True, slots=True)
class Case:
    """One query and its candidates: rows that differ in ``context``, and in the ``items`` that an answer should show."""

    rows: tuple[Row, ...]


def queries(pair: Path, num: int) -> list[Row]:
    """``num`` rows below ``pair`` (see demo.export) with different queries."""
    rows = {str(row.messages): row for row in reversed(all_rows(pair))}
    return list(rows.values())[::-1][:num]


def all_rows(pair: Path) -> list[Row]:
    """The evaluation rows below ``pair``, with their contexts."""
    rows = [Row(**json.loads(line)) for line in (pair / "queries.jsonl").read_text(encoding="utf-8").splitlines()]
    return [replace(row, context=(pair / row.context).read_text(encoding="utf-8")) for row in rows]


def cases(name: str, asked: Sequence[Row], num_contexts: int = NUM_CONTEXTS, seed: int = 0) -> list[Case]:
    """The queries of ``asked``, each with the same candidates of the set ``name``."""
    known = _CANDIDATES[name](num_contexts, random.Random(seed))
    return [Case(tuple(replace(row, context=context, items=items) for context, items in known)) for row in asked]


def _people(num: int, rng: random.Random) -> list[tuple[str, dict[str, str]]]:
    return [(context_of(profile, rng), asdict(profile)) for profile in held_out_profiles(num, rng)]


def _hobby(num: int, rng: random.Random) -> list[tuple[str, dict[str, str]]]:
    [profile] = held_out_profiles(1, rng)
    layout = rng.random()
    profiles = [replace(profile, hobby=hobby) for hobby in rng.sample(HOBBIES, num)]
    return [(context_of(profile, random.Random(layout)), asdict(profile)) for profile in profiles]


def _sister(num: int, rng: random.Random) -> list[tuple[str, dict[str, str]]]:
    [profile] = held_out_profiles(1, rng)
    notes = (context_of(profile, random.Random(layout)) for layout in count())
    note = next(note for note in notes if "Sister: " in note)
    return [(re.sub("Sister: .*", f"Sister: {name}", note), asdict(profile)) for name in rng.sample(FIRST_NAMES, num)]


_CANDIDATES = {"people": _people, "hobby": _hobby, "sister": _sister}
