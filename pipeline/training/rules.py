"""What the command line of a run is checked against, before there is any process group."""

from typing import Any

from pipeline.config.schema import Config
from pipeline.engine.json_check import check_deepspeed_json
from pipeline.influence.table import check_config
from pipeline.models.load import check_attention


def check_run(config: Config, settings: dict[str, Any]) -> None:
    """Raises ValueError where the DeepSpeed JSON cannot be used, or does not go with the config, or where the model
    cannot have the attention that is asked for."""
    check_config(config, settings)
    check_attention(config.model)
    check_deepspeed_json(config, settings)


def without_effect(config: Config) -> list[str]:
    """Keys that are set, to another value than their default, and that nothing reads; a sentence each, for people to
    read before a run."""
    data, influence, policy = config.data, config.influence, config.policy
    draws = influence.reference == "validation" and influence.estimator != "ngram"
    wants: dict[str, tuple[bool, str]] = {
        "data.reference_files": (influence.reference == "validation", "influence.reference validation"),
        "data.max_eval_sequences": (data.holds_out or bool(data.reference_files), "data.eval_files"),
        "influence.positions": (
            config.task.classifies and influence.estimator == "lai",
            "task.kind sequence_classification with estimator lai",
        ),
        "influence.running_decay": (influence.reference == "running", "influence.reference running"),
        "influence.validation_sequences": (draws, "influence.reference validation, and not estimator ngram"),
        "influence.validation_every_steps": (draws, "influence.reference validation, and not estimator ngram"),
        "influence.adam_every_steps": (influence.precondition == "adam_state", "influence.precondition adam_state"),
        "influence.adam_decay": (influence.precondition == "adam_ema", "influence.precondition adam_ema"),
        "influence.adam_power": (influence.precondition != "none", "influence.precondition"),
        "influence.lookahead_step": (influence.estimator == "lookahead", "influence.estimator lookahead"),
        "influence.scope": (policy.rule != "top", "another policy.rule than top"),
        "policy.max_drop_fraction": (policy.rule not in ("top", "mixture"), "policy.rule threshold or rate"),
        "policy.normalize": (policy.rule not in ("top", "mixture"), "policy.rule threshold or rate"),
        "policy.mixture_rate": (policy.rule == "mixture", "policy.rule mixture"),
        "policy.mixture_floor": (policy.rule == "mixture", "policy.rule mixture"),
        "policy.threshold": (policy.rule == "threshold", "policy.rule threshold"),
        "policy.rate": (policy.rule == "rate", "policy.rule rate"),
    }
    found = []
    for key, (read, what) in wants.items():
        section, name = key.split(".")
        owner = getattr(config, section)
        if not read and getattr(owner, name) != type(owner).__dataclass_fields__[name].default:
            found.append(f"{key} is set, and has no effect without {what}: set that, or leave {key} out")
    return found
