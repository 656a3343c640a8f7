"""The run config: one typed, frozen tree, read from YAML plus dotted overrides, checked before any process group.

Batch sizes, accumulation, precision, optimizer and ZeRO live in the DeepSpeed JSON only and are never repeated here.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.config.paths import expand
from pipeline.config.rules import at_least_one, decays, fractions, not_negative, positive

TRAIN_TOKENIZER = "train"
BUILTIN = "builtin"


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
class SourceConfig:
    files: str | list[str]
    """What the source is: in the forms of `data.train_files`."""
    weight: float | None = None
    """Its share of the sequences that are read, and so of their tokens: any positive number, over the sum of all
    sources' (to a millionth). Default, for all sources together only: by their sizes."""
    epochs: float | None = None
    """How often it may be read at most, fractions too; then the others share its part. Default: no limit."""

    def __post_init__(self) -> None:
        expand(self, "files")


@dataclass(frozen=True)
class DataConfig:
    prepared_dir: str
    """Directory of the tokenized, packed, memory-mapped dataset; made by `pipeline.prepare` where it is missing."""
    train_files: str | list[str] | None = None
    """What to train on: paths or globs (`.jsonl`, `.jsonl.gz`, `.jsonl.zst`, `.txt`, `.parquet`), a hub id
    (`owner/name`, `owner/name:split` or `owner/name:config:split`, default split train, with `@revision` behind to pin
    it), or `builtin`: the text that every Python installation
    carries. Default: `builtin`, without `mixture`."""
    mixture: dict[str, SourceConfig] | None = None
    """Named sources in place of `train_files`, each with `files`, `weight` and `epochs`. Rows are packed of one source
    each; weights and epochs can change without preparing anew, but not in a run. Default: none."""
    eval_files: str | list[str] | None = None
    """Held-out documents, in the same forms; `builtin` holds out a twentieth of its documents. Default: none."""
    eval_fraction: float | None = None
    """Hold out this fraction of the training documents instead, above 0 and below 1. A hash of its text decides on a
    document, so copies of a text are all held out or all trained on, whatever the order of the files, the seed or the
    mixture. All files are read for it, unless `max_eval_sequences` is found before. Default: none."""
    reference_files: str | list[str] | None = None
    """Documents whose loss counts with `influence.reference: validation`, in the same forms. Others than `eval_files`,
    or these no longer tell what was gained. Default: none."""
    leave_out: str | list[int] | None = None
    """Training documents whose tokens are neither read nor learned, by their id in the prepared dataset, as the ledger
    names them: a list, or a file of ids apart by spaces, commas or lines. Nothing is prepared anew. Default: none."""
    sequence_length: int = 1024
    """Tokens per packed sequence."""
    text_field: str = "text"
    """Field of a record that holds its text, dotted where nested."""
    subset_field: str = "meta.pile_set_name"
    """Field of a record that names its subset, dotted where nested; a record without it belongs to subset `-`."""
    max_sequences: int | None = None
    """Stop preparing after this many training sequences (a hub corpus is streamed only so far); with `mixture`, of
    each source. Default: all."""
    max_eval_sequences: int | None = None
    """The same for the held-out sequences, and for those of `reference_files`; with `eval_fraction` of a `mixture`, of
    each source. Default: all."""
    max_bad_fraction: float = 0.001
    """Refuse the files when a larger fraction of their records is malformed, undecodable, empty or without text.
    Fewer are left out, counted, and reported with file and line. A file that is cut, was never fetched, or gives no
    document at all is refused whatever this says."""
    allow_overlap: bool = False
    """Let two of train_files, eval_files and reference_files read one file. Default: refuse."""
    bos: bool | None = None
    """Whether every document begins with the tokenizer's bos token. Default: as the tokenizer itself does."""
    eos: bool | None = None
    """Whether every document ends with the tokenizer's eos token. Default: as the tokenizer itself does; also where it
    adds neither bos nor eos, for something has to divide documents."""
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

    def __post_init__(self) -> None:
        if self.mixture is not None:
            self._check_mixture(self.mixture)
        elif self.train_files is None:
            object.__setattr__(self, "train_files", BUILTIN)
        expand(self, "prepared_dir", "train_files", "eval_files", "reference_files", "planted_foreign_files")
        at_least_one({"data.sequence_length": self.sequence_length}, least=2)  # the first token predicts the second
        at_least_one({f"data.{name}": getattr(self, name) for name in ("max_sequences", "max_eval_sequences")})
        fractions({"data.max_bad_fraction": self.max_bad_fraction, "data.planted_noise": self.planted_noise})
        not_negative({"data.seed": self.seed})
        if self.eval_fraction is not None:
            positive({"data.eval_fraction": self.eval_fraction})
            decays({"data.eval_fraction": self.eval_fraction})
            if self.eval_files is not None:
                raise ValueError(
                    "data.eval_files and data.eval_fraction both say what is held out: leave one of them out"
                )
        if self.planted_foreign_files is not None and not self.planted_noise:
            raise ValueError("data.planted_foreign_files is for planted noise: set data.planted_noise, or leave it out")
        if self.reference_files == BUILTIN or BUILTIN in [*(self.reference_files or ())]:
            raise ValueError(f"data.reference_files: '{BUILTIN}' holds out nothing for it; give files or a hub id")

    def _check_mixture(self, mixture: dict[str, SourceConfig]) -> None:
        if self.train_files is not None:
            raise ValueError("data.train_files and data.mixture both say what to train on: leave one of them out")
        if not mixture:
            raise ValueError("data.mixture names no source: name one or more, each with its files, or leave it out")
        for name, source in mixture.items():
            for key, number in (("weight", source.weight), ("epochs", source.epochs)):
                if number is not None and not 0 < number < math.inf:
                    raise ValueError(
                        f"data.mixture.{name}.{key} must be a number above 0, not {number}; or leave it out"
                    )
        with_weight = [name for name, source in mixture.items() if source.weight is not None]
        if with_weight and (without := sorted(mixture.keys() - with_weight)):
            raise ValueError(
                f"data.mixture: {with_weight[0]} has a weight and {without[0]} has none: give every source one, or none"
            )

    @property
    def train_sources(self) -> dict[str, str | list[str]]:
        """The keys that say what to train on, and the files of each: `train_files`, or those of `mixture` by name."""
        if self.mixture is None:
            assert self.train_files is not None
            return {"train_files": self.train_files}
        return {f"mixture.{name}.files": source.files for name, source in sorted(self.mixture.items())}

    @property
    def holds_out(self) -> bool:
        """Whether there is held-out text to evaluate on."""
        return self.eval_files is not None or self.eval_fraction is not None

    @property
    def raw_files(self) -> dict[str, str | list[str] | None]:
        """All keys that name raw files, and what each names."""
        others = ("eval_files", "reference_files", "planted_foreign_files")
        return {**self.train_sources, **{key: getattr(self, key) for key in others}}


