"""The run config: one typed, frozen tree, read from YAML plus dotted overrides, checked before any process group.

Batch sizes, accumulation, precision, optimizer and ZeRO live in the DeepSpeed JSON only and are never repeated here.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import jsonargparse
from jsonargparse import set_parsing_settings

set_parsing_settings(docstring_parse_attribute_docstrings=True)

BUILTIN = "builtin"
TRAIN_TOKENIZER = "train"


@dataclass(frozen=True)
class ModelConfig:
    name_or_path: str
    """The causal LM: a hub id or a local directory to continue from, or a model config (`*.json`) to start from
    scratch."""
    tokenizer: str | None = None
    """Hub id or local directory of the tokenizer; `train` trains a byte-level BPE of the model's vocabulary size on
    the training files. Default: the one that belongs to `name_or_path`."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward instead of keeping them."""


@dataclass(frozen=True)
class DataConfig:
    prepared_dir: str
    """Directory of the tokenized, packed, memory-mapped dataset; made by `pipeline.prepare` where it is missing."""
    train_files: str | list[str] = BUILTIN
    """What to train on: paths or globs (`.jsonl`, `.jsonl.gz`, `.jsonl.zst`, `.txt`, `.parquet`), a hub id
    (`owner/name` or `owner/name:split`, default split train), or `builtin`: the text that every Python installation
    carries."""
    eval_files: str | list[str] | None = None
    """Held-out documents, in the same forms; `builtin` holds out a twentieth of its documents. Default: none."""
    reference_files: str | list[str] | None = None
    """Documents whose loss counts with `influence.reference: validation`, in the same forms. Others than `eval_files`,
    or these no longer tell what was gained. Default: none."""
    sequence_length: int = 1024
    """Tokens per packed sequence."""
    text_field: str = "text"
    """Field of a record that holds its text, dotted where nested."""
    subset_field: str = "meta.pile_set_name"
    """Field of a record that names its subset, dotted where nested; a record without it belongs to subset `-`."""
    max_sequences: int | None = None
    """Stop preparing after this many training sequences (a hub corpus is streamed only so far). Default: all."""
    max_eval_sequences: int | None = None
    """The same for the held-out sequences, and for those of `reference_files`. Default: all."""
    max_bad_fraction: float = 0.001
    """Refuse the files when a larger fraction of their records is malformed, undecodable, empty or without text.
    Fewer are left out, counted, and reported with file and line."""
    seed: int | None = None
    """Seeds the order of the documents and the planted noise while preparing. Default: `seed`; set it where runs of
    several seeds share one `prepared_dir`."""
    planted_noise: float = 0.0
    """Fraction of the training sequences replaced by planted noise while preparing, to measure whether it is found (an
    experiment: never for real training). Equal shares of random tokens, shuffled tokens, one repeated 8-gram and, with
    `planted_foreign_files`, foreign text; their subsets are `planted/KIND`."""
    planted_foreign_files: str | list[str] | None = None
    """Text that does not belong among the training data (another language, say), in the forms of `train_files`, for
    the planted noise. Default: no such noise."""


@dataclass(frozen=True)
class SketchConfig:
    inputs: int = 512
    """K, numbers that every token's layer inputs are hashed to."""
    gradients: int = 2048
    """G, numbers that every token's logit gradient is hashed to."""
    layers: int = 128
    """ghost: numbers that every token's layer inputs, and output gradients but the logits', are hashed to; moments then
    have layers x G numbers. residual: of the gradient at the residual stream; layers x (K + G)."""


