"""The run config: one typed, frozen tree, read from YAML plus dotted overrides, checked before any process group.

Batch sizes, accumulation, precision, optimizer and ZeRO live in the DeepSpeed JSON only and are never repeated here.
"""

from dataclasses import dataclass
from pathlib import Path

from pipeline.config.paths import expand
from pipeline.config.rules import at_least_one, fractions, not_negative, positive
from pipeline.config.schema_data import DataConfig, TaskConfig
from pipeline.config.schema_influence import InfluenceConfig, PolicyConfig

TRAIN_TOKENIZER = "train"
"""Of `model.tokenizer`."""


@dataclass(frozen=True)
class ModelConfig:
    name_or_path: str
    """The causal LM: a hub id, a local directory or a GGUF file (`*.gguf`) to continue from, or a model config
    (`*.json`) to start from scratch."""
    tokenizer: str | None = None
    """Hub id or local directory of the tokenizer; `train` trains a byte-level BPE of the model's vocabulary size on
    the training files. Default: the one that belongs to `name_or_path`."""
    trainable: str | list[str] | None = None
    """Which parameters are trained: a pattern or several of their names, `*` for any characters (`*.layers.3.*`,
    `*norm*`). All others are frozen: they get no gradient and are in no score. Default: all are trained."""
    peft: str | None = None
    """A config of the peft library (`adapter_config.json`, or a directory with one): its adapters are added and
    trained, and all else is frozen. Adapter weights in the directory are gone on from. RUN_DIR/model then holds the
    adapter. Default: none."""
    attn_implementation: str | None = None
    """How attention is computed: eager, sdpa, flash_attention_2 or another of transformers' names. Default: the best
    that transformers finds for the model."""
    dropout: float | None = None
    """Every dropout rate of the model, 0 to 1; 0 for scores, and a loss, without noise. Default: the model's own."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward instead of keeping them."""
    allow_missing: bool = False
    """Train although weights of the model are missing among the files (they are then random), or files hold weights
    that the model has no place for. Default: refuse, and name them."""

    def __post_init__(self) -> None:
        expand(self, "name_or_path", "tokenizer", "peft")
        if self.dropout is not None:
            fractions({"model.dropout": self.dropout})
        if self.peft is not None and self.trainable is not None:
            raise ValueError(
                "model.peft says what is trained, its adapters (and its config's modules_to_save): leave out "
                "model.trainable"
            )


@dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int = 500
    """Optimizer steps between checkpoints; one is always written at the end."""
    every_minutes: float | None = None
    """Also when so many minutes have passed since the last one, by rank 0's clock, at the end of a step. Default: by
    steps alone."""
    keep: int = 2
    """How many of the newest checkpoints stay on disk."""
    best_of: str | None = None
    """Also keep the best: of `all` held-out text, or of a subset of it. An evaluation (`observe.eval_every_steps`, and
    at the end) with the lowest loss so far, which is also the fewest bits per byte, writes a checkpoint, whatever
    `every_steps`. The best one stays beside the `keep` newest, so there are `keep` + 1 at most; `checkpoints/best`
    names it. A resume goes on from the newest as ever, and RUN_DIR/model is the last model. Default: none."""

    def __post_init__(self) -> None:
        at_least_one({"checkpoint.every_steps": self.every_steps, "checkpoint.keep": self.keep})
        positive({"checkpoint.every_minutes": self.every_minutes})


@dataclass(frozen=True)
class ObserveConfig:
    log_texts: bool = True
    """Put a few removed texts into TensorBoard; set false where the corpus is private."""
    every_steps: int = 10
    """Optimizer steps between histograms, activation norms and texts in TensorBoard (scalars come at every step)."""
    eval_every_steps: int | None = None
    """Optimizer steps between held-out evaluations. Default: only before and after the run."""
    compare_with: str | None = None
    """Directory of a finished run whose held-out figures this run's are held against at the end: one with
    `influence.estimator: none` shows what removing changed. Default: none."""
    audit_every_steps: int | None = None
    """Optimizer steps between audits: one more forward after the step, for the correlation of the scores with how much
    each unit's loss really fell (`influence/audit_pearson`). Default: never."""

    def __post_init__(self) -> None:
        names = ("every_steps", "eval_every_steps", "audit_every_steps")
        at_least_one({f"observe.{name}": getattr(self, name) for name in names})
        expand(self, "compare_with")


