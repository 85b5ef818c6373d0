"""The delta codec: what comes back, how good the sparse form is, and that no payload whatever gets past ``decode``."""

import random
import struct
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from costeer_vllm.delta import MAX_ENTRIES, MAX_NATS, STEP, DenseDelta, SparseDelta, bits, decode, encode_lossless, encode_sparse
from costeer_vllm.demo.algorithm1 import Policy
from costeer_vllm.demo.scores import Pair, load_pair
from costeer_vllm.demo.task import Row, held_out
from costeer_vllm.edge.prompts import Surround, prompts
from costeer_vllm.errors import CoSteerError, InvalidDelta
from costeer_vllm.protocol.messages import Query, Turn

LOSSLESS, SPARSE = 1, 2
STRENGTHS = [0.476, 1.0, 1.783, 2.6]

FloatArray = np.ndarray


def log_softmax(logits: FloatArray) -> FloatArray:
    shifted = logits.astype(np.float64) - logits.max()
    return (shifted - np.log(np.exp(shifted).sum())).astype(np.float32)


def rows(seed: int, vocab: int, spread: float = 4.0) -> tuple[FloatArray, FloatArray]:
    """Log-probabilities of both rows of a pair that mostly agrees, as language models do."""
    rng = np.random.default_rng(seed)
    common = rng.normal(0, spread, vocab)
    return log_softmax(common + rng.normal(0, 1, vocab)), log_softmax(common + rng.normal(0, 1, vocab))


def lossless_payload(count: int, body: bytes) -> bytes:
    return struct.pack("<BI", LOSSLESS, count) + body


def sparse_payload(
    ids: list[int], levels: list[int], first: float = 1.0, step: float = -0.5, low_width: int = 2, width: int = 4
) -> bytes:
    """By hand; ``ids`` must not decrease in what remains without their lowest bits."""
    numbers = np.array(ids)
    body = bits.pack(numbers, low_width) + bits.pack(np.array(levels), width) + bits.marks(numbers, low_width)
    return sparse_header(len(ids), low_width, width, first, step) + body


def sparse_header(count: int, low_width: int = 0, width: int = 0, first: float = 0.0, step: float = 1.0) -> bytes:
    return struct.pack("<BHBBff", SPARSE, count, low_width, width, first, step)


def check_usable(delta: DenseDelta | SparseDelta, vocab_size: int) -> None:
    """What the kernels rely on."""
    assert np.isfinite(delta.values).all()
    assert (np.abs(delta.values.astype(np.float64)) <= MAX_NATS).all()
    if isinstance(delta, DenseDelta):
        assert delta.values.dtype == np.float32
        assert delta.values.ndim == 1
        assert len(delta.values) <= vocab_size
    else:
        assert delta.values.dtype == np.float32
        assert delta.ids.dtype == np.int64
        assert delta.ids.shape == delta.values.shape
        assert (np.diff(delta.ids) > 0).all()
        assert ((delta.ids >= 0) & (delta.ids < vocab_size)).all()


# Lossless


@settings(max_examples=200)
@given(
    st.lists(st.floats(-MAX_NATS, MAX_NATS, width=32), max_size=300),
)
@example([0.0, -0.0, MAX_NATS, -MAX_NATS, 1e-45, -1e-45])
def test_lossless_comes_back_bit_for_bit(values: list[float]) -> None:
    delta = np.array(values, np.float32)
    decoded = decode(encode_lossless(delta), len(values))
    assert isinstance(decoded, DenseDelta)
    assert decoded.values.tobytes() == delta.tobytes()


def test_lossless_clamps_and_makes_nan_zero() -> None:
    delta = np.array([np.nan, np.inf, -np.inf, 10_000.5, -3.4e38, 1.5], np.float32)
    decoded = decode(encode_lossless(delta), 6)
    assert decoded.values.tolist() == [0.0, MAX_NATS, -MAX_NATS, MAX_NATS, -MAX_NATS, 1.5]


