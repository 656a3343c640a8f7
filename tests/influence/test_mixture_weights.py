"""The controller of `policy.rule: mixture`, against a loop that is obviously right."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.influence.mixture_weights import DECAY, MixtureWeights

UNITS = st.lists(
    st.tuples(st.sampled_from([-2.5, -1.0, 0.0, 0.5, 3.0, math.nan, math.inf]), st.integers(0, 9), st.integers(0, 2)),
    max_size=6,
)


def slowly(prior: list[float], rate: float, floor: float, steps: list) -> tuple[list[float], dict[int, float]]:
    """Source by source, the formula as it stands in the docstring."""
    p = {s: weight / sum(prior) for s, weight in enumerate(prior)}
    w, a = dict(p), dict[int, float]()
    for units in steps:
        for s in p:
            own = [(score, tokens) for score, tokens, t in units if t == s and math.isfinite(score) and tokens]
            if own:
                mean = sum(score * tokens for score, tokens in own) / sum(tokens for _, tokens in own)
                a[s] = DECAY * a[s] + (1 - DECAY) * mean if s in a else mean
        if not a or (spread := statistics.pstdev(a.values())) == 0:
            continue
        centre = statistics.fmean(a.values())
        u = {s: w[s] * (math.exp(rate * (a[s] - centre) / spread) if s in a else 1.0) for s in p}
        u = {s: value / sum(u.values()) for s, value in u.items()}
        e = {s: max(u[s] - floor * p[s], 0.0) for s in p}
        w = {s: floor * p[s] + (1 - floor) * e[s] / sum(e.values()) for s in p}
    return [w[s] for s in p], a


@given(st.lists(UNITS, max_size=8), st.sampled_from([0.01, 0.5, 2.0]), st.sampled_from([0.0, 0.1, 0.9]))
@settings(deadline=None, max_examples=80)
def test_weights_are_those_of_a_plain_loop(steps, rate, floor):
    """Catches means over units instead of tokens, scores that are not finite, a source without units whose average
    fades, another sign, and a floor that pulls all weights to the prior."""
    prior = [0.2, 0.5, 1.3]
    mixture = MixtureWeights(prior, rate, floor)
    for units in steps:
        scores, tokens = (torch.tensor([unit[i] for unit in units], dtype=torch.float64) for i in (0, 1))
        mixture.move(scores, tokens, [unit[2] for unit in units])
    weights, averages = slowly(prior, rate, floor, steps)
    assert mixture.weights == pytest.approx(weights, rel=1e-6)
    assert {s: value for s, value in enumerate(mixture.influence) if value is not None} == pytest.approx(averages)
    assert sum(mixture.weights) == pytest.approx(1)
    assert all(w >= floor * p / 2 - 1e-12 for w, p in zip(mixture.weights, prior, strict=True))


def test_what_helps_is_read_more_down_to_the_floor_of_the_rest_and_back_again():
    """Catches a sign, and a weight that cannot come back from the floor."""
    mixture = MixtureWeights([1, 1], 0.2, 0.1)
    good_first = torch.tensor([1.0, -1.0]), torch.tensor([5.0, 5.0]), [0, 1]
    for _ in range(40):
        mixture.move(*good_first)
    assert mixture.weights == pytest.approx([0.95, 0.05])
    for _ in range(60):
        mixture.move(-good_first[0], *good_first[1:])
    assert mixture.weights == pytest.approx([0.05, 0.95])


def test_a_state_goes_on_as_if_nothing_had_happened():
    units = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 4.0]), [0, 1]
    one, other = MixtureWeights([2, 1], 0.3, 0.1), MixtureWeights([2, 1], 0.3, 0.1)
    one.move(*units)
    other.load_state_dict(one.state_dict())
    for mixture in (one, other):
        mixture.move(*units)
    assert (one.weights, one.influence) == (other.weights, other.influence)
