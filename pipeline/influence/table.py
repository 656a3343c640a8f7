"""Which estimators there are, and which config goes with which."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.config.schema import Config
from pipeline.config.schema_influence import InfluenceConfig, PolicyConfig
from pipeline.config.timing import Stopwatch
from pipeline.data.batch import Batch
from pipeline.influence.appendix_e import AppendixE
from pipeline.influence.controls import Lookahead, Loss, Nothing, Oracle, Random, Rho
from pipeline.influence.estimator import Control, Estimator, Scorable
from pipeline.influence.ghost import Ghost
from pipeline.influence.lai import Lai, Lli
from pipeline.influence.ngram import Ngram
from pipeline.influence.reference import reference_of
from pipeline.influence.residual import Residual
from pipeline.influence.scorer import AllReduce, ControlScorer, SketchScorer

ESTIMATORS: dict[str, type[Lai] | type[Residual] | type[Ghost]] = {
    "lai": Lai,
    "lli": Lli,
    "residual": Residual,
    "ghost": Ghost,
}
CONTROLS: dict[str, type[Scorable]] = {
    "loss": Loss,
    "random": Random,
    "none": Nothing,
    "lookahead": Lookahead,
    "rho": Rho,
    "ngram": Ngram,
    "oracle": Oracle,
}
"""Those that score tokens by themselves, and watch nothing."""

TokenLosses = Callable[[Batch], Tensor]
"""Of every position, (B, T)."""


def make(
    config: InfluenceConfig, model: PreTrainedModel, seed: int, device: torch.device, timed: Stopwatch
) -> Estimator:
    """The estimator that `config` asks for. Raises ValueError where the model is none for it."""
    estimator: Estimator = ESTIMATORS[config.estimator](config, model, seed, device, timed)
    if config.precondition == "adam_ema":
        assert isinstance(estimator, Lai)
        return AppendixE(estimator, config.adam_decay, config.adam_power, device)
    return estimator


def scorer_of(
    config: InfluenceConfig,
    model: PreTrainedModel,
    seed: int,
    device: torch.device,
    timed: Stopwatch,
    all_reduce: AllReduce,
    reference_losses: TokenLosses | None = None,
) -> ControlScorer | SketchScorer:
    """What training scores by. `reference_losses`: those of `influence.reference_model`, for `rho`. Raises ValueError
    where the model is none for the estimator."""
    if config.estimator in CONTROLS:
        return ControlScorer(_control(config, seed, reference_losses), config.unit == "token")
    estimator, reference = make(config, model, seed, device, timed), reference_of(config, device)
    return SketchScorer(config, estimator, reference, seed, device, timed, all_reduce)


def _control(config: InfluenceConfig, seed: int, reference_losses: TokenLosses | None) -> Control | None:
    """None for `lookahead`, whose scores come with the losses."""
    name = config.estimator
    if name == "ngram":
        raise ValueError(
            "influence.estimator 'ngram' counts n-grams of the whole corpus before a run, which pipeline.train does; "
            "in a loop of your own choose another estimator, or give InfluenceEngine a `scorer`"
        )
    if name == "oracle":
        assert config.oracle_subsets is not None
        return Oracle([config.oracle_subsets] if isinstance(config.oracle_subsets, str) else config.oracle_subsets)
    if name == "rho":
        if reference_losses is None:
            raise ValueError("influence.estimator 'rho' needs the reference model that influence.reference_model names")
        return Rho(reference_losses)
    if name == "random":
        return Random(seed, by_token=config.unit == "token")
    if name == "lookahead":
        return None
    return Loss() if name == "loss" else Nothing()


def owns_accumulation(influence: InfluenceConfig, policy: PolicyConfig) -> bool:
    """Whether the number of backwards in an optimizer step is ours: one more than planned to take out what was dropped,
    or as many as what is kept needs. DeepSpeed must then be told: "managed_gradient_accumulation": false."""
    if policy.rule == "top":
        return False
    return _kind(influence).after_backward or influence.passes == "score_first"


def scores_apart(influence: InfluenceConfig, policy: PolicyConfig) -> bool:
    """Whether units are scored in a pass of their own, which leaves no gradient, and not in the training's forward."""
    return policy.rule == "top" or influence.passes == "score_first"


