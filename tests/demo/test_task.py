"""The demo task: what is held out, what a row holds, and a score that cannot be won by listing."""

import random
from dataclasses import replace
from itertools import groupby, islice

import pytest

from costeer_vllm.demo import task
from costeer_vllm.demo.train import examples

ROWS = task.held_out(200)


def profile_of(row: task.Row) -> task.Profile:
    return task.Profile(**row.items)


def event_of(row: task.Row) -> task.Event:
    [event] = [event for event in task.EVENTS if event.facts == row.facts]
    return event


def perfect(row: task.Row) -> str:
    return task.answer(profile_of(row), event_of(row), row.facts)


def test_training_never_draws_a_held_out_name_or_occupation() -> None:
    rng = random.Random(3)
    drawn = [task.training_profile(rng, made_up_share) for made_up_share in (0.0, 0.15) for _ in range(5000)]
    assert not {profile.name for profile in drawn} & set(task.HELD_OUT_NAMES)
    assert not {(profile.job, profile.hobby) for profile in drawn} & set(task.HELD_OUT_OCCUPATIONS)
    assert len({profile.name for profile in drawn}) > 500  # the test is not empty


def test_no_training_prompt_or_answer_mentions_a_held_out_name() -> None:
    stream = islice(examples(True, random.Random(4)), 1000)
    texts = [example.answer + "".join(message["content"] for message in example.prompt) for example in stream]
    assert not [name for name in task.HELD_OUT_NAMES for text in texts if name in text]


def test_every_evaluation_profile_is_held_out() -> None:
    for row in ROWS:
        assert row.items["name"] in task.HELD_OUT_NAMES
        assert (row.items["job"], row.items["hobby"]) in task.HELD_OUT_OCCUPATIONS


def test_every_held_out_word_is_seen_in_other_combinations() -> None:
    seen = {f"{a} {b}" for a in task.FIRST_NAMES for b in task.LAST_NAMES} - set(task.HELD_OUT_NAMES)
    assert {name.split()[0] for name in seen} == set(task.FIRST_NAMES)
    assert {name.split()[1] for name in seen} == set(task.LAST_NAMES)


@pytest.mark.parametrize("n", [1, 8, 37, 200, 400])
def test_rows_of_one_profile_stand_together_and_share_one_context(n: int) -> None:
    rows = task.held_out(n)
    assert len(rows) == n
    groups = [list(group) for _, group in groupby(rows, key=lambda row: row.context)]
    assert len(groups) == len({row.context for row in rows}) == len({row.items["name"] for row in rows})
    for group in groups:
        queries = [row.messages[0]["content"] for row in group]
        assert len(set(queries)) == len(queries)


def test_rows_follow_the_seed_and_leave_the_global_generator_alone() -> None:
    state = random.getstate()
    assert task.held_out(30, seed=5) == task.held_out(30, seed=5) != task.held_out(30, seed=6)
    assert random.getstate() == state


def test_context_states_the_profile_and_the_query_does_not() -> None:
    for row in ROWS:
        assert all(f": {value}\n" in row.context for value in row.items.values())
        assert not [value for value in (*row.items.values(), *row.facts.values()) if value in row.messages[0]["content"]]


def test_no_two_events_share_a_venue_or_a_feature() -> None:
    assert len(set(task.VENUES)) == len(set(task.FEATURES)) == len(task.EVENTS)


def test_the_perfect_answer_scores_one() -> None:
    assert {task.score(perfect(row), row) for row in ROWS} == {(1.0, 1.0)}


@pytest.mark.parametrize("slot", ["name", "job", "town", "hobby", "greeting", "closing"])
def test_a_wrong_profile_item_costs_that_item_only(slot: str) -> None:
    row = ROWS[0]
    text = task.answer(replace(profile_of(row), **{slot: "Something Else"}), event_of(row), row.facts)
    assert task.score(text, row) == (pytest.approx(5 / 6), 1.0)


@pytest.mark.parametrize("slot", ["month", "venue", "feature"])
def test_a_wrong_fact_costs_that_fact_only(slot: str) -> None:
    row = ROWS[0]
    text = task.answer(profile_of(row), event_of(row), row.facts | {slot: "something else"})
    assert task.score(text, row) == (1.0, pytest.approx(2 / 3))


def test_listing_every_value_wins_nothing() -> None:
    row = ROWS[0]
    everything = {"month": task.MONTHS, "venue": task.VENUES, "feature": task.FEATURES}
    listed = {slot: ", ".join(values) for slot, values in everything.items()}
    assert task.score(task.answer(profile_of(row), event_of(row), listed), row) == (1.0, 0.0)
    others = [task.answer(profile_of(row), event, event.facts) for event in task.EVENTS]
    assert task.score("\n".join(others), row)[1] == 0.0
    assert task.score(row.context + " ".join(row.facts.values()), row) == (0.0, 0.0)


def test_an_empty_answer_scores_zero() -> None:
    assert task.score("", ROWS[0]) == (0.0, 0.0)