@dataclass(frozen=True)
class TaskConfig:
    kind: Literal["causal_lm", "sequence_classification"] = "causal_lm"
    """What is learnt. causal_lm: every next token of packed text. sequence_classification: the label of each text, with
    the model's classification head, new where the weights have none; one text a row, cut at `data.sequence_length`,
    framed as its tokenizer does, padded to the longest of a micro-batch."""
    label_field: str = "label"
    """sequence_classification: field of a record that holds its label, a string or an integer, dotted where nested."""
    pair_field: str | None = None
    """sequence_classification: field that holds a second text of the record, for tasks on pairs. Default: none."""
    label_noise: float = 0.0
    """sequence_classification: fraction of the training labels replaced by another one, any as likely, while preparing
    (an experiment: never for real training). Their subset is `planted/label`; both labels are in the prepared dataset's
    documents/train.parquet."""
    true_label_field: str | None = None
    """sequence_classification: field with the true label, where a set has that beside a noisy one, in place of
    `label_noise`. Training texts learn the noisy one, and are on record in the same way where the two differ; held-out
    texts count with the true one. Default: none."""

    @property
    def classifies(self) -> bool:
        return self.kind == "sequence_classification"

    def __post_init__(self) -> None:
        fractions({"task.label_noise": self.label_noise})
        if self.label_noise and self.true_label_field:
            raise ValueError(
                "task.label_noise and task.true_label_field both say which labels are wrong: leave one of them out"
            )
        for key in ("label_noise", "pair_field", "true_label_field"):
            if getattr(self, key) and not self.classifies:
                raise ValueError(f"task.{key} is for task.kind 'sequence_classification': set that, or leave it out")


@dataclass(frozen=True)
class SketchConfig:
    input_width: int = 512
    """K, numbers that every token's layer inputs are hashed to."""
    logit_width: int = 2048
    """G, numbers that every token's logit gradient is hashed to."""
    hidden_width: int = 128
    """ghost: numbers that every token's layer inputs, and output gradients but the logits', are hashed to; a gradient
    sketch then has hidden_width x G numbers. residual: of the gradient at the residual stream; hidden_width x (K + G).
    """

    def __post_init__(self) -> None:
        at_least_one({f"influence.sketch.{name}": width for name, width in vars(self).items()})