def test_encoding_leaves_its_input_alone() -> None:
    delta = np.array([np.nan, np.inf, 2.0], np.float32)
    encode_lossless(delta)
    assert np.isnan(delta[0])
    assert np.isinf(delta[1])
    with_context, without_context = rows(1, 50)
    copies = with_context.copy(), without_context.copy()
    encode_sparse(with_context, without_context, 1.783, max_entries=5)
    with_context[3] = -np.inf
    encode_sparse(with_context, without_context, 1.783)
    with_context[3] = copies[0][3]
    assert with_context.tobytes() == copies[0].tobytes()
    assert without_context.tobytes() == copies[1].tobytes()


def test_lossless_may_be_narrower_or_wider_than_the_logits() -> None:
    payload = encode_lossless(np.arange(5, dtype=np.float32))
    assert decode(payload, 8).values.tolist() == [0, 1, 2, 3, 4]
    assert decode(payload, 3).values.tolist() == [0, 1, 2]
    assert decode(encode_lossless(np.empty(0, np.float32)), 3).values.tolist() == []


def test_lossless_of_a_large_vocabulary_takes_four_bytes_an_id() -> None:
    assert len(encode_lossless(np.zeros(152_064, np.float32))) == 5 + 608_256


# Sparse


def exact_policy(base: FloatArray, strength: float, delta: FloatArray) -> FloatArray:
    return log_softmax64(base.astype(np.float64) + strength * delta.astype(np.float64))


def coded_policy(base: FloatArray, strength: float, delta: SparseDelta) -> FloatArray:
    logits = base.astype(np.float64)
    logits[delta.ids] += strength * delta.values.astype(np.float64)
    return log_softmax64(logits)


def log_softmax64(logits: FloatArray) -> FloatArray:
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def divergence(log_p: FloatArray, log_q: FloatArray) -> float:
    return float((np.exp(log_p) * (log_p - log_q)).sum())


def sparse(with_context: FloatArray, without_context: FloatArray, strength: float, **options: float) -> SparseDelta:
    decoded = decode(encode_sparse(with_context, without_context, strength, **options), len(with_context))
    assert isinstance(decoded, SparseDelta)
    return decoded


@settings(max_examples=150)
@given(
    seed=st.integers(0, 2**32 - 1),
    vocab=st.integers(1, 2000),
    strength=st.one_of(st.floats(0.01, 1000), st.floats(-1000, -0.01)),
    spread=st.floats(0, 30),
    max_entries=st.integers(1, MAX_ENTRIES),
    worth=st.floats(1e-9, 1e-2),
)
def test_sparse_entries_are_within_half_a_step(
    seed: int, vocab: int, strength: float, spread: float, max_entries: int, worth: float
) -> None:
    with_context, without_context = rows(seed, vocab, spread)
    decoded = sparse(with_context, without_context, strength, max_entries=max_entries, worth=worth)
    check_usable(decoded, vocab)
    assert len(decoded.ids) <= max_entries
    if len(decoded.ids):
        # They are relative to one constant, the tail: half a step either way, and what float32 rounds.
        shift = strength * (decoded.values.astype(np.float64) - (with_context - without_context)[decoded.ids])
        step = max(STEP, 2**-15 * abs(strength) * np.ptp(decoded.values))
        rounding = 1e-6 * abs(strength) * np.abs(np.stack([with_context, without_context])).max()
        assert np.ptp(shift) <= step + 4 * rounding + 1e-6


@settings(max_examples=200)
@given(st.sets(st.integers(0, 200_000), min_size=1, max_size=300), st.data())
def test_ids_and_levels_come_back_as_they_are(chosen: set[int], data: st.DataObject) -> None:
    ids = np.array(sorted(chosen))
    width = data.draw(st.integers(0, 16))
    levels = np.array(data.draw(st.lists(st.integers(0, 2**width - 1), min_size=len(ids), max_size=len(ids))))
    for low_width in {0, bits.low_width(ids), 18}:
        lows = bits.unpack(bits.pack(ids, low_width), len(ids), low_width)
        assert (bits.highs(bits.marks(ids, low_width)) << low_width | lows).tolist() == ids.tolist()
    packed = bits.pack(levels, width)
    assert len(packed) == bits.size(len(ids), width)
    assert bits.unpack(packed, len(ids), width).tolist() == levels.tolist()


