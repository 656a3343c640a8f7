"""What a config must satisfy, before any process group exists."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.deepspeed_json import read_deepspeed_config

if TYPE_CHECKING:
    from pipeline.config.schema import Config
if TYPE_CHECKING:
    from pipeline.config.schema import FidelityConfig

BUILTIN = "builtin"


FIDELITY_ESTIMATORS = (
    "lai",
    "lai/adam_ema",
    "lai/adam_state",
    "lai/inverse_norm",
    "lai/gains",
    "lli",
    "lli/adam_ema",
    "lli/adam_state",
    "residual",
    "residual/adam_state",
    "residual/inverse_norm",
    "residual_last_1",
    "residual_last_1/adam_state",
    "residual_last_2",
    "residual_last_2/adam_state",
    "ghost",
    "ghost/adam_state",
    "ip",
    "ghost_flattened",
    "lai_flattened",
    "loss",
    "logit_gradient_norm",
    "random",
)


LAYER_WEIGHTS = {"inverse_norm": ("lai", "residual"), "gains": ("lai",)}
"""And the estimators that each is for."""


EXACT = "exact"


FIDELITY_REFERENCES = (EXACT, "ip", "ip_adam", "shapley_sgd", "shapley_adam", "shapley_adam_limit")


_NOT_FOR_TRAINING = {
    "influence.estimator": {"ip": "takes a backward a sample: pipeline.fidelity measures the others against it"},
}


def check(config: "Config") -> None:
    """Refuse what cannot work, naming the key, what was found and what to do."""
    for key, values in _NOT_FOR_TRAINING.items():
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        if value in values:
            raise ValueError(f"{key}: '{value}' {values[value]}; choose another value (--help lists them)")
    influence, policy = config.influence, config.policy
    at_least_one = {
        "max_steps": config.max_steps,
        "data.sequence_length": config.data.sequence_length - 1,
        "data.max_sequences": config.data.max_sequences,
        "data.max_eval_sequences": config.data.max_eval_sequences,
        "checkpoint.every_steps": config.checkpoint.every_steps,
        "checkpoint.keep": config.checkpoint.keep,
        "observe.every_steps": config.observe.every_steps,
        "policy.stop_after_non_finite": policy.stop_after_non_finite,
        "observe.eval_every_steps": config.observe.eval_every_steps,
        "benchmark.pairs": config.benchmark.pairs,
        "benchmark.warmup": config.benchmark.warmup,
        "benchmark.ranks": config.benchmark.ranks,
        "fidelity.batches": config.fidelity.batches,
        "fidelity.batch_size": config.fidelity.batch_size - 2,  # correlations need three
        "fidelity.shapley_batches": config.fidelity.shapley_batches,
        "fidelity.permutations": config.fidelity.permutations,
        "observe.audit_every_steps": config.observe.audit_every_steps,
        "influence.validation_sequences": influence.validation_sequences,
        "influence.validation_every_steps": influence.validation_every_steps,
        "influence.adam_every_steps": influence.adam_every_steps,
    }
    if influence.sketch != "none":
        at_least_one |= {
            "influence.sketch.inputs": influence.sketch.inputs,
            "influence.sketch.gradients": influence.sketch.gradients,
            "influence.sketch.layers": influence.sketch.layers,
        }
    for key, number in at_least_one.items():
        if number is not None and number < 1:
            raise ValueError(f"{key} is too small ({number}): sequences need two tokens, everything else at least 1")
    for key, seed in {"seed": config.seed, "data.seed": config.data.seed}.items():
        if seed is not None and seed < 0:
            raise ValueError(f"{key} must be 0 or more, not {seed}")
    if config.data.planted_foreign_files is not None and not config.data.planted_noise:
        raise ValueError("data.planted_foreign_files is for planted noise: set data.planted_noise, or leave it out")
    for key, fraction in {
        "policy.rate": policy.rate,
        "policy.max_drop_fraction": policy.max_drop_fraction,
        "data.max_bad_fraction": config.data.max_bad_fraction,
        "data.planted_noise": config.data.planted_noise,
        "benchmark.utilization": config.benchmark.utilization,
    }.items():
        if not 0 <= fraction <= 1:
            raise ValueError(f"{key} is a fraction from 0 to 1, not {fraction}")
    for key, decay in {
        "influence.adam_decay": influence.adam_decay,
        "influence.running_decay": influence.running_decay,
        "influence.layer_decay": influence.layer_decay,
    }.items():
        if not 0 <= decay < 1:
            raise ValueError(f"{key} must lie in [0, 1), not {decay}")
    _check_influence(config)
    if policy.action == "drop" and policy.rule == "threshold" and influence.estimator in ("loss", "random"):
        raise ValueError(
            f"policy.rule 'threshold' says nothing about estimator '{influence.estimator}', whose scores all have one "
            "sign; set policy.rule to rate"
        )
    if policy.action == "drop" and policy.rule == "rate" and policy.rate > policy.max_drop_fraction:
        raise ValueError(
            f"policy.rate {policy.rate} is above policy.max_drop_fraction {policy.max_drop_fraction}: lower the one "
            "or raise the other"
        )
    if policy.flag == "highest" and policy.action == "reweight":
        raise ValueError("policy.flag 'highest' says what to drop; policy.action 'reweight' drops nothing: choose drop")
    if Path(config.data.prepared_dir).resolve().is_relative_to(Path(config.run_dir).resolve()):
        raise ValueError(f"data.prepared_dir must lie outside run_dir ({config.run_dir}), which a new run moves aside")
    if config.observe.eval_every_steps and config.data.eval_files is None:
        raise ValueError("observe.eval_every_steps needs data.eval_files, which is not set")
    for key in ("peak_tflops", "fp32_tflops", "memory_gb_per_second", "network_gb_per_second", "utilization"):
        if (speed := getattr(config.benchmark, key)) is not None and speed <= 0:
            raise ValueError(f"benchmark.{key} must be more than 0, not {speed}")
    _check_fidelity(config.fidelity)


def _check_influence(config: "Config") -> None:
    """What estimator, reference and preconditioning need of each other and of the optimizer."""
    influence, settings = config.influence, read_deepspeed_config(config)
    scaled = {"adam_ema": ("lai", "lli"), "adam_state": ("lai", "lli", "residual", "ghost")}.get(influence.precondition)
    if scaled and influence.estimator not in scaled:
        raise ValueError(
            f"influence.precondition '{influence.precondition}' scales gradients, which estimator "
            f"'{influence.estimator}' does not use like this; set it to none, or choose {' or '.join(scaled)}"
        )
    weighed = LAYER_WEIGHTS.get(influence.layer_weights)
    if weighed and influence.estimator not in weighed:
        raise ValueError(
            f"influence.layer_weights '{influence.layer_weights}' weighs the layers of a forward, which estimator "
            f"'{influence.estimator}' does not use like this; set it to none, or choose {' or '.join(weighed)}"
        )
    if weighed and influence.precondition != "none":
        raise ValueError(
            f"influence.layer_weights '{influence.layer_weights}' is for gradients as they are, and influence."
            f"precondition '{influence.precondition}' puts layers on scales of its own; set one of the two to none"
        )
    optimizer, stage = settings["optimizer"].get("type", ""), settings.get("zero_optimization", {}).get("stage", 0)
    reads = {"influence.precondition": "adam_state", "influence.layer_weights": "gains"}
    reading = [f"{key} '{value}'" for key, value in reads.items() if getattr(influence, key.split(".")[1]) == value]
    if reading and optimizer.lower() not in ("adam", "adamw"):
        raise ValueError(
            f"{reading[0]} reads Adam's second moments; {config.deepspeed_config} has optimizer "
            f"'{optimizer}'. Choose Adam or AdamW there, or another value"
        )
    if influence.reference == "validation" and config.data.reference_files is None:
        raise ValueError("influence.reference 'validation' needs data.reference_files, which is not set")
    if BUILTIN in (config.data.reference_files or []):
        raise ValueError(f"data.reference_files: '{BUILTIN}' holds out nothing for it; give files or a hub id")
    if influence.reference != "batch" and influence.estimator in ("none", "loss", "random"):
        raise ValueError(
            f"influence.reference '{influence.reference}' means nothing to estimator '{influence.estimator}', which "
            "compares with nothing; set it to batch"
        )
    if config.observe.audit_every_steps and (influence.reference == "validation" or influence.estimator == "none"):
        raise ValueError(
            "observe.audit_every_steps compares scores with how the losses of the same units fell, which "
            f"influence.reference '{influence.reference}' with estimator '{influence.estimator}' says nothing about; "
            "leave it out"
        )
    _check_accumulation(config, settings, stage)
    if influence.estimator == "ghost" and influence.unit == "document":
        raise ValueError(
            "influence.unit 'document' is not for estimator 'ghost': the gradient at a position is that of all later "
            "losses of its sequence, of other documents too; set it to sequence"
        )


def _check_accumulation(config: "Config", settings: dict[str, Any], stage: int) -> None:
    """What steps need whose number of backwards is ours to choose."""
    influence, policy = config.influence, config.policy
    if influence.passes == "score_first":
        if influence.estimator in ("none", "ghost"):
            why = {"none": "scores nothing", "ghost": "scores by the training backward itself"}[influence.estimator]
            raise ValueError(
                f"influence.passes 'score_first' scores before it trains, and estimator '{influence.estimator}' {why}; "
                "set passes to one"
            )
        if policy.action == "observe":
            raise ValueError(
                "influence.passes 'score_first' saves the training of what is dropped, and policy.action 'observe' "
                "drops nothing; set passes to one"
            )
    if influence.owns_accumulation and stage == 1 and settings["zero_optimization"].get("overlap_comm"):
        what = "estimator 'ghost'" if influence.estimator == "ghost" else "influence.passes 'score_first'"
        raise ValueError(
            f"{what} owns the end of the accumulation, which DeepSpeed allows with overlap_comm at ZeRO 2 and 3 only: "
            f"set it to false in {config.deepspeed_config}"
        )


def _check_fidelity(fidelity: "FidelityConfig") -> None:
    for name, values, known in (
        ("estimators", fidelity.estimators, FIDELITY_ESTIMATORS),
        ("references", fidelity.references, FIDELITY_REFERENCES),
    ):
        if unknown := [value for value in values if value not in known]:
            raise ValueError(f"fidelity.{name}: '{unknown[0]}' is none of {', '.join(known)}")
        if not values:
            raise ValueError(f"fidelity.{name} is empty; name at least one of {', '.join(known)}")
    if EXACT in fidelity.references and not fidelity.exact:
        raise ValueError(
            f"fidelity.references: '{EXACT}' holds sketches against exact scores: set fidelity.exact to true"
        )
    if fidelity.standard_error < 0:
        raise ValueError(f"fidelity.standard_error must be 0 or more, not {fidelity.standard_error}")