def check(
    influence: InfluenceConfig,
    policy: PolicyConfig,
    settings: dict[str, Any],
    audits: bool = False,
    task: str = "causal_lm",
) -> None:
    """Raises ValueError where estimator, reference, unit, passes, preconditioning, policy, DeepSpeed's `settings` and
    the kind of task do not go together. `audits`: whether scores are to be audited."""
    name, kind = influence.estimator, _kind(influence)
    chosen: dict[str, tuple[str, str]] = {
        "influence.precondition": (influence.precondition, "none"),
        "influence.reference": (influence.reference, "batch"),
        "influence.unit": (influence.unit, "sequence"),
        "influence.passes": (influence.passes, "one"),
        "task.kind": (task, "causal_lm"),
    }
    if policy.rule == "mixture" and name == "none":
        raise ValueError(
            "policy.rule 'mixture' moves weights by scores, and influence.estimator 'none' gives none: choose another"
        )
    if policy.action == "drop" and policy.rule != "mixture":
        chosen["policy.rule"] = (policy.rule, "rate")
    if policy.rule == "top" and influence.unit != "sequence":
        raise ValueError(
            "policy.rule 'top' chooses sequences, of which a step has a fixed number; set influence.unit to sequence"
        )
    if policy.rule == "top" and influence.passes == "score_first":
        raise ValueError("policy.rule 'top' scores in a pass of its own as it is; leave influence.passes out")
    if not scores_apart(influence, policy):
        apart = "set policy.rule to top with policy.pool, or influence.passes to score_first"
        if name == "lookahead":
            raise ValueError(f"estimator 'lookahead' scores at other weights than the training's: {apart}")
        if influence.score_prefix < 1:
            raise ValueError(
                f"influence.score_prefix {influence.score_prefix} saves nothing where the training's own forward "
                f"scores: {apart}; or leave it out"
            )
    if influence.score_prefix < 1 and influence.unit != "sequence":
        raise ValueError(
            f"influence.score_prefix {influence.score_prefix} leaves documents of a sequence without a score: set "
            "influence.unit to sequence, or leave it out"
        )
    for key, (value, usual) in chosen.items():
        if value != usual and value not in kind.accepts:
            why = f": {kind.because[value]}" if value in kind.because else ""
            others = " or ".join(other for other, its in (ESTIMATORS | CONTROLS).items() if value in its.accepts)
            raise ValueError(
                f"{key} '{value}' is not for estimator '{name}'{why}. Set it to {usual}, or choose {others}"
            )
    optimizer = settings.get("optimizer", {}).get("type", "")
    reads = "influence.precondition 'adam_state'" if influence.precondition == "adam_state" else None
    reads = "influence.estimator 'lookahead'" if name == "lookahead" else reads
    if reads and optimizer.lower() not in ("adam", "adamw"):
        raise ValueError(
            f"{reads} reads Adam's second moments; the DeepSpeed JSON has optimizer '{optimizer}'. Choose Adam or "
            "AdamW there, or another value"
        )
    if audits and (influence.reference == "validation" or name == "none"):
        raise ValueError(
            "observe.audit_every_steps compares scores with how the losses of the same units fell, which "
            f"influence.reference '{influence.reference}' with estimator '{name}' says nothing about; leave it out"
        )
    if policy.normalize == "kept" and kind.after_backward and policy.rule != "top":
        raise ValueError(
            f"policy.normalize 'kept' is not for estimator '{name}', which knows what is kept when the gradient is "
            "there already: set it to all, or leave it out"
        )
    if influence.passes == "score_first" and policy.action == "observe":
        raise ValueError(
            "influence.passes 'score_first' saves the training of what is dropped, and policy.action 'observe' drops "
            "nothing; set passes to one"
        )
    zero = settings.get("zero_optimization", {})
    elsewhere = [key for key in ("offload_param", "offload_optimizer") if (zero.get(key) or {}).get("device") == "nvme"]
    elsewhere += ["zero_hpz_partition_size"] * ((zero.get("zero_hpz_partition_size") or 1) > 1)
    if name == "lookahead" and elsewhere:
        raise ValueError(
            f"estimator 'lookahead' moves every rank's own part of the weights, of which {elsewhere[0]} keeps another "
            "copy, or on NVMe: leave it out of the DeepSpeed JSON, or choose another estimator"
        )
    if owns_accumulation(influence, policy) and zero.get("stage", 0) == 1 and zero.get("overlap_comm"):
        what = f"estimator '{name}'" if kind.after_backward else "influence.passes 'score_first'"
        raise ValueError(
            f"{what} owns the end of the accumulation, which DeepSpeed allows with overlap_comm at ZeRO 2 and 3 only: "
            "set it to false in the DeepSpeed JSON"
        )


def check_effect(config: Config, settings: dict[str, Any], ranks: int) -> list[str]:
    """What of influence and policy has no effect in a run on so many ranks, in sentences for people to read before it.

    Raises ValueError where the policy could never act, however long the run: a step or two of a long run is a trial,
    but this is a mistake.
    """
    policy, influence, found = config.policy, config.influence, list[str]()
    if influence.estimator == "none" or policy.action == "observe" or policy.rule == "mixture":
        return found
    together = settings["train_micro_batch_size_per_gpu"] * ranks
    accumulation = settings.get("gradient_accumulation_steps", 1)
    what = "the global micro-batch"
    if influence.scope == "step":
        together, what = together * accumulation, "the step"
    cap = int(policy.max_drop_fraction * together + 1e-9)
    remedy = (
        "; take a larger train_micro_batch_size_per_gpu or more ranks"
        + (", or influence.scope step" if accumulation > 1 and influence.scope != "step" else "")
        + ", or policy.action observe"
    )
    if influence.unit == "sequence" and together == 1 and policy.action == "reweight":
        raise ValueError(f"policy.action 'reweight' has one sequence in {what}, whose weight is always 1{remedy}")
    if influence.unit == "sequence" and policy.action == "drop" and policy.rule != "top" and cap == 0:
        raise ValueError(
            f"policy.max_drop_fraction {policy.max_drop_fraction} of the {together} sequence{'s' * (together > 1)} of "
            f"{what} is less than one, so nothing can ever be dropped; raise it to {1 / together:.3g} or more"
            f"{remedy.replace('; take', ', take')}"
        )
    if policy.warmup_steps >= config.max_steps:
        found.append(
            f"policy.warmup_steps {policy.warmup_steps} is as long as the run (max_steps {config.max_steps}): nothing "
            "will be dropped or reweighted; lower it"
        )
    if policy.action == "drop" and policy.rule == "rate" and policy.rate == 0:
        found.append("policy.rate 0 flags nothing: nothing will be dropped; raise it, or set policy.action to observe")
    return found


def check_config(config: Config, settings: dict[str, Any]) -> None:
    """`check` of a run's config: the rules that the command line wants."""
    audits = config.observe.audit_every_steps is not None
    check(config.influence, config.policy, settings, audits, config.task.kind)


def _kind(influence: InfluenceConfig) -> type[Scorable]:
    every = {**CONTROLS, **ESTIMATORS}
    if influence.estimator not in every:
        raise ValueError(f"influence.estimator: '{influence.estimator}' is none of {', '.join(every)}")
    return every[influence.estimator]
