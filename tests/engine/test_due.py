"""When checkpoints are due, by steps, by a clock that a test moves, and by what is best."""

import math
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.schema import CheckpointConfig
from pipeline.engine import collectives, due
from pipeline.engine.checkpoints import best_checkpoint, publish
from pipeline.engine.due import Due, held_out_losses


def figures(loss: float, **subsets: float) -> dict[str, Any]:
    return {"all": {"loss": loss}, "subsets": {name: {"loss": value} for name, value in subsets.items()}}


def by_the_clock(times: list[list[float]], rules: dict[str, Any]) -> list[bool]:
    """What a rank is told after each of the steps, at these seconds of its own clock."""
    mine = iter(times[collectives.rank()])
    original, now = due.clock, 0.0
    due.clock = lambda: now
    try:
        ask, told = Due(CheckpointConfig(**rules)), []
        for step in range(1, len(times[0]) + 1):
            now = next(mine)
            told.append(ask(step, {}))
        return told
    finally:
        due.clock = original


def test_all_ranks_go_by_the_clock_of_rank_0(ranks):
    """Rank 1's clock stands still, then runs ahead: by its own it would wait for ever in a checkpoint of its own."""
    for other in ([0.0] * 6, [1e6 * n for n in range(6)]):
        own = [30.0, 61.0, 90.0, 120.0, 121.0, 500.0]
        both = ranks(by_the_clock, [own, other], {"every_minutes": 1.0, "every_steps": 100})
        assert both == [[False, True, False, False, True, True]] * 2


def test_minutes_count_from_the_last_checkpoint_whatever_made_it_due(one_rank):
    [told] = one_rank(by_the_clock, [[10.0, 50.0, 70.0, 111.0]], {"every_minutes": 1.0, "every_steps": 2})
    assert told == [False, True, False, True]
    [told] = one_rank(by_the_clock, [[10.0, 50.0, 115.0, 116.0, 117.0]], {"every_minutes": 1.0, "every_steps": 9})
    assert told == [False, False, True, False, False]


@given(st.lists(st.sampled_from([1.0, 2.0, 3.0, math.nan, math.inf]), max_size=8))
def test_a_checkpoint_is_due_at_every_new_best_loss_and_at_no_other(losses):
    """Against a loop; the first of equals is the best, and what is no number never is."""
    ask, evaluations = Due(CheckpointConfig(every_steps=1_000, best_of="all")), {0: figures(0.5)}
    for step, loss in enumerate(losses, 1):
        evaluations[step] = figures(loss)
        finite = [each for each in losses[: step - 1] if math.isfinite(each)]
        assert ask(step, evaluations) == (math.isfinite(loss) and all(loss < each for each in finite))


def test_the_loss_is_that_of_the_subset_which_is_named():
    evaluations = {0: figures(9, a=9), 10: figures(3, a=1, b=5), 20: figures(2, a=4, b=2), 30: figures(1, b=math.nan)}
    assert held_out_losses(evaluations, "all") == {10: 3, 20: 2, 30: 1}
    assert held_out_losses(evaluations, "a") == {10: 1, 20: 4, 30: math.inf}
    assert held_out_losses(evaluations, "b") == {10: 5, 20: 2, 30: math.inf}
    assert held_out_losses(evaluations, None) == {}


@given(st.lists(st.sampled_from([None, 1.0, 2.0, 3.0, math.inf]), min_size=1, max_size=7), st.integers(1, 3))
def test_the_newest_and_the_best_stay_whatever_was_evaluated(losses, keep):
    """Against a loop over checkpoints 1, 2, ... and the losses after them; None: not evaluated."""
    known: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as directory:
        there: list[int] = []
        for step, loss in enumerate(losses, 1):
            checkpoint = Path(directory, "checkpoints", f"step-{step}")
            checkpoint.mkdir(parents=True)
            known |= {} if loss is None else {step: loss}
            publish(checkpoint, {}, keep, losses=known)
            there.append(step)
            finite = [s for s in there if known.get(s, math.inf) < math.inf]
            best = min(finite, key=lambda s: (known[s], s)) if finite else None
            there = sorted({*there[-keep:], *([best] if best else [])})
            assert sorted(int(path.name[5:]) for path in checkpoint.parent.glob("step-*")) == there
            named = best_checkpoint(directory)
            assert named == (checkpoint.with_name(f"step-{best}") if best else None)
