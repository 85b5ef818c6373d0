"""Look-ahead without a model: what is told next, within which bounds, and when it is not worth it."""

import itertools
import random

import pytest

from costeer_vllm.edge.ahead import FADING, MIN_ROUND_TRIP_S, MIN_SHARE, MIN_WORTH, SPARE_IDS, Ahead, Pace, Path, Told
from costeer_vllm.protocol.messages import MAX_GUESSES
from costeer_vllm.protocol.stream import extend_hash

PLENTY = 2**20
REACH = 100


class Stream:
    """One stream whose every prefix is likely to go on with the same tokens."""

    def __init__(self, likely: list[tuple[int, float]], max_bytes: int = PLENTY, size: int = 100) -> None:
        self.ahead, self.pace = Ahead(0, 0, 1.0, max_bytes), Pace()
        self.likely, self.size, self.now = likely, size, 0.0
        self.tokens: list[int] = []
        self.answer()

    def answer(self, path: Path = ()) -> bool:
        return self.ahead.tell(path, Told(self.likely), self.size)

    def guess(self, most: int = REACH, reach: int = REACH, max_ids: int = 8) -> list[Path]:
        """Tell up to ``most`` guesses, and return their paths."""
        told: list[Path] = []
        while len(told) < most and (path := self.ahead.next(reach, max_ids)) is not None and self.answer(path):
            told.append(path)
        return told

    def advance(self, *tokens: int) -> bool:
        keep, self.now = len(self.tokens), self.now + 1
        self.tokens += tokens
        place = len(self.tokens), extend_hash(0, self.tokens)
        was_told = self.ahead.advance(keep, tokens, *place, self.now, self.pace)
        if not was_told:
            self.answer()
        return was_told


def test_the_path_of_most_worth_comes_next() -> None:
    stream = Stream([(7, 0.6), (8, 0.35)])
    assert stream.guess(6) == [(7,), (7, 7), (8,), (7, 7, 7), (7, 8), (8, 7)]
    assert stream.ahead.hash_of((7, 8)) == extend_hash(0, [7, 8])


def test_unlikely_paths_are_never_told() -> None:
    stream = Stream([(7, 0.5), (8, MIN_WORTH / 2)])
    assert stream.guess() == [(7,), (7, 7), (7, 7, 7)], "0.5 ** 4 is below MIN_WORTH"
    assert Stream([]).guess() == []


def test_reach_bounds_how_far_a_path_goes() -> None:
    assert Stream([(7, 0.99)]).guess(reach=3) == [(7,), (7, 7), (7, 7, 7)]


def test_a_guess_that_came_true_is_not_told_again_and_it_goes_deeper() -> None:
    stream = Stream([(7, 0.99)])
    assert stream.guess(reach=2) == [(7,), (7, 7)]
    assert stream.advance(7)
    assert stream.guess(reach=2) == [(7, 7)]
    assert stream.advance(7, 7)
    assert stream.guess(reach=2) == [(7,), (7, 7)]
    assert stream.ahead.hash_of((7,)) == extend_hash(0, [7, 7, 7, 7])


def test_a_less_likely_guess_that_came_true_keeps_what_was_told_behind_it() -> None:
    stream = Stream([(7, 0.5), (8, 0.45)])
    stream.guess(6)
    assert stream.advance(8)
    assert (7,) not in stream.guess(1), "it was told as (8, 7)"


def test_after_a_miss_it_begins_anew() -> None:
    stream = Stream([(7, 0.99)])
    stream.guess(3)
    assert not stream.advance(5)
    assert stream.ahead.in_flight == []
    assert stream.guess(1) == [(7,)]


def test_nothing_is_guessed_before_the_question_is_answered() -> None:
    ahead = Ahead(0, 0, 1.0, PLENTY)
    assert ahead.next(REACH, 8) is None
    assert not ahead.advance(0, [1], 1, extend_hash(0, [1]), 0.0, Pace())
    assert ahead.next(REACH, 8) is None


def test_the_same_prefix_asked_for_again_is_told_again() -> None:
    stream = Stream([(7, 0.99)])
    stream.guess(3)
    assert not stream.advance()
    assert stream.guess(1) == [(7,)]


def test_going_back_is_a_miss() -> None:
    stream = Stream([(7, 0.99)])
    stream.guess(3)
    stream.advance(7)
    assert not stream.ahead.advance(0, [7], 1, extend_hash(0, [7]), 9.0, stream.pace)


def test_bytes_in_flight_are_bounded() -> None:
    stream = Stream([(7, 0.99)], max_bytes=1000, size=300)
    assert len(stream.guess()) == 3
    assert stream.ahead.num_bytes == 900
    assert stream.ahead.next(REACH, 8) is None
    stream.advance(7)
    assert stream.ahead.num_bytes == 600
    assert stream.guess() == [(7, 7, 7)]
    assert Stream([(7, 0.99)], max_bytes=299, size=300).guess() == []
    assert Stream([(7, 0.99)], max_bytes=0, size=300).guess() == [], "an engine that keeps no guesses"


def test_a_guess_that_grew_beyond_the_budget_is_not_told() -> None:
    stream = Stream([(7, 0.99)], max_bytes=1000, size=300)
    stream.size = 1200
    assert stream.guess() == []
    assert stream.ahead.num_bytes == 0
    assert stream.ahead.next(REACH, 8) is None, "nor tried again"