@dataclass(frozen=True)
class InfluenceConfig:
    estimator: Literal["none", "random", "loss", "lli", "lai", "residual", "ghost", "ip"] = "lai"
    """How a unit is scored; positive helps. lai: all layers' inputs with the logit gradient (Eq. 4 of arXiv
    2510.16007); lli: the LM head's input only; residual: the head's with the logit gradient, the others' with that
    gradient brought back to the residual stream; ghost: the inner product of true gradients (Eq. 3), out of the
    training backward, what is dropped being taken out again by a pass over it alone; loss: minus the mean loss; random:
    a seeded random number; none: nothing is scored and the policy does nothing."""
    reference: Literal["batch", "running", "validation"] = "batch"
    """Whose loss counts. batch: the global micro-batch itself (self-influence); running: an exponential mean over the
    micro-batches so far and this one; validation: `data.reference_files`."""
    running_decay: float = 0.9
    """running: weight of what was before, per micro-batch."""
    validation_sequences: int = 16
    """validation: size of the random subset that stands for the set, drawn anew at every refresh."""
    validation_every_steps: int = 1
    """validation: optimizer steps between refreshes, one more forward of the subset each (ghost: and backward)."""
    include_self: bool = True
    """Whether a unit's own term, always positive, is part of its score (the paper: yes)."""
    unit: Literal["sequence", "document"] = "sequence"
    """What is scored and dropped: a packed sequence, or each document's tokens inside it. Takes 4 K G bytes a unit."""
    sketch: Literal["none"] | SketchConfig = SketchConfig()
    """Widths of the sketch, or `none`: exact, for small models (one matrix of all input widths x vocabulary a unit)."""
    precondition: Literal["none", "adam_ema", "adam_state"] = "none"
    """adam_ema: scale every logit gradient by D^-adam_power, D a running mean of its squares (Appendix E). adam_state:
    scale inputs and gradients by the column and row means of Adam's own second moments, to its power on each side."""
    adam_every_steps: int = 10
    """adam_state: optimizer steps between readings of the second moments; before the first step there are none, and
    nothing is scaled."""
    adam_power: float = 0.5
    """Power of D on each side: 0.5 as in the paper, 0.25 for the geometry of Adam's own step."""
    adam_decay: float = 0.95
    """Decay of D per micro-batch, bias-corrected; best equal to the optimizer's second beta."""
    scope: Literal["micro_step", "step"] = "micro_step"
    """What a unit is compared with, decided together with, and at what price. micro_step: the global micro-batch, in
    the training forward; step: all micro-batches of the optimizer step, in one more forward before any backward."""
    passes: Literal["one", "score_first"] = "one"
    """one: score inside the training forward."""


@dataclass(frozen=True)
class PolicyConfig:
    action: Literal["drop", "reweight", "observe"] = "drop"
    """drop: flagged units get weight zero; reweight: weight = positive part of the score, scaled to mean one over the
    global micro-batch; observe: score everything, change nothing."""
    rule: Literal["threshold", "rate"] = "threshold"
    """What is flagged. threshold: scores below `threshold` (the paper: 0); rate: the lowest `rate` of the global
    micro-batch, fractions by seeded stochastic rounding."""
    threshold: float = 0.0
    """Scores below it are flagged, in the units of the score."""
    flag: Literal["lowest", "highest"] = "lowest"
    """Which end of the scores is flagged. highest: a control arm that drops what helps most (threshold: scores above
    it)."""
    rate: float = 0.1
    """Fraction of every global micro-batch (with `influence.scope: step`, of a whole step) that is flagged, 0 to 1."""
    warmup_steps: int = 0
    """Optimizer steps in which nothing is dropped or reweighted."""
    max_drop_fraction: float = 0.5
    """Never drop more than this fraction of a global micro-batch (rounded down); the worst go first. At 1 a whole
    micro-batch may go: it then adds a zero gradient. (reweight is not bound by it.)"""
    stop_after_non_finite: int = 20
    """Stop after so many optimizer steps in a row in which a unit's loss or score was not finite, or DeepSpeed skipped
    an update that was not. (Such units count for nothing; fp16 skips a few steps while it finds its scale.)"""


@dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int = 500
    """Optimizer steps between checkpoints; one is always written at the end."""
    keep: int = 2
    """How many of the newest checkpoints stay on disk."""