def test_an_id_of_a_large_vocabulary_takes_twelve_bits() -> None:
    ids = np.sort(np.random.default_rng(0).choice(151_936, 150, replace=False))
    low_width = bits.low_width(ids)
    assert len(bits.pack(ids, low_width)) + len(bits.marks(ids, low_width)) <= 150 * 12 / 8


@pytest.mark.parametrize("strength", STRENGTHS)
def test_a_context_that_changes_nothing_takes_three_bytes(strength: float) -> None:
    row, _ = rows(1, 151_936)
    assert len(encode_sparse(row, row.copy(), strength)) == 3
    # Nor does one that moves every logit alike, or what only rounding tells apart.
    assert len(encode_sparse(row + np.float32(1e-4), row, strength)) == 3
    assert len(sparse(row, row.copy(), strength).ids) == 0


def test_a_strength_of_zero_moves_nothing() -> None:
    assert len(encode_sparse(*rows(1, 1000), 0.0)) == 3


def test_what_moves_the_policy_travels_and_what_does_not_stays() -> None:
    """Ids 0 to 9 are likely; the context speaks for 3, against 7, and of 500, which was not expected at all."""
    logits = np.random.default_rng(0).normal(0, 0.3, 1000)
    logits[:10] += 8
    with_logits = logits.copy()
    with_logits[[3, 500]] += [2, 9]
    with_logits[7] -= 3
    without_context, with_context = log_softmax(logits), log_softmax(with_logits)
    decoded = sparse(with_context, without_context, 1.0)
    assert decoded.ids.tolist() == [3, 7, 500]
    np.testing.assert_allclose(decoded.values, [2, -3, 9], atol=0.03)  # the tail are all others, which move alike
    assert sparse(with_context, without_context, 1.0, max_entries=1).ids.tolist() == [500]


def policies(seed: int, vocab: int, strength: float, **options: float) -> tuple[FloatArray, FloatArray]:
    with_context, without_context = rows(seed, vocab)
    # The large model is a third opinion on the same text: it knows what both know, and more.
    base = (with_context + without_context) / 2 + np.random.default_rng(seed + 1).normal(0, 0.5, vocab)
    decoded = sparse(with_context, without_context, strength, **options)
    return exact_policy(base, strength, with_context - without_context), coded_policy(base, strength, decoded)


@pytest.mark.parametrize("strength", [*STRENGTHS, -1.0])
def test_the_cheaper_an_entry_may_be_the_closer_to_exact(strength: float) -> None:
    costs = (1e-3, 1e-4, 1e-5, 1e-6)
    means = [np.mean([divergence(*policies(seed, 5000, strength, worth=worth)) for seed in range(8)]) for worth in costs]
    assert means == sorted(means, reverse=True)
    assert means[0] > 30 * means[-1], means
    assert means[-1] < 5e-3, means


@pytest.fixture(scope="module")
def demo_rows() -> list[tuple[FloatArray, FloatArray, FloatArray]]:
    """Positions of two steered answers of the demo pair: log-probabilities of the large model, and with and without context."""
    threads, pair = torch.get_num_threads(), load_pair()
    torch.set_num_threads(1)
    found = [row for held in held_out(2) for row in answer_rows(pair, held)]
    torch.set_num_threads(threads)
    return found