def test_guesses_in_flight_are_bounded_as_the_engine_counts_them() -> None:
    """A path that was left behind occupies the engine until its position has passed."""
    stream = Stream([(7, 0.995), (8, 0.99)])
    rng = random.Random(0)
    for _ in range(200):
        stream.guess()
        assert len(stream.ahead.in_flight) <= MAX_GUESSES
        kept = [place for place, _ in stream.ahead.in_flight]
        assert all(place > len(stream.tokens) for place in kept)
        stream.advance(rng.choice((7, 8, 9)))


def num_ids(paths: list[Path]) -> int:
    """Evaluated for guesses told one after the other: each starts where it parts from the one before it."""
    count = 0
    for before, path in itertools.pairwise([(), *paths]):
        same = next((i for i, (a, b) in enumerate(zip(before, path, strict=False)) if a != b), min(len(before), len(path)))
        count += len(path) - same
    return count


@pytest.mark.parametrize("likely", [[(7, 0.99), (8, 0.98)], [(7, 0.5), (8, 0.5)]])
def test_evaluated_ids_are_bounded_per_token_of_the_answer(likely: list[tuple[int, float]]) -> None:
    stream = Stream(likely)
    evaluated = 0
    for _ in range(100):
        evaluated += num_ids(stream.guess())
        stream.advance(9)
        stream.ahead._hits, stream.ahead._tries = 0.0, 0.0  # however well it seems to go
    assert 100 < evaluated <= SPARE_IDS + 3 * 100


def test_a_path_that_parts_far_back_is_left_alone() -> None:
    """It would make one stream's guess a window of many ids, and all others in that window wait for it."""
    stream = Stream([(7, 0.99), (8, 0.98)])
    paths = stream.guess(20, reach=6, max_ids=2)
    assert len(paths) == 20
    for before, path in itertools.pairwise([(), *paths]):
        assert num_ids([before, path]) - len(before) <= 2
    assert max(map(len, paths)) == 6


def test_where_it_was_told_to_stop_nothing_more_is_guessed() -> None:
    stream = Stream([(7, 0.99)])
    stream.guess(3)
    stream.ahead.stop()
    assert stream.guess() == []
    assert stream.advance(7), "what was told before is as right as ever"
    assert stream.guess() == []


def test_a_stream_whose_guesses_never_hit_stops_and_tries_again_now_and_then() -> None:
    stream = Stream([(7, 0.99)])
    guesses = []
    for _ in range(400):
        guesses.append(len(stream.guess(5)))
        stream.advance(9)
    assert guesses[0] == 5
    late = guesses[200:]
    assert 0 < sum(late) < 0.3 * len(late)
    assert max(late) == 1
    for _ in range(400):
        stream.guess(5)
        stream.advance(7)
    assert stream.ahead.hit_rate > 0.9, "it learns that they hit again"


def test_the_hit_rate_is_the_share_that_came_true() -> None:
    stream = Stream([(7, 0.99)])
    rng = random.Random(1)
    for _ in range(2000):
        stream.guess(2)
        stream.advance(7 if rng.random() < 0.8 else 9)
    assert stream.ahead.hit_rate == pytest.approx(0.8, abs=4 * (0.16 * (1 - FADING)) ** 0.5)


# --- the pace ---


def pace(asked_s: float, round_trip_s: float) -> Pace:
    found = Pace(round_trip_s)
    for _ in range(5):
        found.note(asked_s, was_told=False)
    return found


def test_it_pays_where_the_round_trip_is_a_good_share_of_a_tokens_time() -> None:
    assert pace(asked_s=0.060, round_trip_s=0.050).pays
    assert not pace(asked_s=0.050, round_trip_s=0.0004).pays, "a local edge before a slow large model"
    assert not pace(asked_s=0.001, round_trip_s=MIN_ROUND_TRIP_S / 2).pays, "a local edge before a quick one"
    assert not pace(asked_s=1.0, round_trip_s=0.9 * MIN_SHARE).pays
    assert not Pace(0.050).pays, "nothing is known yet"


def test_one_hiccup_does_not_turn_it_off() -> None:
    found = pace(asked_s=0.060, round_trip_s=0.050)
    found.note(30.0, was_told=False)
    assert found.pays


def test_it_finds_out_that_the_large_model_is_what_takes_the_time() -> None:
    found = pace(asked_s=0.060, round_trip_s=0.050)
    for _ in range(50):
        found.note(0.5, was_told=False)
    assert not found.pays


def test_reach_is_what_can_be_chosen_during_a_round_trip() -> None:
    found = pace(asked_s=0.060, round_trip_s=0.050)
    assert found.reach == MAX_GUESSES, "nothing is known yet"
    for _ in range(20):
        found.note(0.010, was_told=True)
    found.note(0.060, was_told=True)  # one that came late
    assert found.reach == 2 + 5


def test_intervals_are_noted_by_what_was_told_before() -> None:
    stream = Stream([(7, 0.99)])
    stream.advance(9)
    assert (stream.pace.asked_s, stream.pace.told_s) == (0, 0), "a Begin waits for prompts"
    stream.advance(9, 9)
    assert (stream.pace.asked_s, stream.pace.told_s) == (0.5, 0), "seconds per token"
    stream.guess(1)
    stream.advance(7)
    stream.advance(9)
    assert stream.pace.told_s == 1
