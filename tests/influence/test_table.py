"""Which config goes with which estimator."""

from dataclasses import replace

import pytest
import torch

from pipeline.config.schema import Config, ModelConfig, ObserveConfig
from pipeline.config.schema_data import DataConfig
from pipeline.config.schema_influence import InfluenceConfig, PolicyConfig
from pipeline.config.timing import Stopwatch
from pipeline.influence.appendix_e import AppendixE
from pipeline.influence.scorer import ControlScorer, SketchScorer
from pipeline.influence.table import CONTROLS, ESTIMATORS, check, check_config, make, owns_accumulation, scorer_of
from tests.tiny_models import tiny

ADAM = {"optimizer": {"type": "AdamW"}}
EVERY = ["lai", "lli", "residual", "ghost", "loss", "random", "none", "rho", "oracle"]
"""But lookahead and ngram, which take no other reference than validation."""
VALIDATED = {"lookahead", "ngram"}
BY_SKETCHES = {"lai", "lli", "residual", "ghost"}
ACCEPTED = {
    ("precondition", "adam_ema"): {"lai", "lli"},
    ("precondition", "adam_state"): BY_SKETCHES,
    ("reference", "running"): BY_SKETCHES,
    ("reference", "validation"): BY_SKETCHES,
    ("unit", "document"): set(EVERY) - {"ghost"},
    ("unit", "token"): set(EVERY) - BY_SKETCHES,
    ("passes", "score_first"): set(EVERY) - {"ghost", "none"},
    ("rule", "threshold"): set(EVERY) - {"loss", "random"},
    ("rule", "top"): set(EVERY) - {"none"},
}
USUAL = {"precondition": "none", "reference": "batch", "unit": "sequence", "passes": "one", "rule": "rate"}


def configs(name: str, **changes: str) -> tuple[InfluenceConfig, PolicyConfig]:
    """What every estimator takes, with changes."""
    changes = USUAL | changes
    rule = changes.pop("rule")
    own = {"rho": {"reference_model": "model"}, "oracle": {"oracle_subsets": "*"}}.get(name, {})
    return InfluenceConfig(estimator=name, **own, **changes), PolicyConfig(rule=rule, pool=2 if rule == "top" else None)


@pytest.mark.parametrize("name", EVERY)
def test_what_each_estimator_accepts(name):
    """Catches a combination that was lost, or let in. A refusal names key, value and estimator, the usual value, and
    only estimators that take it."""
    assert set(ESTIMATORS | CONTROLS) == {*EVERY, *VALIDATED}
    check(*configs(name), ADAM)
    for (key, value), accepted in ACCEPTED.items():
        influence, policy = configs(name, **{key: value})
        if name in accepted:
            check(influence, policy, ADAM)
            continue
        section = "policy" if key == "rule" else "influence"
        with pytest.raises(ValueError, match=f"{section}.{key} '{value}' is not for estimator '{name}'") as refused:
            check(influence, policy, ADAM)
        instead = str(refused.value).split("Set it to ")[1]
        usual, others = instead.split(", or choose ")
        assert usual == USUAL[key]
        assert set(others.split(" or ")) - VALIDATED == accepted


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("ghost", {"unit": "document"}, "of all later losses of its sequence, of other documents too. Set it to seq"),
        ("ghost", {"passes": "score_first"}, "it scores by the training backward itself. Set it to one"),
        ("none", {"passes": "score_first"}, "it scores nothing. Set it to one"),
        ("random", {"reference": "running"}, "it compares with nothing. Set it to batch"),
        ("loss", {"reference": "validation"}, "it compares with nothing. Set it to batch"),
        ("loss", {"rule": "threshold"}, "its scores all have one sign. Set it to rate"),
        ("ghost", {"precondition": "adam_ema"}, "Set it to none, or choose lai or lli"),
        ("none", {"rule": "top"}, "it scores nothing. Set it to rate"),
        ("rho", {"reference": "validation"}, "it compares with influence.reference_model. Set it to batch"),
        ("lai", {"rule": "top", "unit": "document"}, "chooses sequences, of which a step has a fixed number"),
        ("lai", {"rule": "top", "passes": "score_first"}, "in a pass of its own as it is; leave influence.passes out"),
        ("lookahead", {"reference": "validation"}, "set policy.rule to top with policy.pool, or influence.passes to"),
    ],
)
def test_a_refusal_says_why(name, changes, message):
    with pytest.raises(ValueError, match=message):
        check(*configs(name, **changes), ADAM)


@pytest.mark.parametrize("action", ["observe", "reweight"])
@pytest.mark.parametrize("name", ["loss", "random"])
def test_a_rule_matters_only_where_something_is_dropped(name, action):
    influence, policy = configs(name, rule="threshold")
    check(influence, replace(policy, action=action), ADAM)