@dataclass(frozen=True)
class ObserveConfig:
    log_texts: bool = True
    """Put a few removed texts into TensorBoard; set false where the corpus is private."""
    every_steps: int = 10
    """Optimizer steps between histograms, activation norms and texts in TensorBoard (scalars come at every step)."""
    eval_every_steps: int | None = None
    """Optimizer steps between held-out evaluations. Default: only before and after the run."""
    audit_every_steps: int | None = None
    """Optimizer steps between audits: one more forward after the step, for the correlation of the scores with how much
    each unit's loss really fell (`influence/audit_pearson`). Default: never."""


FIDELITY_ESTIMATORS = (
    "lai",
    "lai/adam_ema",
    "lai/adam_state",
    "lli",
    "lli/adam_ema",
    "lli/adam_state",
    "residual",
    "residual/adam_state",
    "ghost",
    "ghost/adam_state",
    "ip",
    "ghost_flattened",
    "lai_flattened",
    "loss",
    "logit_gradient_norm",
    "random",
)
FIDELITY_REFERENCES = ("ip", "ip_adam", "shapley_sgd", "shapley_adam")


@dataclass(frozen=True)
class FidelityConfig:
    batches: int = 4
    """Batches per checkpoint, the same at each: what the run would have read next."""
    batch_size: int = 16
    """Sequences in a batch. The references keep that many gradients, 8 bytes a parameter each."""
    references: list[str] = field(default_factory=lambda: ["ip", "ip_adam"])
    """What scores are held against; the first is the figure's. ip: inner products of true gradients; ip_adam: the same
    in the geometry of Adam's second moments; shapley_sgd, shapley_adam: Shapley values of one optimizer step."""
    shapley_batches: int = 1
    """How many of the batches get the Shapley references, which take most of the time."""
    permutations: int = 1000
    """Most orders of joining that Shapley values are estimated from."""
    standard_error: float = 0.02
    """Stop before, once the largest standard error of a value is this fraction of the deviation between samples."""
    estimators: list[str] = field(default_factory=lambda: list(FIDELITY_ESTIMATORS))
    """Estimators, `/` and a preconditioning where there is one. For comparison only: ip, the true inner product;
    ghost_flattened and lai_flattened, whose sequences are single vectors of tokens x features; logit_gradient_norm."""
    exact: bool = True
    """Also without the sketch: for lai one matrix of all input widths x vocabulary a sequence; not for large models."""
    checkpoints: list[str] | None = None
    """Names (`step-100`) of the run's checkpoints, or `start` for `model.name_or_path`. Default: all there are, or
    `start` where there are none."""


@dataclass(frozen=True)
class Config:
    run_dir: str
    """Where the run lives: config.yaml, checkpoints/, ledger/, tensorboard/, model/, summary.json."""
    deepspeed_config: str
    """DeepSpeed's own JSON: batch sizes, accumulation, precision, optimizer, scheduler (its total_num_steps may say
    "auto": max_steps), clipping, ZeRO."""
    model: ModelConfig
    """The model and its tokenizer."""
    data: DataConfig
    """The corpus."""
    max_steps: int = 1000
    """Optimizer steps after which the run ends; an update that DeepSpeed skips counts."""
    seed: int = 0
    """Seeds sample order, sketches, the policy's rounding, random scores, dropout and a model made from scratch."""
    resume: str = "none"
    """none: start anew (an earlier run in `run_dir` is moved aside); auto: go on from the newest checkpoint, if there
    is one; or a checkpoint directory."""
    dry_run: bool = False
    """Rehearse only: config, files, ranks, memory of a step at the real sizes, disk, a checkpoint written and read.
    Nothing is trained or kept."""
    influence: InfluenceConfig = InfluenceConfig()
    """How units are scored."""
    policy: PolicyConfig = PolicyConfig()
    """What happens to units with low scores."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When the run is saved."""
    observe: ObserveConfig = ObserveConfig()
    """What is written for people to look at."""
    fidelity: FidelityConfig = field(default_factory=FidelityConfig)
    """How `pipeline.fidelity` holds scores against what samples really do."""

    def __post_init__(self) -> None:
        _check(self)


