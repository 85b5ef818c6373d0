"""The delta codec: what comes back, how good the sparse form is, and that no payload whatever gets past ``decode``."""

import struct
import warnings

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from costeer_vllm.delta import MAX_NATS, DenseDelta, SparseDelta, decode, encode_lossless, encode_sparse
from costeer_vllm.errors import CoSteerError, InvalidDelta

LOSSLESS, SPARSE_16, SPARSE_32 = 1, 2, 3

FloatArray = np.ndarray


def log_softmax(logits: FloatArray) -> FloatArray:
    shifted = logits.astype(np.float64) - logits.max()
    return (shifted - np.log(np.exp(shifted).sum())).astype(np.float32)


def rows(seed: int, vocab: int, spread: float = 4.0) -> tuple[FloatArray, FloatArray]:
    """Log-probabilities of both rows of a pair that mostly agrees, as language models do."""
    rng = np.random.default_rng(seed)
    common = rng.normal(0, spread, vocab)
    return log_softmax(common + rng.normal(0, 1, vocab)), log_softmax(common + rng.normal(0, 1, vocab))


def header(kind: int, count: int) -> bytes:
    return struct.pack("<BI", kind, count)


def sparse_payload(ids: list[int], values: list[float], wide: bool = False) -> bytes:
    kind, width = (SPARSE_32, "<u4") if wide else (SPARSE_16, "<u2")
    return header(kind, len(ids)) + np.array(ids, width).tobytes() + np.array(values, "<f2").tobytes()


def check_usable(delta: DenseDelta | SparseDelta, vocab_size: int) -> None:
    """What the kernels rely on."""
    assert np.isfinite(delta.values).all()
    assert (np.abs(delta.values.astype(np.float64)) <= MAX_NATS).all()
    if isinstance(delta, DenseDelta):
        assert delta.values.dtype == np.float32
        assert delta.values.ndim == 1
        assert len(delta.values) <= vocab_size
    else:
        assert delta.values.dtype == np.float16
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
    encode_sparse(with_context, without_context, max_entries=5)
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


def test_sparse_chooses_the_largest_probabilities_of_either_row() -> None:
    p_with = np.array([0.5, 0.1, 0.05, 0.3, 0.05], np.float32)
    p_without = np.array([0.1, 0.1, 0.6, 0.1, 0.1], np.float32)
    decoded = decode(encode_sparse(np.log(p_with), np.log(p_without), max_entries=3), 5)
    assert isinstance(decoded, SparseDelta)
    assert decoded.ids.tolist() == [0, 2, 3]
    # The rows leave 0.15 and 0.2 outside, and values are relative to that.
    expected = np.log(np.array([0.5, 0.05, 0.3]) / np.array([0.1, 0.6, 0.1])) - np.log(0.15 / 0.2)
    np.testing.assert_allclose(decoded.values, expected, rtol=2e-3)


def test_sparse_stops_where_both_rows_leave_little_mass() -> None:
    p_with = np.array([0.9, 0.05, 0.04, 0.008, 0.002], np.float32)
    p_without = np.array([0.05, 0.9, 0.04, 0.008, 0.002], np.float32)
    for mass_left, ids in ((0.2, [0, 1]), (0.02, [0, 1, 2]), (0.005, [0, 1, 2, 3]), (1e-9, [0, 1, 2, 3, 4])):
        payload = encode_sparse(np.log(p_with), np.log(p_without), mass_left=mass_left)
        assert decode(payload, 5).ids.tolist() == ids, mass_left
    # One row alone is not enough: the other still has all of its mass elsewhere.
    alone = np.log(np.array([1 - 1e-7, 5e-8, 5e-8], np.float32)), np.log(np.array([0.02, 0.49, 0.49], np.float32))
    assert decode(encode_sparse(*alone, mass_left=1e-3), 3).ids.tolist() == [0, 1, 2]


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), vocab=st.integers(1, 2000), max_entries=st.integers(1, 2500), spread=st.floats(0, 30))
def test_sparse_is_always_decodable_and_within_its_limit(seed: int, vocab: int, max_entries: int, spread: float) -> None:
    payload = encode_sparse(*rows(seed, vocab, spread), max_entries=max_entries)
    decoded = decode(payload, vocab)
    assert isinstance(decoded, SparseDelta)
    assert 1 <= len(decoded.ids) <= min(max_entries, vocab)
    check_usable(decoded, vocab)


def personalized(base: FloatArray, strength: float, delta: DenseDelta | SparseDelta) -> FloatArray:
    logits = base.astype(np.float64)
    if isinstance(delta, DenseDelta):
        logits[: len(delta.values)] += strength * delta.values
    else:
        logits[delta.ids] += strength * delta.values.astype(np.float64)
    return np.exp(log_softmax(logits).astype(np.float64))


