"""How long a run will take, by a clock that a test moves."""

import pytest

from pipeline.record.eta import TIMED, Eta, duration


@pytest.mark.parametrize("begin", [0, 40])
def test_it_is_said_once_of_the_steps_after_the_first(begin):
    """The first step, which compiles and allocates, counts for nothing; a resumed run is timed from its own start."""
    now = 0.0
    eta, told = Eta(begin, begin + 106, lambda: now), {}
    for step in range(begin + 1, begin + 107):
        now += 500.0 if step == begin + 1 else 2.0
        told[step] = eta.after(step)
    [(step, words)] = [(step, words) for step, words in told.items() if words]
    assert step == begin + 1 + TIMED
    assert words.startswith("about 3 min to go, at 2 s a step")  # 100 steps


def test_a_run_that_is_over_by_then_says_nothing():
    eta = Eta(0, TIMED + 1, lambda: 0.0)
    assert [eta.after(step) for step in range(1, TIMED + 2)] == [""] * (TIMED + 1)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (89, "89 s"), (91, "2 min"), (3_540, "59 min"), (3_599, "1 h 0 min"), (12_000, "3 h 20 min"),
     (47 * 3600, "47 h 0 min"), (51 * 3600, "2 d 3 h")],
)  # fmt: skip
def test_durations_as_people_say_them(seconds, words):
    assert duration(seconds) == words