_NOT_FOR_TRAINING = {
    "influence.estimator": {"ip": "takes a backward a sample: pipeline.fidelity measures the others against it"},
    "influence.passes": {"score_first": "is not built yet"},
}


def _check(config: Config) -> None:
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
        "fidelity.batches": config.fidelity.batches,
        "fidelity.batch_size": config.fidelity.batch_size - 2,  # correlations need three
        "fidelity.shapley_batches": config.fidelity.shapley_batches,
        "fidelity.permutations": config.fidelity.permutations,
        "observe.audit_every_steps": config.observe.audit_every_steps,
        "influence.validation_sequences": influence.validation_sequences,
        "influence.validation_every_steps": influence.validation_every_steps,
        "influence.adam_every_steps": influence.adam_every_steps,
    }
    if isinstance(influence.sketch, SketchConfig):
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
    }.items():
        if not 0 <= fraction <= 1:
            raise ValueError(f"{key} is a fraction from 0 to 1, not {fraction}")
    for key, decay in {
        "influence.adam_decay": influence.adam_decay,
        "influence.running_decay": influence.running_decay,
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
    _check_fidelity(config.fidelity)


def _check_influence(config: Config) -> None:
    """What estimator, reference and preconditioning need of each other and of the optimizer."""
    influence, settings = config.influence, read_deepspeed_config(config)
    scaled = {"adam_ema": ("lai", "lli"), "adam_state": ("lai", "lli", "residual", "ghost")}.get(influence.precondition)
    if scaled and influence.estimator not in scaled:
        raise ValueError(
            f"influence.precondition '{influence.precondition}' scales gradients, which estimator "
            f"'{influence.estimator}' does not use like this; set it to none, or choose {' or '.join(scaled)}"
        )
    optimizer, stage = settings["optimizer"].get("type", ""), settings.get("zero_optimization", {}).get("stage", 0)
    low = [key for key in ("bf16", "fp16") if settings.get(key, {}).get("enabled")]
    if influence.precondition == "adam_state" and optimizer.lower() not in ("adam", "adamw"):
        raise ValueError(
            f"influence.precondition 'adam_state' reads Adam's second moments; {config.deepspeed_config} has optimizer "
            f"'{optimizer}'. Choose Adam or AdamW there, or another precondition"
        )
    if influence.precondition == "adam_state" and stage == 0 and low:
        raise ValueError(
            f"influence.precondition 'adam_state' is not built for ZeRO 0 in {low[0]}: set a stage of 1 to 3 in "
            f"{config.deepspeed_config}"
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
    if influence.estimator != "ghost":
        return
    if influence.unit == "document":
        raise ValueError(
            "influence.unit 'document' is not for estimator 'ghost': the gradient at a position is that of all later "
            "losses of its sequence, of other documents too; set it to sequence"
        )
    if stage == 1 and settings["zero_optimization"].get("overlap_comm"):
        raise ValueError(
            f"estimator 'ghost' owns the end of the accumulation, which DeepSpeed allows with overlap_comm at ZeRO 2 "
            f"and 3 only: set it to false in {config.deepspeed_config}"
        )


def _check_fidelity(fidelity: FidelityConfig) -> None:
    for name, values, known in (
        ("estimators", fidelity.estimators, FIDELITY_ESTIMATORS),
        ("references", fidelity.references, FIDELITY_REFERENCES),
    ):
        if unknown := [value for value in values if value not in known]:
            raise ValueError(f"fidelity.{name}: '{unknown[0]}' is none of {', '.join(known)}")
        if not values:
            raise ValueError(f"fidelity.{name} is empty; name at least one of {', '.join(known)}")
    if fidelity.standard_error < 0:
        raise ValueError(f"fidelity.standard_error must be 0 or more, not {fidelity.standard_error}")


def read_deepspeed_config(config: Config) -> dict[str, Any]:
    """DeepSpeed's JSON as a dict, with a scheduler's `total_num_steps: "auto"` filled from `max_steps`.

    Raises ValueError where it is missing, is not JSON, or is silent or "auto" about what only it can say.
    """
    path = Path(config.deepspeed_config)
    try:
        settings: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"deepspeed_config: no file {path}; ds_configs/ holds ready ones") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"deepspeed_config: {path} is not JSON: {error}") from None
    if "train_batch_size" in settings:
        raise ValueError(f"{path}: remove train_batch_size; it follows from ranks x micro-batch x accumulation")
    for key, why in {
        "train_micro_batch_size_per_gpu": "samples per rank and micro-batch",
        "gradient_clipping": "DeepSpeed would clip at 1.0 without a word; write 1.0, or 0 for none",
        "optimizer": "its type and params",
    }.items():
        if key not in settings:
            raise ValueError(f"{path}: {key} is missing ({why})")
    schedule = settings.get("scheduler", {}).get("params", {})
    if schedule.get("total_num_steps") == "auto":
        schedule["total_num_steps"] = config.max_steps
    if auto := list(_auto_keys(settings)):
        raise ValueError(f'{path}: only scheduler.params.total_num_steps may say "auto", not {", ".join(auto)}')
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        if not isinstance(settings.setdefault(key, 1), int) or settings[key] < 1:
            raise ValueError(f"{path}: {key} must be a whole number of at least 1, not {settings[key]!r}")
    if config.influence.estimator == "ghost":
        # One backward more than planned, after the last one, where something is to be dropped.
        settings["managed_gradient_accumulation"] = False
    # DeepSpeed's progress lines would interrupt the progress bar.
    return {"steps_per_print": sys.maxsize, **settings}