def distance(seed: int, vocab: int, strength: float, max_entries: int) -> float:
    """Total variation between the policies steered by the sparse and by the exact delta."""
    with_context, without_context = rows(seed, vocab)
    # The large model is a third opinion on the same text: it knows what both know, and more.
    base = with_context + without_context + np.random.default_rng(seed + 1).normal(0, 0.5, vocab)
    exact = personalized(base, strength, DenseDelta(with_context - without_context))
    payload = encode_sparse(with_context, without_context, max_entries=max_entries, mass_left=1e-9)
    return float(np.abs(exact - personalized(base, strength, decode(payload, vocab))).sum() / 2)


@pytest.mark.parametrize("strength", [0.476, 1.783, -1.0])
def test_sparse_is_close_to_exact_and_better_with_more_entries(strength: float) -> None:
    means = [np.mean([distance(seed, 5000, strength, entries) for seed in range(8)]) for entries in (8, 32, 128, 512, 5000)]
    assert means[0] > 4 * means[1] > 16 * means[2], means
    assert means[1] < 0.02, means
    assert max(means[3:]) < 3e-4, means  # only float16 rounds


def test_the_tail_is_what_makes_a_short_delta_usable() -> None:
    """Without context the mass sits in the tail, with context on one id: the tail must sink as a whole."""
    vocab, strength = 1000, 1.0
    p_with = np.full(vocab, 0.1 / (vocab - 1), np.float32)
    p_with[7] = 0.9
    p_without = np.full(vocab, 1 / vocab, np.float32)
    base = np.zeros(vocab, np.float32)
    exact = personalized(base, strength, DenseDelta(np.log(p_with) - np.log(p_without)))
    one_entry = decode(encode_sparse(np.log(p_with), np.log(p_without), max_entries=1), vocab)
    assert one_entry.ids.tolist() == [7]
    np.testing.assert_allclose(personalized(base, strength, one_entry), exact, rtol=5e-3)


@pytest.mark.parametrize(("sure_with", "sure_without"), [(12, 12), (30, 12), (30, 18), (12, 30), (30, 30)])
def test_the_tail_is_right_however_sure_the_rows_are(sure_with: float, sure_without: float) -> None:
    """Both rows expect id 5; the large model thinks of id 800, for which the tail is all that the delta says."""
    vocab, strength = 1000, 1.783
    rng = np.random.default_rng(0)
    common = rng.normal(0, 1, vocab)
    with_logits, without_logits, base = common.copy(), common.copy(), common.copy()
    with_logits[5], without_logits[5], base[5], base[800] = sure_with, sure_without, 4.0, 10.0
    with_context, without_context = log_softmax(with_logits), log_softmax(without_logits)
    decoded = decode(encode_sparse(with_context, without_context), vocab)
    assert 5 in decoded.ids
    assert 800 not in decoded.ids
    exact = personalized(base, strength, DenseDelta(with_context - without_context))
    np.testing.assert_allclose(personalized(base, strength, decoded), exact, rtol=0, atol=0.01)


@pytest.mark.parametrize(("vocab", "kind", "bytes_per_entry"), [(65_535, 2, 4), (65_536, 2, 4), (65_537, 3, 6), (152_064, 3, 6)])
def test_ids_are_as_wide_as_the_vocabulary_needs(vocab: int, kind: int, bytes_per_entry: int) -> None:
    with_context = np.full(vocab, -30.0, np.float32)
    without_context = np.full(vocab, -30.0, np.float32)
    with_context[vocab - 1], without_context[0] = -1e-4, -1e-4  # the two ends of the vocabulary matter
    payload = encode_sparse(with_context, without_context, max_entries=2)
    assert payload[0] == kind
    assert len(payload) == 5 + 2 * bytes_per_entry
    decoded = decode(payload, vocab)
    assert decoded.ids.tolist() == [0, vocab - 1]
    assert decoded.values[0] < -5 < 5 < decoded.values[1]


@pytest.mark.parametrize("last", [65_535, 65_536])
def test_the_last_id_of_16_bits_and_the_first_of_32_arrive_as_themselves(last: int) -> None:
    with_context, without_context = rows(3, last + 1)
    with_context[last] = 0.0
    decoded = decode(encode_sparse(with_context, without_context, max_entries=16), last + 1)
    assert decoded.ids[-1] == last
    expected = with_context[decoded.ids] - without_context[decoded.ids]
    difference = decoded.values.astype(np.float32) - expected
    assert np.ptp(difference) < 0.02  # one constant, the tail, and float16


def test_sparse_of_impossible_ids_and_numbers_that_are_none() -> None:
    with_context = np.array([np.log(0.5), np.log(0.5), -np.inf, -np.inf, np.nan, -np.inf], np.float32)
    without_context = np.array([np.log(0.5), -np.inf, np.log(0.5), -np.inf, -np.inf, np.nan], np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoded = decode(encode_sparse(with_context, without_context), 6)
    values = dict(zip(decoded.ids.tolist(), decoded.values.tolist(), strict=True))
    assert values[1] == MAX_NATS
    assert values[2] == -MAX_NATS
    assert values[0] == pytest.approx(0, abs=0.01)
    assert values.get(3, 0) == values.get(4, 0) == values.get(5, 0) == 0


def test_a_nan_in_one_row_does_not_spoil_the_other_ids() -> None:
    with_context, without_context = rows(5, 100)
    clean = decode(encode_sparse(with_context, without_context, max_entries=10), 100)
    with_context[int(clean.ids[3])] = np.nan
    decoded = decode(encode_sparse(with_context, without_context, max_entries=10), 100)
    assert np.count_nonzero(decoded.values) >= 8


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.floats(width=32), st.floats(width=32)), min_size=1, max_size=40),
    st.integers(1, 40),
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_whatever_the_rows_hold_the_payloads_are_usable(pairs: list[tuple[float, float]], max_entries: int) -> None:
    with_context, without_context = np.array(pairs, np.float32).T
    check_usable(decode(encode_sparse(with_context, without_context, max_entries), len(pairs)), len(pairs))
    check_usable(decode(encode_lossless(with_context), len(pairs)), len(pairs))


