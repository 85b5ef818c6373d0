"""How long answers take, and whom a step waits for."""

import math

import pytest

from costeer_vllm.engine.pace import MIN_GRACE_S, PATIENCE_S, AnswerTime, StepClock, grace_s, limit_s, wait_s


def test_the_estimate_settles_on_a_steady_answer_time_and_its_bound_just_above_it() -> None:
    time = AnswerTime()
    assert time.bound == 0
    for _ in range(100):
        time.note(0.1, 0.1)
    assert time.mean == pytest.approx(0.1)
    assert 0.1 < time.bound < 0.11


def test_the_bound_covers_what_varies() -> None:
    time = AnswerTime()
    for i in range(200):
        time.note(*[0.05 if i % 2 else 0.15] * 2)
    assert 0.15 < time.bound < 0.4


def test_an_answer_that_was_found_late_is_believed_to_have_come_when_it_was_expected() -> None:
    time = AnswerTime()
    for _ in range(50):
        time.note(0.02, 0.02)
    for _ in range(50):
        time.note(0.0, 0.3)  # we looked at the end of a long step only
    assert time.mean == pytest.approx(0.02)
    for _ in range(50):
        time.note(0.1, 0.3)  # it cannot have come before
    assert time.mean == pytest.approx(0.1, rel=0.05)


def test_the_wait_of_a_request_is_what_is_left_after_the_forward_pass() -> None:
    assert wait_s(asked_at=10.0, answer_s=0.5, now=10.1, step_s=0.1) == pytest.approx(0.3)
    assert wait_s(asked_at=10.0, answer_s=0.5, now=10.45, step_s=0.1) == 0
    assert wait_s(asked_at=10.0, answer_s=0.5, now=10.6, step_s=0.1) == math.inf
    assert wait_s(asked_at=None, answer_s=0.5, now=10.0, step_s=0.1) == pytest.approx(0.4)
    assert wait_s(asked_at=None, answer_s=0.0, now=10.0, step_s=0.1) == 0  # nothing is known: it is tried


@pytest.mark.parametrize(
    ("waits", "left_out"),
    [
        ([0.0, 0.0], []),
        ([0.0, 0.5], [0.5]),  # beside one that is ready nobody is waited for
        ([0.0, 0.009], []),  # but for a tenth of a step
        ([0.2, 0.205, 0.5], [0.5]),  # where all are slow the step starts for the first of them
        ([0.5], [0.5]),  # and not before its answer is near: others may come
        ([math.inf, math.inf], [math.inf, math.inf]),
        ([0.0, math.inf], [math.inf]),
    ],
)
def test_who_is_left_out_of_a_step(waits: list[float], left_out: list[float]) -> None:
    limit = limit_s(waits, step_s=0.1)
    assert [wait for wait in waits if wait > limit] == left_out
    assert limit <= PATIENCE_S


def test_the_grace_is_a_share_of_a_step_but_long_enough_for_a_message() -> None:
    assert grace_s(0.5) == pytest.approx(0.05)
    assert grace_s(0.0) == MIN_GRACE_S


def test_the_clock_leaves_out_the_waits_and_the_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    clock = StepClock()
    for _ in range(60):
        step_s = clock.start_step()
        now += 0.03
        with clock.paused():
            now += 0.5
        now += 0.02
    assert step_s == pytest.approx(0.05)
    clock.stop()
    now += 100
    clock.start_step()
    now += 0.001  # a step without steered rows is no step
    assert clock.start_step() == pytest.approx(0.05)