@pytest.mark.parametrize("name", ["ip", "magic"])
def test_estimators_that_training_does_not_have_are_named(name):
    """`ip` takes a backward a sample: pipeline.fidelity measures the others against it."""
    every = "loss, random, none, lookahead, rho, ngram, oracle, lai, lli, residual, ghost"
    message = f"influence.estimator: '{name}' is none of {every}"
    with pytest.raises(ValueError, match=message):
        check(*configs(name), ADAM)
    with pytest.raises(ValueError, match=message):
        owns_accumulation(InfluenceConfig(estimator=name), PolicyConfig())


@pytest.mark.parametrize("optimizer", ["SGD", ""])
@pytest.mark.parametrize("name", sorted(BY_SKETCHES))
def test_second_moments_are_read_of_adam_only(name, optimizer):
    influence, policy = configs(name, precondition="adam_state")
    settings = {"optimizer": {"type": optimizer}} if optimizer else {}
    with pytest.raises(
        ValueError, match=f"reads Adam's second moments; the DeepSpeed JSON has optimizer '{optimizer}'"
    ):
        check(influence, policy, settings)
    for known in ("Adam", "adamw"):
        check(influence, policy, {"optimizer": {"type": known}})
    check(*configs(name), settings)


@pytest.mark.parametrize(("name", "reference"), [("none", "batch"), ("lai", "validation")])
def test_audits_are_of_scores_that_speak_of_the_units_own_losses(name, reference):
    influence, policy = configs(name, reference=reference)
    check(influence, policy, ADAM)
    with pytest.raises(ValueError, match=r"observe\.audit_every_steps .* leave it out"):
        check(influence, policy, ADAM, audits=True)
    check(*configs("lai"), ADAM, audits=True)


def test_scoring_first_is_for_policies_that_save_something():
    influence, policy = configs("lai", passes="score_first")
    with pytest.raises(ValueError, match="'observe' drops nothing; set passes to one"):
        check(influence, replace(policy, action="observe"), ADAM)
    check(influence, replace(policy, action="reweight"), ADAM)


@pytest.mark.parametrize(
    ("name", "passes", "what"),
    [
        ("ghost", "one", "estimator 'ghost' owns the end of the accumulation"),
        ("lai", "score_first", "influence.passes 'score_first' owns the end of the accumulation"),
    ],
)
def test_who_owns_the_end_of_the_accumulation_goes_without_overlap_comm_at_zero_1(name, passes, what):
    influence, policy = configs(name, passes=passes)

    def zero(stage: int, overlap: bool = True) -> dict:
        return ADAM | {"zero_optimization": {"stage": stage, "overlap_comm": overlap}}

    with pytest.raises(ValueError, match=what):
        check(influence, policy, zero(1))
    for settings in (zero(1, overlap=False), zero(0), zero(2), zero(3), ADAM):
        check(influence, policy, settings)
    check(*configs("lai"), zero(1))


def test_the_accumulation_is_ours_where_the_number_of_backwards_is():
    """And never in a candidate pool, of which as many are trained on as DeepSpeed's JSON says."""
    for name in EVERY:
        assert owns_accumulation(*configs(name)) == (name == "ghost")
        assert owns_accumulation(*configs(name, passes="score_first"))
        assert not owns_accumulation(*configs(name, rule="top"))


def test_lookahead_goes_with_a_pool_or_scoring_first_and_adam():
    influence, policy = configs("lookahead", reference="validation", rule="top")
    check(influence, policy, ADAM)
    check(replace(influence, passes="score_first"), PolicyConfig(), ADAM)
    with pytest.raises(ValueError, match="'lookahead' reads Adam's second moments; the DeepSpeed JSON has"):
        check(influence, policy, {"optimizer": {"type": "SGD"}})
    with pytest.raises(ValueError, match=r"set influence\.reference to validation, and data\.reference_files"):
        replace(influence, reference="batch")


