"""How long a run will take: said once, after its first steps."""

import time
from collections.abc import Callable

TIMED = 5
"""Steps that the estimate is made of, after the first of all, which takes longer."""


class Eta:
    """Of a run that goes on from step `begin` to `end`. `clock`: seconds."""

    def __init__(self, begin: int, end: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._first, self._end, self._clock = begin + 1, end, clock
        self._started = 0.0

    def after(self, step: int) -> str:
        """To be asked after every step. A sentence once there are steps enough and some are left, else empty."""
        if step == self._first:
            self._started = self._clock()
        if step != self._first + TIMED or step >= self._end:
            return ""
        each = (self._clock() - self._started) / TIMED
        left = duration((self._end - step) * each)
        return f"about {left} to go, at {each:.3g} s a step (evaluations and checkpoints come on top)"


def duration(seconds: float) -> str:
    """As people say it: 2 d 3 h, 3 h 20 min, 4 min, 50 s."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if hours < 48:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{hours // 24} d {hours % 24} h"
