"""How long answers take, and whom a step can afford to wait for.

    W      a request's wait: how much later than the end of the forward pass its answer is expected
    hold   leave out of the step whoever has W > min(W_min + grace, PATIENCE_S), W_min being that of the request soonest ready

A request whose answer is there, and one that needs none, has W = 0: beside it nobody is waited for longer than the grace. Where
all are slow, the step starts so that the first answer arrives with the end of the forward pass: the two still overlap.
"""

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

PATIENCE_S = 0.25  # a step that has nothing else to do waits so long at the most: new requests and cancellations wait as well
GRACE_SHARE, MIN_GRACE_S = 0.1, 0.001  # of a step's duration: what one request may cost the others in its step
_GAIN, _DEVIATION_GAIN, _DEVIATIONS = 1 / 8, 1 / 4, 4  # of the estimate: those of TCP's retransmission timer, RFC 6298
_MIN_DEVIATION = 0.05  # of the mean
_LONGEST_STEP_S = 1.0  # longer ones are pauses


def grace_s(step_s: float) -> float:
    """What one request may cost the others, in seconds."""
    return max(MIN_GRACE_S, GRACE_SHARE * step_s)


@dataclass(slots=True)
class AnswerTime:
    """How long one edge worker takes for a token, in seconds."""

    mean: float = 0.0  # 0: nothing is known
    deviation: float = 0.0

    def note(self, least: float, most: float) -> None:
        """An answer took between ``least`` and ``most``: we look only now and then. What was expected is believed in between."""
        sample = min(max(self.mean, least), most) if self.mean else most
        if not self.mean:
            self.mean, self.deviation = sample, sample / 2
            return
        self.deviation += _DEVIATION_GAIN * (abs(sample - self.mean) - self.deviation)
        self.mean += _GAIN * (sample - self.mean)

    @property
    def bound(self) -> float:
        """When an answer is overdue; 0 if nothing is known."""
        return self.mean + max(_DEVIATIONS * self.deviation, _MIN_DEVIATION * self.mean)


def wait_s(asked_at: float | None, answer_s: float, now: float, step_s: float) -> float:
    """W of a request whose answer is not there; infinite if it is overdue. ``asked_at`` None: it is asked with this step."""
    if asked_at is None:
        return max(0.0, answer_s - step_s)
    due = asked_at + answer_s
    return max(0.0, due - now - step_s) if due > now else math.inf


def limit_s(waits: list[float], step_s: float) -> float:
    """The longest W that a step of requests with these waits can afford."""
    return min(min(waits, default=math.inf) + grace_s(step_s), PATIENCE_S)


class StepClock:
    """How long a step takes, from one start to the next, without the time that it waits for answers."""

    def __init__(self) -> None:
        self._step_s = 0.0
        self._started_at: float | None = None  # of a step that did something
        self._waited_s = 0.0
        self._has_waited = False  # so far in this step

    def start_step(self) -> float:
        """Another step begins; returns the mean of the last ones in seconds, 0 before the first."""
        now = time.monotonic()
        if self._started_at is not None and self._has_waited:
            sample = min(max(0.0, now - self._started_at - self._waited_s), _LONGEST_STEP_S)
            self._step_s += _GAIN * (sample - self._step_s) if self._step_s else sample
        self._started_at, self._waited_s, self._has_waited = now, 0.0, False
        return self._step_s

    def stop(self) -> None:
        """Nothing is steered at the moment: what follows is no part of a step."""
        self._started_at = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around the wait for answers, which every step with steered rows has."""
        start = time.monotonic()
        yield
        self._waited_s += time.monotonic() - start
        self._has_waited = True
