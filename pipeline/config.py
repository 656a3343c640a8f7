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
    sequence_length: int = 1024
    """Tokens per packed sequence."""
    text_field: str = "text"
    """Field of a record that holds its text, dotted where nested."""
    subset_field: str = "meta.pile_set_name"
    """Field of a record that names its subset, dotted where nested; a record without it belongs to subset `-`."""
    max_sequences: int | None = None
    """Stop preparing after this many training sequences (a hub corpus is streamed only so far). Default: all."""
    max_eval_sequences: int | None = None
    """The same for the held-out sequences. Default: all."""
    max_bad_fraction: float = 0.001
    """Refuse the files when a larger fraction of their records is malformed, undecodable, empty or without text.
    Fewer are left out, counted, and reported with file and line."""


@dataclass(frozen=True)
class SketchConfig:
    inputs: int = 512
    """K, numbers that every token's layer inputs are hashed to."""
    gradients: int = 2048
    """G, numbers that every token's logit gradient is hashed to."""


@dataclass(frozen=True)
class InfluenceConfig:
    estimator: Literal["none", "random", "loss", "lli", "lai", "residual", "ghost", "ip"] = "lai"
    """How a unit is scored; positive helps. lai: all layers' inputs with the logit gradient (Eq. 4 of arXiv
    2510.16007); lli: the LM head's input only; loss: minus the mean loss; random: a seeded random number; none:
    nothing is scored and the policy does nothing."""
    reference: Literal["batch", "running", "validation"] = "batch"
    """Whose loss counts. batch: the global micro-batch itself (self-influence)."""
    include_self: bool = True
    """Whether a unit's own term, always positive, is part of its score (the paper: yes)."""
    unit: Literal["sequence", "document"] = "sequence"
    """What is scored and dropped: a packed sequence, or each document's tokens inside it. Takes 4 K G bytes a unit."""
    sketch: Literal["none"] | SketchConfig = SketchConfig()
    """Widths of the sketch, or `none`: exact, for small models (one matrix of all input widths x vocabulary a unit)."""
    precondition: Literal["none", "adam_ema", "adam_state"] = "none"
    """adam_ema: scale every logit gradient by D^-adam_power, D a running mean of its squares (Appendix E)."""
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


FIDELITY_ESTIMATORS = (
    "lli",
    "lli/adam_ema",
    "lai",
    "lai/adam_ema",
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
    """Also without the sketch: one matrix of all input widths x vocabulary a sequence. False for large models."""
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


_NOT_BUILT = {
    "influence.estimator": ("residual", "ghost", "ip"),
    "influence.reference": ("running", "validation"),
    "influence.precondition": ("adam_state",),
    "influence.passes": ("score_first",),
}


def _check(config: Config) -> None:
    """Refuse what cannot work, naming the key, what was found and what to do."""
    for key, values in _NOT_BUILT.items():
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        if value in values:
            raise ValueError(f"{key}: '{value}' is not built yet; choose another value (--help lists them)")
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
    }
    if isinstance(influence.sketch, SketchConfig):
        at_least_one |= {
            "influence.sketch.inputs": influence.sketch.inputs,
            "influence.sketch.gradients": influence.sketch.gradients,
        }
    for key, number in at_least_one.items():
        if number is not None and number < 1:
            raise ValueError(f"{key} is too small ({number}): sequences need two tokens, everything else at least 1")
    if config.seed < 0:
        raise ValueError(f"seed must be 0 or more, not {config.seed}")
    for key, fraction in {
        "policy.rate": policy.rate,
        "policy.max_drop_fraction": policy.max_drop_fraction,
        "data.max_bad_fraction": config.data.max_bad_fraction,
    }.items():
        if not 0 <= fraction <= 1:
            raise ValueError(f"{key} is a fraction from 0 to 1, not {fraction}")
    if not 0 <= influence.adam_decay < 1:
        raise ValueError(f"influence.adam_decay must lie in [0, 1), not {influence.adam_decay}")
    if influence.precondition != "none" and influence.estimator not in ("lai", "lli"):
        raise ValueError(
            f"influence.precondition '{influence.precondition}' scales logit gradients, which estimator "
            f"'{influence.estimator}' does not use; set it to none, or choose estimator lai or lli"
        )
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
    if Path(config.data.prepared_dir).resolve().is_relative_to(Path(config.run_dir).resolve()):
        raise ValueError(f"data.prepared_dir must lie outside run_dir ({config.run_dir}), which a new run moves aside")
    if config.observe.eval_every_steps and config.data.eval_files is None:
        raise ValueError("observe.eval_every_steps needs data.eval_files, which is not set")
    _check_fidelity(config.fidelity)
    read_deepspeed_config(config)


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