@pytest.mark.parametrize(
    "zero",
    [
        {"zero_hpz_partition_size": 8},
        {"offload_param": {"device": "nvme"}},
        {"offload_optimizer": {"device": "nvme", "nvme_path": "/nvme"}},
    ],
)
def test_lookahead_wants_the_only_copy_of_the_weights_in_memory(zero):
    influence, policy = configs("lookahead", reference="validation", rule="top")
    with pytest.raises(ValueError, match=f"of which {next(iter(zero))} keeps another copy, or on NVMe: leave it out"):
        check(influence, policy, ADAM | {"zero_optimization": {"stage": 3} | zero})
    in_memory = {"stage": 3, "offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}
    check(influence, policy, ADAM | {"zero_optimization": in_memory})
    check(*configs("lai"), ADAM | {"zero_optimization": {"stage": 3} | zero})


def test_a_prefix_is_scored_where_that_saves_something():
    influence, policy = configs("lai", rule="top")
    check(replace(influence, score_prefix=0.5), policy, ADAM)
    check(replace(influence, score_prefix=0.5, passes="score_first"), PolicyConfig(), ADAM)
    with pytest.raises(ValueError, match="saves nothing where the training's own forward scores"):
        check(replace(influence, score_prefix=0.5), PolicyConfig(), ADAM)
    with pytest.raises(ValueError, match="leaves documents of a sequence without a score"):
        check(replace(influence, score_prefix=0.5, passes="score_first", unit="document"), PolicyConfig(), ADAM)
    with pytest.raises(ValueError, match=r"is a fraction from 0 to 1, not 1\.5"):
        replace(influence, score_prefix=1.5)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rule": "top"}, "'top' and policy.pool, the candidates .* go together"),
        ({"pool": 2}, "'top' and policy.pool, the candidates .* go together"),
        ({"rule": "top", "pool": 1}, "policy.pool 1 leaves nothing to choose from"),
        ({"temperature": 1.0}, "policy.temperature is for policy.rule 'top'"),
        ({"rule": "top", "pool": 2, "temperature": -1.0}, "policy.temperature must be 0 or more"),
        ({"rule": "top", "pool": 2, "action": "observe"}, "'observe' would train on all: set action to drop"),
    ],
)
def test_keys_of_a_pool_that_do_not_go_together_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        PolicyConfig(**keys)


def test_rho_and_its_model_go_together():
    for keys in ({"estimator": "rho"}, {"reference_model": "model"}):
        with pytest.raises(ValueError, match=r"'rho' and influence\.reference_model, the model .* go together"):
            InfluenceConfig(**keys)


def test_the_oracle_and_its_subsets_go_together():
    for keys in ({"estimator": "oracle"}, {"oracle_subsets": "a*"}):
        with pytest.raises(ValueError, match=r"'oracle' and influence\.oracle_subsets, the subsets .* go together"):
            InfluenceConfig(**keys)


def test_ngram_in_a_loop_of_ones_own_wants_a_scorer():
    influence, device = InfluenceConfig(estimator="ngram", reference="validation"), torch.device("cpu")
    with pytest.raises(ValueError, match="counts n-grams of the whole corpus before a run"):
        scorer_of(influence, tiny("llama"), 0, device, Stopwatch(device), lambda tensor: tensor)


def test_rho_in_a_loop_of_ones_own_wants_the_model():
    influence, device = InfluenceConfig(estimator="rho", reference_model="model"), torch.device("cpu")
    with pytest.raises(ValueError, match=r"'rho' needs the reference model that influence\.reference_model names"):
        scorer_of(influence, tiny("llama"), 0, device, Stopwatch(device), lambda tensor: tensor)
    scorer_of(influence, tiny("llama"), 0, device, Stopwatch(device), lambda tensor: tensor, lambda b: b.labels_BT)


def test_a_runs_config_is_checked_with_its_audits():
    """Catches a rule of the command line that the config never reaches."""
    influence, policy = configs("none")
    data = DataConfig(prepared_dir="data")
    config = Config("run", "ds.json", ModelConfig("m"), data, influence=influence, policy=policy)
    check_config(config, ADAM)
    with pytest.raises(ValueError, match=r"observe\.audit_every_steps"):
        check_config(replace(config, observe=ObserveConfig(audit_every_steps=2)), ADAM)
    with pytest.raises(ValueError, match="'document' is not for estimator 'ghost'"):
        check_config(replace(config, influence=InfluenceConfig(estimator="ghost", unit="document")), ADAM)


def test_every_estimator_is_made_and_scores_when_its_class_says():
    device = torch.device("cpu")
    timed, model = Stopwatch(device), tiny("llama")
    for name in EVERY:
        influence, _ = configs(name)
        scorer = scorer_of(influence, model, 0, device, timed, lambda tensor: tensor, lambda batch: batch.labels_BT)
        assert isinstance(scorer, ControlScorer if name in CONTROLS else SketchScorer)
        assert scorer.after_backward == (name == "ghost")
        assert not scorer.reads_second_moments
    for name in sorted(ACCEPTED["precondition", "adam_ema"]):
        influence = InfluenceConfig(estimator=name, precondition="adam_ema")
        assert isinstance(make(influence, model, 0, device, timed), AppendixE)
    influence = InfluenceConfig(precondition="adam_state")
    assert scorer_of(influence, model, 0, device, timed, lambda tensor: tensor).reads_second_moments
