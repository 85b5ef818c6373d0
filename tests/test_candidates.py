"""The candidates' codec: what comes back, how far rounding moves it, and that no payload whatever gets past ``decode``."""

import struct

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from costeer_vllm.candidates import BasePolicy, decode_candidates, encode_candidates
from costeer_vllm.errors import CoSteerError, InvalidCandidates
from costeer_vllm.protocol.messages import MAX_CANDIDATES, MAX_ROUNDING, MIN_ROUNDING

NAN, INF = float("nan"), float("inf")


def policy(log_probs: dict[int, float], left: float = 0.25) -> BasePolicy:
    ids = sorted(log_probs)
    return BasePolicy(np.array(ids, np.int64), np.array([log_probs[i] for i in ids], np.float32), left)


def payload(ids: list[int], values: list[float], step: float = 0.0, left: float = 0.25, count: int | None = None) -> bytes:
    """Whatever is given, as it stands: nothing is checked."""
    header = struct.pack("<Hff", len(ids) if count is None else count, step, left)
    return header + np.array(ids, "<u4").tobytes() + np.array(values, "<f4" if step == 0 else "<u2").tobytes()


def check_usable(base: BasePolicy) -> None:
    """What the fusion relies on."""
    assert base.ids.dtype == np.int64
    assert base.log_probs.dtype == np.float64
    assert 1 <= len(base.ids) == len(base.log_probs) <= MAX_CANDIDATES
    assert (np.diff(base.ids) > 0).all()
    assert base.ids[0] >= 0
    assert np.isfinite(base.log_probs).all()
    assert base.log_probs.max() <= 1e-3
    assert 0 <= base.mass_left <= 1


policies = st.builds(
    policy,
    st.dictionaries(st.integers(0, 2**32 - 1), st.floats(-1000, 0, width=32), min_size=1, max_size=60),
    st.floats(0, 1, width=32),
)


# Round trips


@settings(max_examples=200)
@given(policies)
def test_without_rounding_all_comes_back_bit_for_bit(base: BasePolicy) -> None:
    found = decode_candidates(encode_candidates(base))
    check_usable(found)
    assert found.ids.tolist() == base.ids.tolist()
    assert found.log_probs.astype(np.float32).tolist() == base.log_probs.tolist()
    assert found.mass_left == base.mass_left


@settings(max_examples=200)
@given(policies, st.floats(MIN_ROUNDING, MAX_ROUNDING))
def test_rounding_moves_a_value_by_half_a_step_at_the_most(base: BasePolicy, rounding: float) -> None:
    found = decode_candidates(encode_candidates(base, rounding))
    check_usable(found)
    step = float(np.float32(rounding))
    assert found.ids.tolist() == base.ids.tolist()
    assert found.mass_left == base.mass_left
    lowest = -65_535 * step
    expected = np.maximum(base.log_probs.astype(np.float64), lowest)
    assert np.abs(found.log_probs - expected).max() <= step / 2 * (1 + 1e-6) + 1e-9
    np.testing.assert_allclose(found.log_probs / step, np.rint(found.log_probs / step), rtol=1e-12)  # on the grid
    assert found.log_probs.min() >= lowest


def test_rounded_values_by_hand() -> None:
    found = decode_candidates(encode_candidates(policy({3: -0.1, 7: -0.74, 9: -0.76, 11: 0.0}), 0.5))
    assert found.log_probs.tolist() == [0.0, -0.5, -1.0, 0.0]


def test_the_smallest_step_reaches_further_down_than_any_token_that_matters() -> None:
    found = decode_candidates(encode_candidates(policy({1: -0.1, 2: -64.0, 3: -1e4}), MIN_ROUNDING))
    np.testing.assert_allclose(found.log_probs[:2], [-0.1, -64.0], atol=MIN_ROUNDING)
    assert found.log_probs[2] < -65


def test_the_lowest_step_stands_for_all_below_it() -> None:
    found = decode_candidates(encode_candidates(policy({1: -1.0, 2: -70_000.0, 3: -1e9}), 1.0))
    assert found.log_probs.tolist() == [-1.0, -65_535.0, -65_535.0]


@pytest.mark.parametrize("rounding", [0.0, 0.1])
def test_a_probability_that_a_device_rounded_above_1_is_taken(rounding: float) -> None:
    found = decode_candidates(encode_candidates(policy({1: 1e-6}, left=0.0), rounding))
    assert found.log_probs.max() == pytest.approx(0.0, abs=1e-5)