# Malformed payloads


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (b"", "no header"),
        (b"\x01\x00\x00\x00", "no header"),
        (header(0, 0), "unknown kind 0"),
        (header(4, 1) + bytes(6), "unknown kind 4"),
        (header(255, 0), "unknown kind 255"),
        (header(LOSSLESS, 2) + bytes(4), "9 bytes where its header announces 13"),
        (header(LOSSLESS, 1) + bytes(5), "10 bytes where its header announces 9"),
        (header(LOSSLESS, 2**32 - 1) + bytes(16), "announces 17179869185"),
        (header(SPARSE_16, 2) + bytes(7), "announces 13"),
        (header(SPARSE_32, 2**32 - 1), "announces 25769803775"),
        (sparse_payload([3, 3], [1, 1]), "increase strictly"),
        (sparse_payload([4, 3], [1, 1]), "increase strictly"),
        (sparse_payload([4, 3], [1, 1], wide=True), "increase strictly"),
        (sparse_payload([2, 10], [1, 1]), "below 10"),
        (sparse_payload([2**32 - 1], [1], wide=True), "below 10"),
        (sparse_payload([1], [np.nan]), "not a number"),
        (sparse_payload([1, 2], [0, np.inf]), "not a number"),
        (sparse_payload([1], [-10_008], wide=True), "not a number within"),
        (header(LOSSLESS, 2) + np.array([0, np.nan], "<f4").tobytes(), "not a number"),
        (header(LOSSLESS, 2) + np.array([np.nan, 0], "<f4").tobytes(), "not a number"),
        (header(LOSSLESS, 1) + np.array([np.inf], "<f4").tobytes(), "not a number"),
        (header(LOSSLESS, 1) + np.array([-np.inf], "<f4").tobytes(), "not a number"),
        (header(LOSSLESS, 1) + np.array([10_000.001], "<f4").tobytes(), "not a number within"),
    ],
)
def test_malformed_payloads_are_refused_in_words(payload: bytes, words: str) -> None:
    with pytest.raises(InvalidDelta, match=words) as caught:
        decode(payload, 10)
    assert isinstance(caught.value, (CoSteerError, ValueError))


def test_an_empty_delta_is_a_delta() -> None:
    assert len(decode(header(SPARSE_16, 0), 10).values) == 0
    assert len(decode(header(SPARSE_32, 0), 10).ids) == 0
    assert len(decode(header(LOSSLESS, 0), 10).values) == 0


def decodes_or_is_refused(payload: bytes, vocab_size: int) -> None:
    try:
        delta = decode(payload, vocab_size)
    except InvalidDelta:
        return
    check_usable(delta, vocab_size)


@settings(max_examples=500)
@given(st.binary(max_size=200), st.integers(1, 2**20))
def test_arbitrary_bytes(payload: bytes, vocab_size: int) -> None:
    decodes_or_is_refused(payload, vocab_size)


@settings(max_examples=500)
@given(st.sampled_from([LOSSLESS, SPARSE_16, SPARSE_32]), st.integers(0, 20), st.data())
def test_arbitrary_bodies_under_a_true_header(kind: int, count: int, data: st.DataObject) -> None:
    size = count * {LOSSLESS: 4, SPARSE_16: 4, SPARSE_32: 6}[kind]
    decodes_or_is_refused(header(kind, count) + data.draw(st.binary(min_size=size, max_size=size)), 2**16)


@settings(max_examples=500, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.booleans(),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=6),
    st.data(),
)
def test_damaged_payloads(seed: int, lossless: bool, damage: list[tuple[int, int]], data: st.DataObject) -> None:
    with_context, without_context = rows(seed, 60)
    encoded = encode_lossless(with_context - without_context) if lossless else encode_sparse(with_context, without_context, 12)
    payload = bytearray(encoded)
    for where, value in damage:
        payload[where % len(payload)] = value
    decodes_or_is_refused(bytes(payload[: data.draw(st.integers(0, len(payload)))]), 60)
    decodes_or_is_refused(bytes(payload), data.draw(st.integers(1, 100)))


def test_a_sparse_delta_of_a_larger_vocabulary_is_refused_not_cut() -> None:
    payload = sparse_payload([1, 12], [1.0, 1.0])
    assert decode(payload, 13).ids.tolist() == [1, 12]
    with pytest.raises(InvalidDelta):
        decode(payload, 12)