def answer_rows(pair: Pair, held: Row) -> Iterator[tuple[FloatArray, FloatArray, FloatArray]]:
    query = Query(messages=[Turn(**message) for message in held.messages])
    with_ids, without_ids = prompts(query, Surround(f"{held.context}\n\n"), pair.tokenizer)
    readers = [Policy(pair.large, without_ids), Policy(pair.small, with_ids), Policy(pair.small, without_ids)]
    for _ in range(50):
        base, with_context, without_context = (reader.log_probs.float() for reader in readers)
        yield base.numpy(), with_context.numpy(), without_context.numpy()
        token = int((base + with_context - without_context).argmax())
        for reader in readers:
            reader.read([token])


@pytest.mark.parametrize("strength", STRENGTHS)
def test_a_real_pair_is_steered_as_by_the_exact_delta(
    demo_rows: list[tuple[FloatArray, FloatArray, FloatArray]], strength: float
) -> None:
    sizes, costs = [], []
    for base, with_context, without_context in demo_rows:
        payload = encode_sparse(with_context, without_context, strength)
        decoded = decode(payload, len(base))
        assert isinstance(decoded, SparseDelta)
        exact, coded = exact_policy(base, strength, with_context - without_context), coded_policy(base, strength, decoded)
        assert exact.argmax() == coded.argmax()
        sizes.append(len(payload))
        costs.append(divergence(exact, coded))
    assert len(sizes) == 100
    assert np.mean(costs) <= 1e-3
    assert np.median(sizes) <= 450


def test_the_tail_is_what_makes_a_short_delta_usable() -> None:
    """Without context the mass sits in the tail, with context on one id: the tail must sink as a whole."""
    vocab, strength = 1000, 1.0
    p_with = np.full(vocab, 0.1 / (vocab - 1), np.float32)
    p_with[7] = 0.9
    p_without = np.full(vocab, 1 / vocab, np.float32)
    base = np.zeros(vocab, np.float32)
    exact = exact_policy(base, strength, np.log(p_with) - np.log(p_without))
    one_entry = sparse(np.log(p_with), np.log(p_without), strength)
    assert one_entry.ids.tolist() == [7]
    np.testing.assert_allclose(np.exp(coded_policy(base, strength, one_entry)), np.exp(exact), rtol=STEP)


@pytest.mark.parametrize(("sure_with", "sure_without"), [(12, 12), (30, 12), (30, 18), (12, 30), (30, 30)])
def test_the_tail_is_right_however_sure_the_rows_are(sure_with: float, sure_without: float) -> None:
    """Both rows expect id 5; the large model thinks of id 800, for which the tail is all that the delta says."""
    vocab, strength = 1000, 1.783
    rng = np.random.default_rng(0)
    common = rng.normal(0, 1, vocab)
    with_logits, without_logits, base = common.copy(), common.copy(), common.copy()
    with_logits[5], without_logits[5], base[5], base[800] = sure_with, sure_without, 4.0, 10.0
    with_context, without_context = log_softmax(with_logits), log_softmax(without_logits)
    decoded = sparse(with_context, without_context, strength)
    assert 800 not in decoded.ids
    exact = exact_policy(base, strength, with_context - without_context)
    np.testing.assert_allclose(np.exp(coded_policy(base, strength, decoded)), np.exp(exact), rtol=0, atol=0.01)


@pytest.mark.parametrize("vocab", [2, 65_536, 65_537, 151_936])
def test_the_first_and_the_last_id_arrive_as_themselves(vocab: int) -> None:
    without_context, with_context = np.full(vocab, -30.0, np.float32), np.full(vocab, -30.0, np.float32)
    with_context[vocab - 1], without_context[0] = 0, 0
    decoded = sparse(with_context, without_context, 1.0)
    values = dict(zip(decoded.ids.tolist(), decoded.values.tolist(), strict=True))
    assert values[vocab - 1] - values.get(0, 0) == pytest.approx(60, abs=STEP)


