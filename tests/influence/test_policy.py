from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.schema import PolicyConfig
from pipeline.influence.policy import decide

ALL = torch.tensor([3.0, -2.0, 0.0, -5.0, 1.0, 4.0, 2.0, 6.0])
EVEN = torch.full((8,), 10)


YES = torch.ones(8, dtype=torch.bool)


def weights(policy, scores=ALL, tokens=EVEN, step=1, seed=0, batch=0):
    return decide(scores, tokens, YES, policy, step, seed, batch).weights.tolist()


def test_threshold_drops_below_not_at():
    assert weights(PolicyConfig(threshold=0.0)) == [1, 0, 1, 0, 1, 1, 1, 1]


def test_the_worst_go_first_when_the_guard_bites():
    decision = decide(ALL, EVEN, YES, PolicyConfig(threshold=10.0, max_drop_fraction=0.25), 1, 0, 0)
    assert decision.weights.tolist() == [1, 0, 1, 0, 1, 1, 1, 1]
    assert decision.reasons[3] == "threshold"
    assert decision.reasons[2] == "max_drop_fraction"


def test_everything_may_go_where_the_guard_allows_it():
    assert weights(PolicyConfig(threshold=10.0, max_drop_fraction=1.0)) == [0] * 8


def test_rate_drops_the_lowest_share():
    assert weights(PolicyConfig(rule="rate", rate=0.25)) == [1, 0, 1, 0, 1, 1, 1, 1]


def test_fractions_of_a_unit_are_rounded_at_random_to_the_right_mean():
    """Catches truncation, which would drop nothing at 8 x 0.1."""
    policy = PolicyConfig(rule="rate", rate=0.1)
    dropped = [weights(policy, batch=m).count(0) for m in range(2000)]
    assert set(dropped) == {0, 1}
    assert sum(dropped) / 2000 == pytest.approx(0.8, abs=0.04)
    assert dropped == [weights(policy, batch=m).count(0) for m in range(2000)]
    assert dropped != [weights(policy, batch=m, seed=1).count(0) for m in range(2000)]


def test_the_inverted_arm_drops_the_highest():
    """Catches an inversion of the rate but not of the threshold, or of the guard's order."""
    assert weights(PolicyConfig(rule="rate", rate=0.25, flag="highest")) == [1, 1, 1, 1, 1, 0, 1, 0]
    assert weights(PolicyConfig(threshold=3.0, flag="highest")) == [1, 1, 1, 1, 1, 0, 1, 0]
    guarded = PolicyConfig(threshold=0.0, flag="highest", max_drop_fraction=0.25)
    assert weights(guarded) == [1, 1, 1, 1, 1, 0, 1, 0]


def test_the_inverted_arm_drops_as_many_as_the_arm_it_controls():
    arms = [PolicyConfig(rule="rate", rate=0.1, flag=flag) for flag in ("lowest", "highest")]
    for batch in range(20):
        lowest, highest = (weights(policy, batch=batch).count(0) for policy in arms)
        assert lowest == highest


def test_the_inverted_arm_leaves_units_without_labels_or_scores_alone():
    """Catches units without a score that become the highest once the sign is turned."""
    tokens, scores = EVEN.clone(), ALL.clone()
    tokens[7], scores[5] = 0, torch.nan
    assert weights(PolicyConfig(rule="rate", rate=1 / 6, flag="highest"), scores, tokens) == [0, 1, 1, 1, 1, 1, 1, 1]


def test_ties_are_broken_by_position():
    assert weights(PolicyConfig(rule="rate", rate=0.25), torch.zeros(8)) == [0, 0, 1, 1, 1, 1, 1, 1]


def test_units_without_labels_or_scores_are_left_alone():
    tokens, scores = EVEN.clone(), ALL.clone()
    tokens[3], scores[1] = 0, torch.nan
    assert weights(PolicyConfig(), scores, tokens) == [1] * 8
    assert weights(PolicyConfig(rule="rate", rate=0.5), scores, tokens).count(0) == 3


def test_nothing_is_dropped_during_warmup():
    policy = PolicyConfig(warmup_steps=2)
    assert weights(policy, step=2) == [1] * 8
    assert weights(policy, step=3).count(0) == 2


def test_observe_changes_nothing_but_says_what_it_would_have_dropped():
    decision = decide(ALL, EVEN, YES, PolicyConfig(action="observe"), 1, 0, 0)
    assert decision.weights.tolist() == [1] * 8
    assert [index for index, reason in enumerate(decision.reasons) if reason] == [1, 3]


def test_reweight_is_the_positive_part_with_mean_one():
    got = weights(PolicyConfig(action="reweight"))
    assert got == pytest.approx([1.5, 0, 0, 0, 0.5, 2, 1, 3])
    assert sum(got) / 8 == pytest.approx(1)


def test_reweight_without_a_positive_score_leaves_the_weights():
    decision = decide(-ALL.abs(), EVEN, YES, PolicyConfig(action="reweight"), 1, 0, 0)
    assert decision.weights.tolist() == [1] * 8
    assert set(decision.reasons) == {"no positive score"}


@given(
    scores=st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=40),
    fraction=st.floats(0, 1),
    rule=st.sampled_from(["threshold", "rate"]),
    flag=st.sampled_from(["lowest", "highest"]),
)
def test_never_more_than_the_guard_and_never_a_better_one_before_a_worse(scores, fraction, rule, flag):
    """With a rate that the config takes: where a fraction of a unit is rounded up, the guard bites."""
    scores, rate = torch.tensor(scores), min(0.7, fraction)
    policy = replace(PolicyConfig(), rule=rule, flag=flag, rate=rate, threshold=3.0, max_drop_fraction=fraction)
    got = decide(scores, torch.ones(len(scores)), torch.ones(len(scores)) > 0, policy, 1, 0, 0).weights
    assert (got == 0).sum() <= fraction * len(scores) + 1e-6
    if (got == 0).any() and (got == 1).any():
        scores = -scores if flag == "highest" else scores
        assert scores[got == 0].max() <= scores[got == 1].min()


@pytest.mark.parametrize("action", ["drop", "reweight", "observe"])
def test_units_that_are_not_finite_count_for_nothing_whatever_the_policy(action):
    """Catches NaN * 0, and a non-finite unit that takes a place among the worst."""
    scores, finite = ALL.clone(), YES.clone()
    scores[0], finite[0] = torch.nan, False
    finite[2] = False
    for warmup in (0, 5):
        policy = PolicyConfig(action=action, rule="rate", rate=0.5, warmup_steps=warmup)
        decision = decide(scores, EVEN, finite, policy, 1, 0, 0)
        assert decision.weights.isfinite().all()
        assert decision.weights[0] == decision.weights[2] == 0
        assert [decision.reasons[0], decision.reasons[2]] == ["non_finite"] * 2
    if action == "drop":
        policy = PolicyConfig(rule="rate", rate=0.5)
        assert decide(scores, EVEN, finite, policy, 1, 0, 0).weights.tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