@dataclass(frozen=True)
class InfluenceConfig:
    estimator: str = "lai"
    """How a unit is scored; positive helps (pipeline/influence/README.md).
    lai: all layers' inputs with the logit gradient (Eq. 4 of arXiv 2510.16007); lli: the LM head's input only;
    residual: the head's with the logit gradient, the others' with that gradient brought back to the residual stream;
    ghost: the inner product of true gradients (Eq. 3), out of the training backward, what is dropped being taken out
    again by a pass over it alone; lookahead: how much a loss falls when the weights move a fraction of Adam's coming
    step along the reference's gradient; rho: the loss less that of `reference_model`; loss: minus the mean loss;
    ngram: how much more often its n-grams come in the reference than in the corpus; oracle: 1 in `oracle_subsets`,
    else 0; random: a seeded random number; none: nothing is scored and the policy does nothing."""
    reference: Literal["batch", "running", "validation"] = "batch"
    """Whose loss counts. batch: the global micro-batch itself (self-influence); running: an exponential mean over the
    micro-batches so far and this one; validation: `data.reference_files`."""
    running_decay: float = 0.9
    """running: weight of what was before, per micro-batch."""
    validation_sequences: int = 16
    """validation: size of the random subset that stands for the set, drawn anew at every refresh."""
    validation_every_steps: int = 1
    """validation: optimizer steps between refreshes, one more forward of the subset each (ghost, lookahead: and
    backward)."""
    reference_model: str | None = None
    """rho: hub id or local directory of a frozen model, trained on what shall be learnt, with the same tokenizer.
    `pipeline.train` on such files with `--influence.estimator none` makes one (RUN_DIR/model)."""
    oracle_subsets: str | list[str] | None = None
    """oracle: patterns of the subsets that are good, `*` for any characters: an arm that knows the answer, to compare
    with."""
    lookahead_step: float = 0.1
    """lookahead: how far the weights move, as a fraction of the optimizer's step at its rate."""
    score_prefix: float = 1.0
    """Score by this first fraction of a sequence only, where scoring is a pass of its own (`policy.rule: top`,
    `passes: score_first`)."""
    include_self: bool = True
    """Whether a unit's self-influence, always positive, is part of its score (the paper: yes)."""
    unit: Literal["sequence", "document", "token"] = "sequence"
    """What is scored and dropped: a packed sequence, or each document's tokens inside it, which takes 4 K G bytes a
    unit; or single tokens (estimators without a sketch), which takes 8 bytes a token on every rank. Of tokens the
    ledger keeps a row a sequence: their mean score, and as weight the share of them that is kept."""
    positions: Literal["sum", "mean", "first"] = "sum"
    """lai with `task.kind: sequence_classification`: what of a layer's inputs stands for a text. sum: over its unpadded
    positions, which is Eq. 4; mean: that over their number, so that long texts weigh no more; first: the first
    position's, an encoder's [CLS]. (A layer that reads one row a text has that.)"""
    sketch: Literal["none"] | SketchConfig = SketchConfig()
    """Widths of the sketch, or `none`: exact, for small models (one matrix of all input widths x vocabulary a unit)."""
    precondition: Literal["none", "adam_ema", "adam_state"] = "none"
    """adam_ema: scale every logit gradient by D^-adam_power, D a running mean of its squares (Appendix E). adam_state:
    scale inputs and gradients by the column and row means of Adam's own second moments, to its power on each side;
    ghost's self-influence saturates as Adam's step does."""
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
    check_model: bool = True
    """ghost: before the first step compare, weight by weight, the gradients it sees of two short sequences with
    autograd's, and refuse a model in which one is off by more than a thousandth. Takes seconds."""
    passes: Literal["one", "score_first"] = "one"
    """one: score inside the training forward. score_first: score in a forward without gradients, then train on what is
    kept only, shared out evenly among the ranks: faster where much is dropped (from about a third on)."""

    @property
    def widths(self) -> SketchConfig | None:
        """Of the sketch; None where it is exact."""
        return self.sketch if isinstance(self.sketch, SketchConfig) else None

    def __post_init__(self) -> None:
        names = ("validation_sequences", "validation_every_steps", "adam_every_steps")
        at_least_one({f"influence.{name}": getattr(self, name) for name in names})
        expand(self, "reference_model")
        decays({"influence.adam_decay": self.adam_decay, "influence.running_decay": self.running_decay})
        positive({"influence.lookahead_step": self.lookahead_step, "influence.score_prefix": self.score_prefix})
        fractions({"influence.score_prefix": self.score_prefix})
        if (self.estimator == "rho") != (self.reference_model is not None):
            raise ValueError(
                "influence.estimator 'rho' and influence.reference_model, the model that it compares with, go together"
            )
        if (self.estimator == "oracle") != (self.oracle_subsets is not None):
            raise ValueError(
                "influence.estimator 'oracle' and influence.oracle_subsets, the subsets that it takes for good, go "
                "together: set both or neither"
            )
        if self.estimator in ("lookahead", "ngram") and self.reference != "validation":
            raise ValueError(
                f"influence.estimator '{self.estimator}' scores by a reference alone: set influence.reference to "
                "validation, and data.reference_files"
            )