def test_sparse_of_impossible_ids_and_numbers_that_are_none() -> None:
    with_context = np.array([np.log(0.5), np.log(0.5), -np.inf, -np.inf, np.nan, -np.inf], np.float32)
    without_context = np.array([np.log(0.5), -np.inf, np.log(0.5), -np.inf, -np.inf, np.nan], np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoded = sparse(with_context, without_context, 1.0)
    values = np.zeros(6)
    values[decoded.ids] = decoded.values
    assert values[1] > values[0] + 400  # only with context
    assert values[2] < values[0] - 400  # only without
    assert np.abs(values[[3, 4, 5]] - values[0]).max() < 1  # neither: none is moved


def test_a_nan_in_one_row_does_not_spoil_the_other_ids() -> None:
    with_context, without_context = rows(5, 100)
    clean = sparse(with_context, without_context, 1.0, max_entries=10)
    with_context[int(clean.ids[3])] = np.nan
    decoded = sparse(with_context, without_context, 1.0, max_entries=10)
    assert len(set(decoded.ids) & set(clean.ids)) >= 8


LOG_PROBABILITIES = st.one_of(st.floats(-(2.0**120), 0, width=32), st.just(-np.inf), st.just(np.nan))


@settings(max_examples=300)
@given(
    st.lists(st.tuples(LOG_PROBABILITIES, LOG_PROBABILITIES), min_size=1, max_size=40),
    st.floats(-1000, 1000),
    st.integers(1, 40),
)
def test_whatever_the_rows_hold_the_payloads_are_usable(
    pairs: list[tuple[float, float]], strength: float, max_entries: int
) -> None:
    with_context, without_context = np.array(pairs, np.float32).T
    check_usable(sparse(with_context, without_context, strength, max_entries=max_entries), len(pairs))
    check_usable(decode(encode_lossless(with_context), len(pairs)), len(pairs))


# Malformed payloads

GOOD = sparse_payload([1, 5, 6, 9], [0, 3, 15, 2])


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (b"", "no header"),
        (b"\x01\x00\x00\x00", "no header"),
        (b"\x02\x00", "no header"),
        (b"\x00\x00\x00", "unknown kind 0"),
        (b"\x03\x01\x00", "unknown kind 3"),
        (b"\xff", "unknown kind 255"),
        (lossless_payload(2, bytes(4)), "9 bytes where its header announces 13"),
        (lossless_payload(1, bytes(5)), "10 bytes where its header announces 9"),
        (lossless_payload(2**32 - 1, bytes(16)), "announces 17179869185"),
        (lossless_payload(2, np.array([0, np.nan], "<f4").tobytes()), "not a number"),
        (lossless_payload(2, np.array([np.nan, 0], "<f4").tobytes()), "not a number"),
        (lossless_payload(1, np.array([np.inf], "<f4").tobytes()), "not a number"),
        (lossless_payload(1, np.array([-np.inf], "<f4").tobytes()), "not a number"),
        (lossless_payload(1, np.array([10_000.001], "<f4").tobytes()), "not a number within"),
        (struct.pack("<BH", SPARSE, 0) + b"\0", "an empty delta of 4 bytes"),
        (struct.pack("<BH", SPARSE, MAX_ENTRIES + 1) + bytes(2000), "4097 entries"),
        (struct.pack("<BHBB", SPARSE, 1, 0, 0), "does not say where"),
        (sparse_header(1, low_width=32) + bytes(5), "32 and 0 bits"),
        (sparse_header(1, width=17) + bytes(5), "0 and 17 bits"),
        (sparse_header(4, low_width=2, width=4), "announces"),
        (sparse_header(MAX_ENTRIES, low_width=31, width=16), "announces"),
        (GOOD[:-1], "announces"),
        (GOOD + bytes(1), "announces"),
        (sparse_header(3) + b"\x05", "2 marks for 3 entries"),
        (sparse_header(1) + b"\x05", "2 marks for 1 entries"),
        (sparse_payload([3, 3], [1, 1]), "increase strictly"),
        (sparse_payload([6, 5], [1, 1]), "increase strictly"),
        (sparse_payload([2, 10], [1, 1]), "below 10"),
        (sparse_payload([2**31 - 1], [1], low_width=31), "below 10"),
        (sparse_payload([1], [0], first=np.nan), "not a number"),
        (sparse_payload([1, 2], [0, 1], step=np.inf), "not a number"),
        (sparse_payload([1, 2], [0, 1], step=np.nan), "not a number"),
        (sparse_payload([1], [0], first=-10_008), "not a number within"),
        (sparse_payload([1, 2], [0, 15], step=3e38), "not a number within"),
        (sparse_payload([1, 2], [0, 15], step=-700), "not a number within"),
    ],
)
def test_malformed_payloads_are_refused_in_words(payload: bytes, words: str) -> None:
    with pytest.raises(InvalidDelta, match=words) as caught:
        decode(payload, 10)
    assert isinstance(caught.value, (CoSteerError, ValueError))


