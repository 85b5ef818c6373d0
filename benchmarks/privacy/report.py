"""What was found, as Markdown."""

from collections.abc import Sequence

from benchmarks.privacy.cases import SETS
from benchmarks.privacy.experiments import SEEN, Found
from benchmarks.privacy.measures import NUM_TOKENS, Point, Share

SUMMARY = """\
{num_contexts} candidate contexts, of which a blind guess finds the true one {chance:.1%} of the time. Tokens: {num_queries}
queries, with {samples} texts for each context where they are sampled at T = 20, else 1. Deltas and budgets: {num_fewer} queries,
with 1 text for each context. In brackets: 95 % intervals (Wilson)."""


def markdown(found: Found) -> str:
    """All tables."""
    size = found.size
    summary = SUMMARY.format(
        chance=1 / size.num_contexts,
        **{name: getattr(size, name) for name in ("num_contexts", "num_queries", "samples", "num_fewer")},
    )
    verdict = "held everywhere" if found.holds else "**was broken**: see the rows that say no"
    parts = [
        summary,
        "\n".join(f"* **{name}**: {title}" for name, title in SETS.items()),
        "### How often the true context is guessed, against the tokens seen",
        _accuracy(found),
        "### Bits, means over the texts",
        _bits(found),
        f"### Budgets, after {SEEN} tokens, sampled at T = 20",
        _budgets(found),
        f"*Expected*: how often the attacker should be right by its own posterior. The bound {verdict}.",
        _ledgers(found),
        "### Tokens outside the top k of the base policy",
        _outside(found),
    ]
    return "\n\n".join(parts) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], num_labels: int = 2) -> str:
    """The first ``num_labels`` columns are words, the others figures."""
    rule = ["---"] * num_labels + ["---:"] * (len(head) - num_labels)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def _accuracy(found: Found) -> str:
    head = ["candidates", "the attacker sees", *(f"{num}" for num in NUM_TOKENS)]
    rows = []
    for name in SETS:
        seen = [(f"tokens, {curve.sampling}", curve) for curve in found.tokens] + [
            (curve.channel, curve) for curve in found.deltas
        ]
        shown = [(label, curve.points) for label, curve in seen if curve.candidates == name]
        rows += [[name, label, *(_share(point.accuracy) for point in points)] for label, points in shown]
    return table(head, rows)


def _bits(found: Found) -> str:
    rows = []
    for name in SETS:
        for curve in (one for one in found.tokens if one.candidates == name):
            for kind, label in _BITS.items():
                label = f"tokens, {curve.sampling}: {label}"
                rows.append([name, label, *(_bits_of(point, kind) for point in curve.points)])
        for curve in (one for one in found.deltas if one.candidates == name and one.points[0].gain is not None):
            rows.append([name, f"{curve.channel}: {_BITS['gain']}", *(_bits_of(point, "gain") for point in curve.points)])
    return table(["candidates", "bits", *(f"{num}" for num in NUM_TOKENS)], rows)


_BITS = {"gain": "information gained", "true": "for the true context", "ledger": "the device's ledger"}


def _budgets(found: Found) -> str:
    head = ["candidates", "max_bits", "guessed", "expected", "bound", "ledger, mean", "ledger, most", "profile shown", "holds"]
    rows = [
        [
            one.candidates,
            "none" if one.max_bits is None else f"{one.max_bits:g}",
            _share(one.accuracy),
            f"{one.expected:.1%}",
            "none" if one.max_bits is None else f"{one.bound:.1%}",
            f"{one.ledger:.2f}",
            f"{one.most:.3f}",
            f"{one.shown:.0%}",
            "yes" if one.holds else "no",
        ]
        for one in found.budgets
    ]
    return table(head, rows)


def _ledgers(found: Found) -> str:
    one = found.ledgers
    return f"""\
{one.num_answers} sampled answers to the evaluation's queries, each with its own context, at max_bits {one.max_bits:g}:
{one.num_tokens} tokens, after {one.num_above} of which a ledger was above the budget. The most was {one.most:.6f} bits, the mean
at the end {one.mean:.2f}."""


def _outside(found: Found) -> str:
    rows = [
        [
            f"{one.T}",
            f"{one.top_k}",
            f"{one.num_greedy} of {one.num_tokens}",
            f"{one.num_greedy / one.num_tokens:.2%}",
            f"{one.mass:.2%}",
            f"{one.most_mass:.1%}",
        ]
        for one in found.outside
    ]
    return table(["T", "k", "greedy tokens outside", "share", "sampled: mass outside, mean", "at the worst token"], rows)


def _share(share: Share) -> str:
    return f"{share.value:.0%} ({100 * share.low:.0f} to {100 * share.high:.0f})"


def _bits_of(point: Point, name: str) -> str:
    value: float = getattr(point, name)
    return f"{value:.2f}".replace("-0.00", "0.00")
