"""Keys of the run config that say how units are scored, and what happens to them."""

from dataclasses import dataclass
from typing import Literal

from pipeline.config.paths import expand
from pipeline.config.rules import at_least_one, decays, fractions, not_negative, positive


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