def test_what_a_payload_says_by_hand() -> None:
    decoded = decode(GOOD, 10)
    assert isinstance(decoded, SparseDelta)
    assert decoded.ids.tolist() == [1, 5, 6, 9]
    assert decoded.values.tolist() == [1.0, -0.5, -6.5, 0.0]


def test_empty_deltas_are_deltas() -> None:
    assert len(decode(struct.pack("<BH", SPARSE, 0), 10).values) == 0
    assert len(decode(lossless_payload(0, b""), 10).values) == 0


def decodes_or_is_refused(payload: bytes, vocab_size: int) -> bool:
    try:
        delta = decode(payload, vocab_size)
    except InvalidDelta:
        return False
    check_usable(delta, vocab_size)
    return True


def test_ten_thousand_arbitrary_payloads() -> None:
    rng = random.Random(0)
    for _ in range(10_000):
        kind, count = rng.choice([0, 1, 2, 2, 2, 3]), rng.choice([0, 1, 3, 8, 300, 60_000])
        payload = struct.pack("<BH", kind, count) + rng.choice([b"", bytes([rng.randrange(20), rng.randrange(20)])])
        decodes_or_is_refused(payload + rng.randbytes(rng.randrange(60)), rng.choice([1, 10, 1000, 151_936]))


def test_ten_thousand_damaged_payloads() -> None:
    rng = random.Random(1)
    sound = [encode_sparse(*rows(seed, vocab), strength) for seed, vocab in enumerate((6, 60, 600)) for strength in (0.3, 2.0)]
    sound += [encode_lossless(np.subtract(*rows(9, 60)))]
    kept = 0
    for _ in range(10_000):
        payload = bytearray(rng.choice(sound))
        for _ in range(rng.randrange(1, 4)):
            payload[rng.randrange(min(len(payload), rng.choice([20, 10_000])))] ^= 1 << rng.randrange(8)
        end = rng.choice([None, None, rng.randrange(len(payload))])
        kept += decodes_or_is_refused(bytes(payload[:end]), rng.choice([6, 60, 600, 1000]))
    assert 500 < kept < 9500  # neither all sound nor all refused: both ways are taken


@settings(max_examples=300)
@given(st.binary(max_size=200), st.integers(1, 2**20))
def test_arbitrary_bytes(payload: bytes, vocab_size: int) -> None:
    decodes_or_is_refused(payload, vocab_size)


def test_a_payload_makes_no_room_before_it_is_measured() -> None:
    """Marks without end for one entry, and entries without end for a few bytes."""
    with pytest.raises(InvalidDelta, match="announces"):
        decode(sparse_header(1) + bytes(4 << 20), 151_936)
    with pytest.raises(InvalidDelta, match="entries"):
        decode(sparse_header(65_535, 31, 16) + bytes(10), 151_936)


def test_a_sparse_delta_of_a_larger_vocabulary_is_refused_not_cut() -> None:
    payload = sparse_payload([1, 12], [1, 1])
    assert decode(payload, 13).ids.tolist() == [1, 12]
    with pytest.raises(InvalidDelta):
        decode(payload, 12)