@dataclass(frozen=True)
class Config:
    """The run"""

    run_dir: str
    """Where the run lives: config.yaml (one of every start, too), checkpoints/, ledger/, tensorboard/, model/,
    summary.json, and mixture.jsonl where weights of sources move. pipeline.train, prepare and evaluate choose this,
    `deepspeed_config` and `data.prepared_dir` themselves where a model is named and these are not, and say so."""
    deepspeed_config: str
    """DeepSpeed's own JSON: batch sizes, accumulation, precision, optimizer, scheduler (its total_num_steps may say
    "auto": max_steps), clipping, ZeRO."""
    model: ModelConfig
    """The model and its tokenizer."""
    data: DataConfig
    """The corpus."""
    task: TaskConfig = TaskConfig()
    """What is learnt from it."""
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

    def __post_init__(self) -> None:
        expand(self, "run_dir", "deepspeed_config", "resume")
        at_least_one({"max_steps": self.max_steps})
        not_negative({"seed": self.seed})
        if self.influence.reference == "validation" and self.data.reference_files is None:
            raise ValueError(
                "influence.reference 'validation' needs data.reference_files, which is not set; set it, or choose batch"
            )
        if self.task.classifies:
            self._check_classification()
        if self.observe.eval_every_steps and not self.data.holds_out:
            raise ValueError(
                "observe.eval_every_steps needs data.eval_files or data.eval_fraction, and neither is set; set one, or "
                "leave the other out"
            )
        if self.observe.compare_with and not self.data.holds_out:
            raise ValueError(
                "observe.compare_with compares held-out figures, and neither data.eval_files nor data.eval_fraction is "
                "set; set one, or leave the other out"
            )
        if self.checkpoint.best_of and not self.observe.eval_every_steps:
            raise ValueError(
                "checkpoint.best_of needs observe.eval_every_steps, or there is nothing to choose from; set it, or "
                "leave the other out"
            )
        if self.policy.rule == "mixture":
            if self.data.mixture is None:
                raise ValueError(
                    "policy.rule 'mixture' needs data.mixture, which is not set; set it, or choose another rule"
                )
            if limited := [name for name, source in self.data.mixture.items() if source.epochs is not None]:
                raise ValueError(
                    "policy.rule 'mixture' cannot tell in advance when a source ends: leave out "
                    f"data.mixture.{limited[0]}.epochs, or choose another rule"
                )
        run_dir, prepared_dir = Path(self.run_dir).resolve(), Path(self.data.prepared_dir).resolve()
        if prepared_dir.is_relative_to(run_dir):
            raise ValueError(
                f"data.prepared_dir must lie outside run_dir ({self.run_dir}), which a new run moves aside"
            )
        if run_dir.is_relative_to(prepared_dir):
            raise ValueError(
                f"run_dir must lie outside data.prepared_dir ({self.data.prepared_dir}), which a new preparation "
                "replaces"
            )

    def _check_classification(self) -> None:
        """What only packed text has."""
        data, influence = self.data, self.influence
        for key, is_set in {
            "data.bos": data.bos is not None,
            "data.eos": data.eos is not None,
            "data.planted_noise": data.planted_noise > 0,
            "influence.score_prefix": influence.score_prefix < 1,
            f"influence.unit {influence.unit}": influence.unit != "sequence",
        }.items():
            if is_set:
                raise ValueError(f"{key} is for packed text, and task.kind is 'sequence_classification': leave it out")
