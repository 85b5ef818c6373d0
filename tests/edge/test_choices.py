"""The choices of one edge-fused stream: when there is one, which token it is, and what of the budget it takes."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from costeer_vllm.candidates import BasePolicy, decode_candidates, encode_candidates
from costeer_vllm.edge import choices
from costeer_vllm.edge.choices import Chooser, _uniform, chooser
from costeer_vllm.edge.disclosure import Disclosure, Disclosures
from costeer_vllm.errors import InvalidCandidates, InvalidParameter
from costeer_vllm.protocol.messages import MAX_CANDIDATES, Candidates, Choice, Query, Sampling

from .hub import begin

VOCAB = 50
SECRET, OTHER_SECRET = b"a device's own", b"another's"
GREEDY = {"temperature": 0.0}

FloatArray = np.ndarray


def make(
    stream: str = "s",
    disclosures: Disclosures | None = None,
    secret: bytes = SECRET,
    strength: float = 1.0,
    request: str = "r",
    query: Query | None = None,
    **sampling: Any,
) -> Chooser:
    message = begin(stream, query or Query(prompt="Hi"), request=request, strength=strength, sampling=Sampling(**sampling))
    return chooser(message, disclosures or Disclosures(), secret)


def candidates(position: int, base: dict[int, float] | FloatArray, stream: str = "s") -> Candidates:
    """``base``: probabilities by id. The prefix hash of these tests is the position's."""
    by_id = dict(enumerate(base)) if isinstance(base, np.ndarray) else base
    ids = sorted(by_id)
    log_probs = np.log([by_id[i] for i in ids])
    payload = encode_candidates(BasePolicy(np.array(ids), log_probs, 0.0))
    return Candidates(stream, position, hash_of(position), payload)


def hash_of(position: int) -> int:
    return 7 * position


def choose(own: Chooser, position: int, base: dict[int, float] | FloatArray, delta: FloatArray) -> int:
    assert own.weighed(position, hash_of(position), delta) is None
    choice = own.offered(candidates(position, base))
    assert choice == Choice(own.stream, position, hash_of(position), choice.token)
    return choice.token


def pair(seed: int) -> tuple[FloatArray, FloatArray]:
    """A base policy and a delta."""
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.full(VOCAB, 0.3)) + 1e-9, rng.normal(0, 2, VOCAB).astype(np.float32)


def uniforms(own: Chooser, positions: Sequence[int]) -> list[float]:
    """What the chooser draws with, to a 1024th: the token among that many equally likely ones."""
    flat = np.full(MAX_CANDIDATES, 1 / MAX_CANDIDATES)
    return [choose(own, position, flat, np.zeros(MAX_CANDIDATES)) / MAX_CANDIDATES for position in positions]


# When there is a choice


@pytest.mark.parametrize("candidates_first", [True, False])
def test_candidates_and_delta_come_in_any_order(candidates_first: bool) -> None:
    own = make(**GREEDY)
    for position in range(3):
        base, delta = pair(position)
        if candidates_first:
            assert own.offered(candidates(position, base)) is None
            choice = own.weighed(position, hash_of(position), delta)
        else:
            assert own.weighed(position, hash_of(position), delta) is None
            choice = own.offered(candidates(position, base))
        assert choice == Choice("s", position, hash_of(position), int((np.log(base) + delta).argmax()))


@pytest.mark.parametrize("late", [(0, 0), (1, hash_of(1) + 1), (2, hash_of(1))])
def test_candidates_and_delta_must_be_of_one_prefix(late: tuple[int, int]) -> None:
    own = make(**GREEDY)
    base, delta = pair(0)
    assert own.offered(candidates(1, base)) is None
    assert own.weighed(*late, delta) is None
    assert own.weighed(1, hash_of(1), delta) is not None
    assert own.weighed(2, hash_of(2), delta) is None
    assert own.offered(candidates(1, base)) == own.choice, "what was chosen before"
    assert own.offered(candidates(3, base)) is None
    assert own.offered(candidates(2, base)) is not None