def _auto_keys(settings: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in settings.items():
        if isinstance(value, dict):
            found += _auto_keys(value, f"{prefix}{key}.")
        elif value == "auto":
            found.append(prefix + key)
    return found


def _parser(prog: str) -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(
        prog=f"python -m {prog}", usage="%(prog)s --config FILE.yaml [--section.key value ...]"
    )
    parser.add_argument("--config", action="config", help="YAML file of the keys below; later options override it.")
    parser.add_class_arguments(Config)
    return parser


def parse(prog: str, argv: Sequence[str] | None = None) -> Config:
    """The config of command `prog` from its arguments (default: the command line's).

    Unknown keys and values that cannot work end the process with a message and exit code 2. The `--local_rank` that
    DeepSpeed's launcher appends is accepted; the rank itself comes from the environment.
    """
    parser = _parser(prog)
    arguments = sys.argv[1:] if argv is None else argv
    namespace = parser.parse_args([a for a in arguments if not a.startswith(("--local_rank", "--local-rank"))])
    try:
        sections = parser.instantiate(namespace)
        return Config(**{field.name: sections[field.name] for field in fields(Config)})
    except ValueError as error:
        parser.error(str(error))


@contextmanager
def exit_on_user_error(prog: str) -> Iterator[None]:
    """End the process with the message and exit code 2 where the input is at fault; other errors keep their trace."""
    try:
        yield
    except ValueError as error:
        print(f"{prog}: error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def to_yaml(config: Config) -> str:
    """The resolved config as YAML that `--config` reads back to an equal one."""
    parser = _parser("pipeline")
    return parser.dump(parser.parse_object(to_dict(config)))


def to_dict(config: Any) -> dict[str, Any]:
    """The config as nested dicts of plain values."""
    return {
        field.name: to_dict(value) if is_dataclass(value := getattr(config, field.name)) else value
        for field in fields(config)
    }
