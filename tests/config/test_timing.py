"""Where the time of a step goes, by a clock that the test turns."""

import time

import pytest
import torch

from pipeline.config.timing import Stopwatch, outermost


@pytest.fixture
def clock(monkeypatch):
    """`clock(seconds)` lets time pass."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def passes(seconds):
        now[0] += seconds

    return passes


def test_a_part_inside_another_has_both_names_and_its_seconds_are_among_the_others(clock):
    timed = Stopwatch(torch.device("cpu"))
    with timed("step"):
        clock(1)
        for _ in range(2):
            with timed("validation"):
                clock(2)
                with timed("logit gradient"):
                    clock(4)
        with timed("logit gradient"):
            clock(8)
    assert timed.read() == {
        "step": 21, "step/validation": 12, "step/validation/logit gradient": 8, "step/logit gradient": 8
    }  # fmt: skip
    assert timed.read() == {}


def test_a_part_that_ends_in_an_error_is_left(clock):
    timed = Stopwatch(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="boom"), timed("step"), timed("scores"):
        raise RuntimeError("boom")
    with timed("step"):
        clock(3)
    assert timed.read() == {"step": 3}


def test_outermost_parts_hold_each_second_once():
    """Catches what is inside of `validation` counted beside it."""
    seconds = {
        "step": 10.0,
        "step/validation": 3.0,
        "step/validation/logit gradient": 2.0,
        "step/validation/layer inputs/x": 0.5,
        "step/logit gradient": 1.0,
        "evaluation": 4.0,
    }
    assert outermost(seconds) == {"step": 10, "evaluation": 4}
    assert outermost(seconds, "step") == {"validation": 3, "logit gradient": 1}
    assert outermost(seconds, "step/validation") == {"logit gradient": 2}
    assert outermost({"stepwise": 1.0, "step": 2.0}, "step") == {}
    assert outermost({}, "step") == {}