def test_of_candidates_only_the_newest_are_kept() -> None:
    own = make(**GREEDY)
    base, delta = pair(0)
    own.offered(candidates(0, base))
    own.offered(candidates(1, base))
    assert own.weighed(0, hash_of(0), delta) is None
    assert own.weighed(1, hash_of(1), delta) is not None


def test_the_same_question_gets_the_same_choice_and_is_counted_once() -> None:
    told = Disclosures()
    own = make(disclosures=told)
    base, delta = pair(1)
    token = choose(own, 0, base, delta)
    bits = told.of("r", None).bits
    elsewhere = np.roll(base, 1)
    for asked in (candidates(0, base), candidates(0, elsewhere), Candidates("s", 0, hash_of(0), b"")):
        assert own.weighed(0, hash_of(0), -delta) is None
        assert own.offered(asked) == Choice("s", 0, hash_of(0), token)
    assert (told.of("r", None).bits, len(told.of("r", None).drawn)) == (bits, 1)


@pytest.mark.parametrize("payload", [b"", b"x" * 30, candidates(0, {1: 1.0}).payload[:-1]])
def test_candidates_that_cannot_be_used_are_told(payload: bytes) -> None:
    with pytest.raises(InvalidCandidates):
        make().offered(Candidates("s", 0, 0, payload))


# Which token it is


def test_padding_of_the_large_models_vocabulary_is_never_chosen() -> None:
    """Ids that the small model does not have."""
    base = {3: 0.05, VOCAB - 1: 0.05, VOCAB: 0.5, VOCAB + 70: 0.4}
    for seed in range(200):
        assert choose(make(seed=seed), 0, base, np.zeros(VOCAB)) in (3, VOCAB - 1)
    assert choose(make(**GREEDY), 0, base, np.eye(VOCAB)[VOCAB - 1]) == VOCAB - 1


@pytest.mark.parametrize("candidates_first", [True, False])
def test_candidates_of_which_the_small_model_knows_none_are_told(candidates_first: bool) -> None:
    own, asked = make(), candidates(0, {VOCAB: 0.5, VOCAB + 1: 0.5})
    first, second = (lambda: own.offered(asked)), (lambda: own.weighed(0, hash_of(0), np.zeros(VOCAB)))
    if not candidates_first:
        first, second = second, first
    assert first() is None
    with pytest.raises(InvalidCandidates, match="none of the candidates is a token of the small model"):
        second()


@pytest.mark.filterwarnings("error")
def test_a_delta_that_is_no_number_is_none_and_an_infinite_one_decides() -> None:
    base = {0: 0.1, 1: 0.3, 2: 0.6}
    delta = np.zeros(VOCAB, np.float32)
    delta[:3] = [np.nan, 0.5, -np.inf]
    assert choose(make(**GREEDY), 0, base, delta) == 1
    delta[:3] = [np.nan, np.nan, np.nan]
    assert choose(make(**GREEDY), 0, base, delta) == 2
    delta[:3] = [np.inf, 5.0, np.nan]
    assert choose(make(**GREEDY), 0, base, delta) == 0
    assert choose(make(), 0, base, np.full(VOCAB, -np.inf)) in base


def test_the_strength_and_the_sampling_are_the_requests() -> None:
    base, delta = pair(6)
    for strength in (0.0, -2.0, 3.0):
        assert choose(make(strength=strength, **GREEDY), 0, base, delta) == int((np.log(base) + strength * delta).argmax())
    likeliest = set(np.argsort(np.log(base) + delta)[-2:].tolist())
    drawn = {choose(make(seed=seed, temperature=5.0, top_k=2), 0, base, delta) for seed in range(50)}
    assert drawn == likeliest


# Random numbers


