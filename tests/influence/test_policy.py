from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.schema_influence import PolicyConfig
from pipeline.influence.policy import decide, decide_tokens

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


TOP = PolicyConfig(rule="top", pool=2)


def test_the_best_of_a_pool_are_kept_whatever_the_other_rules_say():
    """Catches the threshold, the rate or the guard in a pool."""
    decision = decide(ALL, EVEN, YES, replace(TOP, threshold=100.0, max_drop_fraction=0.1), 1, 0, 0)
    assert decision.weights.tolist() == [1, 0, 0, 0, 0, 1, 1, 1]
    assert decision.reasons == ["", "top", "top", "top", "top", "", "", ""]
    assert weights(replace(TOP, pool=4)) == [0, 0, 0, 0, 0, 1, 0, 1]
    assert weights(replace(TOP, pool=3)) == [0, 0, 0, 0, 0, 1, 0, 1]
    assert weights(replace(TOP, flag="highest")) == [0, 1, 1, 1, 1, 0, 0, 0]


def test_a_pool_that_warms_up_trains_on_the_first_of_what_it_reads():
    policy = replace(TOP, warmup_steps=3)
    assert weights(policy, step=3) == [1, 1, 1, 1, 0, 0, 0, 0]
    assert weights(policy, step=4) == [1, 0, 0, 0, 0, 1, 1, 1]


def test_what_has_no_score_or_no_token_is_chosen_last():
    scores, tokens = ALL.clone(), EVEN.clone()
    scores[7], tokens[5] = torch.nan, 0
    finite = YES.clone()
    finite[0] = False
    decision = decide(scores, tokens, finite, TOP, 1, 0, 0)
    assert decision.weights.tolist() == [0, 1, 1, 0, 1, 0, 1, 0]
    few = decide(ALL, EVEN, torch.tensor([True] + [False] * 7), TOP, 1, 0, 0)
    assert few.weights.tolist() == [1] + [0] * 7


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_a_temperature_samples_without_replacement_in_proportion_to_exp_of_the_score(temperature):
    """Of a pool of 4 keep 1: by softmax(score / (T s)). Catches noise of another kind, and a spread that is not the
    pool's own."""
    scores = torch.tensor([100.0, 300.0, 200.0, 600.0])
    policy = PolicyConfig(rule="top", pool=4, temperature=temperature)
    every = torch.ones(4, dtype=torch.bool)
    counts = torch.stack([decide(scores, EVEN[:4], every, policy, 1, 0, batch).weights for batch in range(4000)]).sum(0)
    expected = (scores.double() / (temperature * scores.double().std(correction=0))).softmax(0)
    assert (counts / 4000 - expected).abs().max() < 0.03


def test_equal_scores_at_a_temperature_are_a_fair_draw():
    policy = replace(TOP, temperature=1.0)
    kept = [weights(policy, scores=torch.ones(8), batch=batch) for batch in range(500)]
    assert all(sum(one) == 4 for one in kept)
    assert torch.tensor(kept).mean(0).min() > 0.4


@given(
    counts=st.lists(st.integers(0, 6), min_size=1, max_size=6),
    rate=st.sampled_from([0.0, 0.3, 0.5]),
    broken=st.sets(st.integers(0, 5)),
    seed=st.integers(0, 1000),
)
@settings(deadline=None)
def test_tokens_are_decided_as_units_of_their_own(counts, rate, broken, seed):
    """Against a loop. Catches a rank within each unit, tokens of broken units that count, and a weight of a unit that
    is not the share of its tokens that is kept."""
    tokens, finite = torch.tensor(counts).double(), torch.tensor([u not in broken for u in range(len(counts))])
    owners = [unit for unit, count in enumerate(counts) for _ in range(count)]
    scores = torch.rand(len(owners), generator=torch.Generator().manual_seed(seed))
    policy = PolicyConfig(rule="rate", rate=rate, max_drop_fraction=1.0)
    decision, weights = decide_tokens(scores, tokens, finite, policy, 1, seed, 0)
    counted = [index for index, owner in enumerate(owners) if finite[owner]]
    gone = sorted(counted, key=lambda index: scores[index].item())[: sum(weights[i] == 0 for i in counted)]
    assert abs(len(gone) - rate * len(counted)) < 1
    expected = [float(owner not in broken and index not in gone) for index, owner in enumerate(owners)]
    assert weights.tolist() == expected
    for unit, count in enumerate(counts):
        own = [weight for weight, owner in zip(expected, owners, strict=True) if owner == unit]
        assert decision.weights[unit] == (0 if unit in broken else sum(own) / count if count else 1)
        reason = "non_finite" if unit in broken else "rate" if 0 in own else ""
        assert decision.reasons[unit] == reason
