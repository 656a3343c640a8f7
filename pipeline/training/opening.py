"""What a run is about to do, in a few lines, before its first step."""

from typing import Any

from transformers import PreTrainedModel

from pipeline.config.schema import Config
from pipeline.config.schema_influence import InfluenceConfig, PolicyConfig
from pipeline.training.influence_engine import InfluenceEngine
from pipeline.training.model_check import numbers_of, scored_share

_WIDTH = 11
"""Of the labels."""


def opening(
    config: Config, settings: dict[str, Any], report: dict[str, Any], model: PreTrainedModel, engine: InfluenceEngine
) -> str:
    """Of a run that goes on from `engine.step`. `settings`: DeepSpeed's JSON; `report`: of the training split."""
    lines = {
        "model": _model(config, settings, model, engine),
        "influence": scored_share(config, model) or _control(config.influence),
        "reference": _reference(config.influence),
        "policy": policy_in_words(config),
        "corpus": _corpus(config, report),
        "step": _step(config, engine),
        "run": _run(config, report["sequences"], engine),
        "output": _output(config),
    }
    return "\n".join(f"{label:{_WIDTH}}{text}" for label, text in lines.items() if text)


def _model(config: Config, settings: dict[str, Any], model: PreTrainedModel, engine: InfluenceEngine) -> str:
    numbers = sum(numbers_of(parameter) for parameter in model.parameters())
    stage = settings.get("zero_optimization", {}).get("stage", 0)
    precision = next((name for name in ("bf16", "fp16") if settings.get(name, {}).get("enabled")), "float32")
    return (
        f"{config.model.name_or_path}: {numbers:,} parameters, {model.config.model_type}; {precision}, ZeRO {stage}, "
        f"{_many(engine.ranks, 'rank')} on {engine.device.type}"
    )


def _control(influence: InfluenceConfig) -> str:
    """What gives scores and reads no weight."""
    if influence.estimator == "none":
        return "none: plain training"
    model = f" of {influence.reference_model}" if influence.reference_model else ""
    return f"{influence.estimator}{model}"


def _reference(influence: InfluenceConfig) -> str:
    """Empty for what compares with nothing."""
    if influence.estimator in ("none", "loss", "random", "rho", "oracle"):
        return ""
    whole = "all micro-batches of the step" if influence.scope == "step" else "the global micro-batch"
    own = f"a {influence.unit}'s influence on itself is {'in' if influence.include_self else 'out'}"
    if influence.reference == "validation":
        every = "" if influence.validation_every_steps == 1 else f" {influence.validation_every_steps}"
        steps = "step" if not every else "steps"
        return (
            "the text of data.reference_files"
            if influence.estimator == "ngram"
            else f"{influence.validation_sequences} sequences of data.reference_files, drawn anew every{every} {steps}"
        )
    if influence.reference == "running":
        return f"a running mean of {whole} (decay {influence.running_decay:g}); {own}"
    return f"{whole}; {own}"


def policy_in_words(config: Config) -> str:
    """What happens to units, in a sentence; empty where nothing is scored."""
    influence, policy = config.influence, config.policy
    if influence.estimator == "none":
        return ""
    units = f"{influence.unit}s"
    if policy.rule == "mixture":
        return "moves the weights of data.mixture towards the sources whose text helps most, drops nothing"
    if policy.action == "observe":
        return f"none: all {units} are scored and trained on alike"
    later = f", from step {policy.warmup_steps + 1} on" if policy.warmup_steps else ""
    if policy.action == "reweight":
        return f"weighs {units} by the positive part of their scores{later}"
    return f"{_dropped(policy, units, influence.scope)}{later}"


def _dropped(policy: PolicyConfig, units: str, scope: str) -> str:
    if policy.rule == "top":
        which = "the best" if not policy.temperature else f"a draw by score (temperature {policy.temperature:g})"
        return f"trains on {which} of every {policy.pool} {units} that are read"
    whole = "step" if scope == "step" else "global micro-batch"
    if policy.rule == "rate":
        return f"drops the {policy.flag} {policy.rate:.1%} of the {units} of every {whole}"
    side = "below" if policy.flag == "lowest" else "above"
    return (
        f"drops {units} that score {side} {policy.threshold:g}, at most {policy.max_drop_fraction:.0%} of a "
        "global micro-batch"
    )


def _corpus(config: Config, report: dict[str, Any]) -> str:
    where, length = f"prepared in {config.data.prepared_dir}", config.data.sequence_length
    if not config.task.classifies:
        return (
            f"{report['sequences']:,} sequences of {length:,} tokens out of {report['documents']:,} documents, {where}"
        )
    labels = report["labels"]
    shown = ", ".join(f"{label} {count:,}" for label, count in list(labels.items())[:8])
    cut = f"; {report['cut']:,} cut at {length:,} tokens" if report["cut"] else ""
    flipped = report.get("planted", {}).get("label", 0)
    noise = f"; {flipped:,} labels were replaced (task.label_noise)" if flipped else ""
    return f"{report['documents']:,} texts, {len(labels)} labels ({shown}){cut}{noise}; {where}"


def _step(config: Config, engine: InfluenceEngine) -> str:
    trained = engine.sequences // (config.policy.pool or 1)
    each = engine.micro_batches // (config.policy.pool or 1)
    parts = f"{engine.size} sequences x {_many(engine.ranks, 'rank')} x {_many(each, 'micro-batch', 'es')}"
    read = f"; {engine.sequences:,} sequences are read for it" if config.policy.pool else ""
    if config.task.classifies:
        return f"{trained:,} texts: {parts.replace(' sequences', '')}{read}"
    return f"{trained * config.data.sequence_length:,} tokens: {parts}{read}"


def _run(config: Config, rows: int, engine: InfluenceEngine) -> str:
    """Epochs are of the whole run, whatever it goes on from."""
    epochs = config.max_steps * engine.sequences / rows
    begin = f"step {engine.step + 1} to {config.max_steps}" if engine.step else f"{_many(config.max_steps, 'step')}"
    every = config.observe.eval_every_steps
    judged = f" and every {_many(every, 'step')}" if every else ""
    held_out = f"held-out loss before, after{judged}" if config.data.holds_out else "no held-out text"
    return f"{begin}, {epochs:.2g} epochs of the corpus; {held_out}"


def _output(config: Config) -> str:
    rules = config.checkpoint
    minutes = f" or {rules.every_minutes:g} min" if rules.every_minutes else ""
    best = " and the best" if rules.best_of else ""
    return (
        f"{config.run_dir}: ledger, TensorBoard, a checkpoint every {_many(rules.every_steps, 'step')}{minutes} (the "
        f"newest {rules.keep}{best} stay), the model at the end"
    )


def _many(number: int, what: str, ending: str = "s") -> str:
    return f"{number:,} {what}{'' if number == 1 else ending}"