def test_uniforms_are_uniform_and_every_position_has_its_own() -> None:
    found = np.sort(uniforms(make(), range(2000)))
    expected = (np.arange(2000) + 0.5) / 2000
    assert np.abs(found - expected).max() < 1.63 / math.sqrt(2000)  # Kolmogorov and Smirnov, 1 %
    assert len(set(found)) > 800


@pytest.mark.parametrize("digest", [b"\xff" * 32, b"\x00" * 32])
def test_a_uniform_is_below_1_whatever_its_digest(digest: bytes) -> None:
    assert 0 <= _uniform(digest) < 1


def test_every_question_has_a_random_number_of_its_own() -> None:
    """Of one position, too: a server can go back, begin again, and offer other candidates as often as it likes."""
    flat = np.full(MAX_CANDIDATES, 1 / MAX_CANDIDATES)
    zeros = np.zeros(MAX_CANDIDATES)
    asked = candidates(0, flat)
    base = decode_candidates(asked.payload)

    def token(offered: Candidates, **fields: Any) -> int:
        own = make(strength=fields.pop("strength", 1.0), seed=5, **fields)
        own.weighed(offered.position, offered.prefix_hash, zeros)
        choice = own.offered(offered)
        assert choice is not None
        return choice.token

    slightly_other = encode_candidates(BasePolicy(base.ids, base.log_probs - 1e-6, 0.0))
    found = [
        token(asked),
        token(Candidates("s", 0, 1, asked.payload)),
        token(Candidates("s", 1, 0, asked.payload)),
        token(Candidates("s", 0, 0, slightly_other)),
        token(asked, strength=1.0000001),
        token(asked, temperature=1.0000001),
        token(asked, query=Query(prompt="Ho")),
        token(asked, query=Query(prompt="Hi", ref="ann")),
    ]
    assert len(set(found)) == len(found)
    assert token(asked, request="another") == found[0]
    assert token(asked, max_bits=1e6) != found[0]


def test_what_two_choices_of_one_position_tell_adds_up() -> None:
    """Were they drawn with one random number, (0, 1) could not come about without the context: it would tell everything."""
    half, towards_0 = {0: 0.5, 1: 0.5}, np.array([0.4, -0.4])
    counts = np.zeros((2, 2))
    for seed in range(2000):
        own = make(seed=seed)
        tokens = []
        for prefix_hash, delta in ((1, towards_0), (2, -towards_0)):
            own.weighed(0, prefix_hash, delta)
            choice = own.offered(Candidates("s", 0, prefix_hash, candidates(0, half).payload))
            assert choice is not None
            tokens.append(choice.token)
        counts[tokens[0], tokens[1]] += 1
    q = 1 / (1 + math.exp(-0.8))
    np.testing.assert_allclose(counts / 2000, np.outer([q, 1 - q], [1 - q, q]), atol=0.05)


def test_an_older_question_gets_its_choice_again_whatever_the_budget_has_become() -> None:
    disclosures = Disclosures()
    told = disclosures.of("r", None, 6.0)
    first = make(disclosures=disclosures, max_bits=6.0)
    tokens = [choose(first, position, *pair(position)) for position in range(20)]
    bits, num_drawn = told.bits, len(told.drawn)
    assert told.bits_left < 0.5
    again = make(disclosures=disclosures, max_bits=6.0)  # begun again, since the hub restarted
    assert [choose(again, position, *pair(position)) for position in range(20)] == tokens
    assert [choose(first, position, *pair(position)) for position in (3, 0, 3)] == [tokens[3], tokens[0], tokens[3]]
    assert (told.bits, len(told.drawn)) == (bits, num_drawn)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({}, {}, True),  # a stream that begins again, since the hub restarted
        ({}, {"stream": "t"}, False),
        ({}, {"secret": OTHER_SECRET}, False),
        ({"seed": 5}, {"seed": 5}, True),
        ({"seed": 5}, {"seed": 5, "stream": "t", "request": "q"}, True),  # the same answer on this device
        ({"seed": 5}, {"seed": 5, "secret": OTHER_SECRET}, False),
        ({"seed": 5}, {"seed": 6}, False),
        ({"seed": 0}, {}, False),
        ({"seed": 5}, {"stream": "seed 5"}, False),
        ({"seed": -1}, {"seed": 1}, False),
    ],
)
def test_which_streams_share_their_random_numbers(one: dict[str, Any], other: dict[str, Any], same: bool) -> None:
    tokens = [uniforms(make(**fields), range(8)) for fields in (one, other)]
    assert (tokens[0] == tokens[1]) is same


