"""The fingerprint of a vocabulary: equal exactly when the same ids mean the same tokens."""

import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from costeer_vllm.protocol.messages import Vocabulary
from costeer_vllm.vocab import fingerprint

vocabularies = st.dictionaries(st.text(st.characters(), max_size=8), st.integers(0, 200_000), min_size=1, max_size=30)


@given(vocabularies, st.randoms(use_true_random=False))
def test_the_order_of_the_mapping_does_not_count(vocab: dict[str, int], shuffler: random.Random) -> None:
    items = list(vocab.items())
    shuffler.shuffle(items)
    assert fingerprint(dict(items)) == fingerprint(vocab)


@given(vocabularies, vocabularies)
def test_two_vocabularies_have_one_fingerprint_only_if_they_are_equal(one: dict[str, int], other: dict[str, int]) -> None:
    assert (fingerprint(one) == fingerprint(other)) == (one == other)


@given(vocabularies, st.data())
def test_any_change_shows(vocab: dict[str, int], data: st.DataObject) -> None:
    token = data.draw(st.sampled_from(sorted(vocab)))
    moved = {**vocab, token: vocab[token] + 1}
    renamed = {(name + "x" if name == token else name): value for name, value in vocab.items()}
    shorter = {name: value for name, value in vocab.items() if name != token}
    prints = [fingerprint(changed).fingerprint for changed in (vocab, moved, shorter)]
    assert len(set(prints)) == 3
    if len(renamed) == len(vocab):
        assert fingerprint(renamed).fingerprint != prints[0]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": 1, "b": 2}, {"a": 2, "b": 1}),
        ({"a": 1, "1": 11}, {"a": 11, "1": 1}),
        ({"a\0001": 1}, {"a": 1, "1": 1}),
        ({"1\0a": 1}, {"a": 1}),
        ({"": 0}, {"\0": 0}),
        ({"1a": 1}, {"a": 11}),
    ],
)
def test_separators_cannot_be_forged_by_digits(one: dict[str, int], other: dict[str, int]) -> None:
    assert fingerprint(one) != fingerprint(other)


def test_size_counts_tokens_and_the_result_is_a_valid_message_part() -> None:
    vocabulary = fingerprint({"a": 0, "b": 1, "c": 151_935})
    assert vocabulary.size == 3
    assert msgspec.convert(msgspec.to_builtins(vocabulary), Vocabulary) == vocabulary


def test_tokens_that_are_no_text_have_a_fingerprint_too() -> None:
    assert fingerprint({"\ud83d": 1}) != fingerprint({"\ud83e": 1})


def test_the_fingerprint_is_the_same_in_every_process() -> None:
    """It crosses machines, so it may depend on nothing but the mapping."""
    expected = "b7a552dacda82ac793e9198e441eec401f5f1f326e5f27332a53566670b07540"
    assert fingerprint({"wörld": 1, "hello": 0}).fingerprint == expected
