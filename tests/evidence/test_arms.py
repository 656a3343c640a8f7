"""The comparison of arms, with figures made up so that the answer is known."""

import pytest

from pipeline.evidence import arms


def run(arm, seed, full, half=None, **values):
    def figures(value):
        return None if value is None else {"perplexity": 2.0**value, "bits_per_byte": value}

    usual = {"removed": 10, "removed_fraction": 0.1, "noise_auc": None, "noise_recall": None}
    return {"arm": arm, "seed": seed, "run_dir": f"{arm}-{seed}", "half": figures(half), "full": figures(full),
            **usual, **values}  # fmt: skip


def test_differences_are_paired_by_seed():
    """Catches a difference of means whose spread is that between seeds: it would hide a small steady gain."""
    base = {0: 1.0, 1: 2.0, 2: 3.0}
    runs = [run("none", seed, value) for seed, value in base.items()]
    runs += [run("lai", seed, value - 0.01 - 0.001 * seed) for seed, value in base.items()]
    none, lai = arms.compare(runs)
    assert (none["arm"], lai["arm"]) == ("none", "lai")
    assert none["full.bits_per_byte"]["spread"] == pytest.approx(1.0)
    assert "difference" not in none["full.bits_per_byte"]
    difference = lai["full.bits_per_byte"]["difference"]
    assert difference["mean"] == pytest.approx(-0.011)
    assert difference["spread"] == pytest.approx(0.001)
    assert difference["beyond_spread"]


def test_a_difference_within_its_spread_is_said_to_be_so():
    runs = [run("none", 0, 1.0), run("none", 1, 1.0), run("lai", 0, 0.5), run("lai", 1, 1.4)]
    difference = arms.compare(runs)[1]["full.bits_per_byte"]["difference"]
    assert difference["mean"] == pytest.approx(-0.05)
    assert not difference["beyond_spread"]


def test_only_seeds_that_the_baseline_has_are_compared_with_it():
    runs = [run("none", 0, 1.0), run("lai", 0, 0.9), run("lai", 1, 0.1)]
    lai = arms.compare(runs)[1]["full.bits_per_byte"]
    assert lai["mean"] == pytest.approx(0.5)
    assert lai["difference"]["values"] == {0: pytest.approx(-0.1)}
    assert lai["difference"]["spread"] is None
    assert lai["difference"]["beyond_spread"] is None


def test_without_a_baseline_or_held_out_figures_there_is_no_difference():
    [row] = arms.compare([run("lai", 0, None, noise_auc=0.8)])
    assert row["full.bits_per_byte"] is None
    assert row["noise_auc"]["mean"] == 0.8
    [row] = arms.compare([run("lai", 0, 1.0, half=2.0)])
    assert "difference" not in row["full.bits_per_byte"]
    assert row["half.perplexity"]["mean"] == 4.0


def test_the_same_arm_and_seed_twice_is_refused():
    with pytest.raises(ValueError, match=r"lai-1 and lai-1 are the same arm \(lai\) with the same seed"):
        arms.compare([run("lai", 1, 1.0), run("lai", 1, 2.0)])


def labels(*configs):
    return arms.labels([arms.settings(config) for config in configs])


def test_arms_are_named_after_what_differs_and_is_no_default():
    """Catches two arms under one name, and names full of what all have in common."""
    shared = {"rule": "rate", "rate": 0.2}
    configs = [
        {"influence": {"estimator": "none"}, "policy": {}},
        {"influence": {"estimator": "lai"}, "policy": shared},
        {"influence": {"estimator": "lai"}, "policy": shared | {"flag": "highest"}},
        {"influence": {"estimator": "lai", "precondition": "adam_ema"}, "policy": shared},
        {"influence": {"estimator": "random"}, "policy": shared},
    ]
    assert labels(*configs) == ["none", "lai", "lai, flag highest", "lai, precondition adam_ema", "random"]
    assert labels({"influence": {"estimator": "lai", "sketch": "none"}}, {"influence": {"estimator": "lai"}}) == [
        "lai, sketch none", "lai"
    ]  # fmt: skip


def test_weights_of_a_mixture_make_an_arm():
    """Catches plain training on two mixtures under one name, and such runs as ones that do not compare."""

    def mixed(estimator, *weights):
        sources = {name: {"files": name, "weight": weight} for name, weight in zip("ab", weights, strict=True)}
        return {"influence": {"estimator": estimator}, "data": {"mixture": sources}}

    configs = [mixed("none", None, None), mixed("none", 2, 2), mixed("none", 1, 3), mixed("lai", None, None)]
    assert labels(*configs) == ["none", "none, mixture alike", "none, mixture b 0.75 a 0.25", "lai"]
    assert labels(*configs[2:3]) == ["none"]
    assert arms.other_differences(configs) == {}


def test_plain_training_is_one_arm_whatever_its_policy_says():
    assert arms.settings({"influence": {"estimator": "none"}, "policy": {"rate": 0.3}}) == arms.settings(
        {"influence": {"estimator": "none", "sketch": "none"}}
    )


def test_controls_are_not_named_after_what_they_do_not_use():
    """Catches sketches in every name because a control has none."""
    sketch = {"input_width": 8, "logit_width": 8}
    lai, loss = ({"estimator": name, "include_self": False, "sketch": sketch} for name in ("lai", "loss"))
    configs = [{"influence": lai}, {"influence": lai | {"include_self": True}}, {"influence": loss}]
    assert labels(*configs) == ["lai, include_self False", "lai", "loss"]
    rates = [{"influence": part, "policy": {"rate": rate}} for part, rate in ((lai, 0.1), (loss, 0.2))]
    assert labels(*rates) == ["lai", "loss, rate 0.2"]
    assert labels({"influence": loss}, {"influence": loss | {"unit": "document"}}) == ["loss", "loss, unit document"]


def test_what_makes_runs_incomparable_is_labels():
    one = {"seed": 0, "max_steps": 5, "data": {"a": 1}, "influence": {"estimator": "lai"}}
    other = {"seed": 1, "max_steps": 6, "data": {"a": 1}, "influence": {"estimator": "none"}}
    assert arms.other_differences([one, other]) == {"max_steps": ["5", "6"]}