# The budget


def tokens_of(own: Chooser, positions: range, told: Disclosure) -> list[int]:
    """The answer, whose bits are checked at every token."""
    tokens = []
    for position in positions:
        left = told.bits_left
        tokens.append(choose(own, position, *pair(position)))
        assert told.drawn[-1].bits <= left + 1e-9
    return tokens


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_p": 0.9}, GREEDY])
@pytest.mark.parametrize("max_bits", [0.5, 3.0, 12.0])
def test_a_budget_is_spent_over_several_tokens_and_never_exceeded(max_bits: float, sampling: dict[str, Any]) -> None:
    disclosures = Disclosures()
    own = make(disclosures=disclosures, max_bits=max_bits, **sampling)
    told = disclosures.of("r", None)
    tokens = tokens_of(own, range(80), told)
    bits = np.cumsum([drawn.bits for drawn in told.drawn])
    assert bits.max() <= max_bits + 1e-9
    assert told.bits == pytest.approx(bits[-1])
    # Once spent, it is spent for good: the rest is drawn without the context. A greedy answer may go on within a small budget.
    assert told.is_spent or bits[-1] > max_bits / 2
    spent_at = next((i for i, drawn in enumerate(told.drawn) if drawn.strength == 0), 80)
    assert {drawn.strength for drawn in told.drawn[spent_at:]} <= {0.0}
    plain, nothing = make(**sampling), np.zeros(VOCAB)
    assert tokens[spent_at:] == [choose(plain, position, pair(position)[0], nothing) for position in range(spent_at, 80)]


def test_a_budget_that_suffices_changes_nothing() -> None:
    limited, free = Disclosures(), Disclosures()
    tokens = [
        tokens_of(make(disclosures=own, max_bits=max_bits), range(30), own.of("r", None))
        for own, max_bits in ((limited, 1e6), (free, None))
    ]
    assert tokens[0] == tokens[1]
    assert not limited.of("r", None).is_spent
    assert {drawn.strength for drawn in limited.of("r", None).drawn} == {1.0}


def test_what_is_spent_stays_spent_though_bits_are_left() -> None:
    disclosures = Disclosures()
    told = disclosures.of("r", None, 5.0)
    told.is_spent = True
    choose(make(disclosures=disclosures), 0, *pair(0))
    assert (told.drawn[-1].strength, told.bits) == (0.0, 0.0)


def test_the_streams_of_one_request_share_its_budget() -> None:
    disclosures = Disclosures()
    told = disclosures.of("r", None)
    for name in "abcdefgh":  # children of one request, or the same one after preemptions
        own = make(name, disclosures, max_bits=4.0)
        for position in range(10):
            choose(own, position, *pair(position))
    assert len(told.drawn) == 80
    assert told.is_spent
    assert 0 < np.cumsum([drawn.bits for drawn in told.drawn]).max() <= 4.0 + 1e-9
    choose(make("i", disclosures, request="another", max_bits=4.0), 0, *pair(0))
    assert disclosures.of("another", None).drawn[0].strength > 0