@dataclass(frozen=True)
class PolicyConfig:
    action: Literal["drop", "reweight", "observe"] = "drop"
    """drop: flagged units get weight zero; reweight: weight = positive part of the score, scaled to mean one over the
    global micro-batch; observe: score everything, change nothing."""
    rule: Literal["threshold", "rate", "top", "mixture"] = "threshold"
    """What is flagged. threshold: scores below `threshold` (the paper: 0); rate: the lowest `rate` of the global
    micro-batch, fractions by seeded stochastic rounding; top: all but the best 1/`pool` of the sequences that an
    optimizer step reads, `pool` times those that it trains on; mixture: nothing, the weights of `data.mixture` move
    between steps instead, towards the sources whose units help most."""
    mixture_rate: float = 0.01
    """mixture: how fast weights move: w_s <- w_s exp(mixture_rate (a_s - mean a) / spread of a) at every step, a_s
    being the mean score of a source's tokens, averaged over steps with decay 0.9 (exponentiated gradient, Kivinen &
    Warmuth 1997, as in arXiv 2305.10429, 2312.02406 and 2411.05735)."""
    mixture_floor: float = 0.1
    """mixture: no source's share falls below this fraction of what its weight in `data.mixture` gives it."""
    pool: int | None = None
    """top: candidates read for each sequence that is trained on. Micro-batch, accumulation and tokens of a step stay
    what the DeepSpeed JSON says; candidates are scored in a pass of their own, whatever `influence.passes`, together,
    whatever `influence.scope`, and each is read once."""
    temperature: float = 0.0
    """top: sample without replacement instead, by scores over this many of their own standard deviations in the pool
    (0: the best; large: any)."""
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
    normalize: Literal["kept", "all"] | None = None
    """What the sum of the kept tokens' losses is divided by. kept: their number, so every step is as large as any
    other; all: that of all labelled tokens of the global micro-batch, so dropping half also halves the gradient.
    Default: kept; of ghost all, which can do no other."""
    stop_after_non_finite: int = 20
    """Stop after so many optimizer steps in a row in which a unit's loss or score was not finite, or DeepSpeed skipped
    an update that was not. (Such units count for nothing; fp16 skips a few steps while it finds its scale.)"""

    def __post_init__(self) -> None:
        fractions({"policy.rate": self.rate, "policy.max_drop_fraction": self.max_drop_fraction})
        at_least_one({"policy.stop_after_non_finite": self.stop_after_non_finite})
        not_negative({"policy.warmup_steps": self.warmup_steps})
        if self.action == "drop" and self.rule == "rate" and self.rate > self.max_drop_fraction:
            raise ValueError(
                f"policy.rate {self.rate} is above policy.max_drop_fraction {self.max_drop_fraction}: lower the one "
                "or raise the other"
            )
        if (self.rule == "top") != (self.pool is not None):
            raise ValueError(
                "policy.rule 'top' and policy.pool, the candidates read for each sequence trained on, go together: set "
                "both or neither"
            )
        if self.pool is not None and self.pool < 2:
            raise ValueError(f"policy.pool {self.pool} leaves nothing to choose from: set it to 2 or more")
        not_negative({"policy.temperature": self.temperature})
        if self.temperature and self.rule != "top":
            raise ValueError("policy.temperature is for policy.rule 'top'; leave it out")
        if self.rule == "top" and self.action != "drop":
            raise ValueError(
                f"policy.rule 'top' trains on the best of what it reads, and policy.action '{self.action}' would train "
                "on all: set action to drop, or choose another rule"
            )
        positive({"policy.mixture_rate": self.mixture_rate})
        decays({"policy.mixture_floor": self.mixture_floor})
        if self.rule == "mixture" and (self.action != "drop" or self.flag != "lowest"):
            what = f"action '{self.action}'" if self.action != "drop" else f"flag '{self.flag}'"
            raise ValueError(
                "policy.rule 'mixture' moves the weights of sources and decides on no unit, so it goes with no "
                f"policy.{what}: leave that out, or choose another rule"
            )
        if self.flag == "highest" and self.action == "reweight":
            raise ValueError(
                "policy.flag 'highest' says what to drop; policy.action 'reweight' drops nothing: choose drop"
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