def test_sizes() -> None:
    base = policy(dict.fromkeys(range(MAX_CANDIDATES), -7.0))
    assert len(encode_candidates(base)) == 10 + 8 * MAX_CANDIDATES
    assert len(encode_candidates(base, 0.1)) == 10 + 6 * MAX_CANDIDATES
    assert len(decode_candidates(encode_candidates(base)).ids) == MAX_CANDIDATES


@pytest.mark.parametrize("count", [0, MAX_CANDIDATES + 1])
def test_no_more_and_no_fewer_candidates_are_encoded_than_are_decoded(count: int) -> None:
    with pytest.raises(AssertionError):
        encode_candidates(policy(dict.fromkeys(range(count), -7.0)))


# Malformed payloads

GOOD = payload([3, 5], [-1.0, -2.0])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "0 bytes have no header"),
        (GOOD[:9], "9 bytes have no header"),
        (GOOD[:10], "2 candidates in 10 bytes"),
        (GOOD[:-1], "2 candidates in 25 bytes, where it must be 1 to 1024 in 26"),
        (GOOD + b"\x00", "in 27 bytes"),
        (payload([3, 5], [1, 2], step=0.5) + b"\x00\x00", "in 24 bytes, where it must be 1 to 1024 in 22"),
        (payload([], []), "0 candidates"),
        (payload(list(range(1025)), [-7.0] * 1025), "1025 candidates"),
        (payload(list(range(1025)), [7] * 1025, step=0.5), "1025 candidates"),
        (payload([3], [-1.0], count=65_535), "65535 candidates"),
        (payload([3, 3], [-1.0, -2.0]), "do not increase strictly"),
        (payload([5, 3], [-1.0, -2.0]), "do not increase strictly"),
        (payload([5, 3], [1, 2], step=0.5), "do not increase strictly"),
        (payload([3, 5], [-1.0, NAN]), "no log-probability"),
        (payload([3, 5], [NAN, -1.0]), "no log-probability"),
        (payload([3, 5], [-INF, -1.0]), "no log-probability"),
        (payload([3, 5], [-1.0, INF]), "no log-probability"),
        (payload([3, 5], [-1.0, 0.002]), "no log-probability"),
        (payload([3], [1], step=-0.5), "cannot be"),
        (payload([3], [1], step=1.01), "cannot be"),
        (payload([3], [1], step=NAN), "cannot be"),
        (payload([3], [1], step=INF), "cannot be"),
        (payload([3], [-1.0], left=-1e-6), "cannot be"),
        (payload([3], [-1.0], left=1.001), "cannot be"),
        (payload([3], [-1.0], left=NAN), "cannot be"),
        (payload([3], [-1.0], left=INF), "cannot be"),
    ],
)
def test_malformed_payloads_are_refused_in_words(data: bytes, words: str) -> None:
    check_usable(decode_candidates(GOOD))
    with pytest.raises(InvalidCandidates, match=words) as caught:
        decode_candidates(data)
    assert isinstance(caught.value, (CoSteerError, ValueError))


def decodes_or_is_refused(data: bytes) -> None:
    try:
        base = decode_candidates(data)
    except InvalidCandidates:
        return
    check_usable(base)


@settings(max_examples=500)
@given(st.binary(max_size=100))
def test_arbitrary_bytes(data: bytes) -> None:
    decodes_or_is_refused(data)


@settings(max_examples=500)
@given(st.integers(0, 12), st.floats(width=32), st.floats(width=32), st.data())
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_arbitrary_bodies_under_a_header_that_fits(count: int, step: float, left: float, data: st.DataObject) -> None:
    size = count * (8 if step == 0 else 6)
    body = data.draw(st.binary(min_size=size, max_size=size))
    decodes_or_is_refused(struct.pack("<Hff", count, step, left) + body)


@settings(max_examples=500)
@given(st.lists(st.tuples(st.integers(0, 25), st.integers(0, 255)), max_size=4))
@example([(18, 1), (21, 127)])  # a signaling NaN
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_good_payload_with_changed_bytes(changes: list[tuple[int, int]]) -> None:
    changed = bytearray(GOOD)
    for at, byte in changes:
        changed[at] = byte
    decodes_or_is_refused(bytes(changed))