def test_another_context_has_a_budget_of_its_own() -> None:
    disclosures = Disclosures()
    for ref in ("ann", "bob"):
        choose(make(disclosures=disclosures, query=Query(prompt="Hi", ref=ref), max_bits=4.0), 0, *pair(0))
    assert [len(disclosures.of("r", ref).drawn) for ref in ("ann", "bob", None)] == [1, 1, 0]


def test_a_later_stream_cannot_raise_the_budget_of_its_request() -> None:
    disclosures = Disclosures(6.0)
    for max_bits, held in ((5.0, 5.0), (None, 5.0), (50.0, 5.0), (2.0, 2.0), (5.0, 2.0)):
        assert make(disclosures=disclosures, max_bits=max_bits).disclosure.max_bits == held


@pytest.mark.parametrize("max_bits", [math.nan, -1.0, math.inf])
def test_a_budget_that_is_no_budget_leaves_the_former_one_alone(max_bits: float) -> None:
    disclosures = Disclosures()
    make(disclosures=disclosures, max_bits=5.0)
    with pytest.raises(InvalidParameter):
        make(disclosures=disclosures, max_bits=max_bits)
    assert make(disclosures=disclosures, max_bits=50.0).disclosure.max_bits == 5.0


@pytest.mark.parametrize("confidence", [0.9, 0.5])
def test_where_the_base_policy_is_sure_it_is_left_alone_and_the_budget_too(confidence: float) -> None:
    disclosures = Disclosures()
    own = make(disclosures=disclosures, confidence=confidence, max_bits=7.0, **GREEDY)
    told = disclosures.of("r", None)
    delta = np.zeros(VOCAB)
    delta[1] = 9.0
    assert choose(own, 0, {0: 0.91, 1: 0.09}, delta) == 0
    assert (told.bits, told.is_spent) == (0.0, False)
    assert choose(own, 1, {0: 0.49, 1: 0.3, 2: 0.21}, delta) == 1
    assert told.bits == pytest.approx(math.log2(17 / 0.3))


def test_without_a_gate_even_certainty_is_steered() -> None:
    assert choose(make(**GREEDY), 0, {0: 1 - 1e-12, 1: 1e-12}, 30 * np.eye(VOCAB)[1]) == 1
    assert choose(make(confidence=0.0, **GREEDY), 0, {0: 0.5, 1: 0.5}, 30 * np.eye(VOCAB)[1]) == 0


# What a server may say


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("strength", math.nan),
        ("strength", 1000.5),
        ("strength", -math.inf),
        ("temperature", math.nan),
        ("temperature", -1e-9),
        ("temperature", math.inf),
        ("top_p", math.nan),
        ("top_p", -0.1),
        ("top_p", 1.1),
        ("min_p", math.nan),
        ("min_p", 1.1),
        ("min_p", -0.1),
        ("confidence", math.nan),
        ("confidence", -0.1),
        ("confidence", 1.1),
        ("max_bits", math.nan),
        ("max_bits", -0.1),
        ("max_bits", math.inf),
    ],
)
def test_parameters_out_of_range_are_told(field: str, value: float) -> None:
    with pytest.raises(InvalidParameter, match=f"{field} is"):
        make(**{field: value})


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": -1},
        {"top_k": 2**63 - 1},
        {"top_p": 0.0},
        {"min_p": 1.0},
        {"temperature": 1e308},
        {"max_bits": 0.0},
        {"seed": 2**64 - 1},
    ],
)
def test_parameters_at_their_ends_choose(fields: dict[str, Any]) -> None:
    assert 0 <= choose(make(**fields), 0, *pair(0)) < VOCAB


def test_of_one_request_there_are_only_so_many_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that goes back and asks with ever other candidates would fill the device's memory."""
    monkeypatch.setattr(choices, "MAX_CHOICES", 3)
    own = make()
    for position in range(3):
        choose(own, position, *pair(position))
    with pytest.raises(InvalidCandidates, match="more than 3 choices"):
        choose(own, 3, *pair(3))
    choose(own, 1, *pair(1))  # an old one is still there
