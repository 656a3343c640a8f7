"""The keys of pipeline.fidelity, beside the run's."""

from dataclasses import dataclass, field

from pipeline.config.rules import at_least_one, not_negative, of_causal_lm_alone
from pipeline.config.schema import Config

LOOKAHEAD = "lookahead"
ESTIMATORS = (
    "lai",
    "lai/adam_ema",
    "lai/adam_state",
    "lli",
    "lli/adam_ema",
    "lli/adam_state",
    "residual",
    "residual/adam_state",
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
    LOOKAHEAD,
)

FLATTENED = ("ghost_flattened", "lai_flattened")
"""Sequences as single vectors, as the authors' public code computes them: for comparison, not among the defaults."""
_APART = (*FLATTENED, *(name for name in ESTIMATORS if name.startswith("residual_last")))
DEFAULT = tuple(name for name in ESTIMATORS if name not in (*_APART, LOOKAHEAD))
ON_TARGET = tuple(name for name in ESTIMATORS if name not in (*_APART, "ip", "logit_gradient_norm"))
"""What can be scored against a validation set."""
EXACT = "exact"
REFERENCES = (EXACT, "ip", "ip_adam", "shapley_sgd", "shapley_adam", "shapley_adam_limit")


@dataclass(frozen=True)
class FidelityConfig:
    batches: int = 4
    """Batches per checkpoint, the same at each: what the run would have read next."""
    batch_size: int = 16
    """Sequences in a batch. The references keep that many gradients, 8 bytes a parameter each."""
    references: list[str] = field(default_factory=lambda: ["ip", "ip_adam"])
    """What scores are held against; the first is the figure's. ip: inner products of true gradients; ip_adam: the same
    in the geometry of Adam's second moments; shapley_sgd, shapley_adam: Shapley values of one optimizer step;
    shapley_adam_limit: of Adam's step at a vanishing learning rate, which needs no forwards; exact: sketched scores
    against the same estimator's exact ones."""
    shapley_batches: int = 1
    """How many of the batches get shapley_sgd and shapley_adam, which take most of the time."""
    permutations: int = 1000
    """Most orders of joining that Shapley values are estimated from."""
    standard_error: float = 0.02
    """Stop before, once the largest standard error of a value is this fraction of the deviation between samples."""
    target_sequences: int | None = None
    """Measure scores against a validation set: what every sample does to the loss of so many sequences of
    `data.reference_files`, instead of its own batch's. Default: its own batch's."""
    estimators: list[str] | None = None
    """Estimators, `/` and a preconditioning where there is one. For comparison only: ip, the true
    inner product; residual_last_1 and _2, exact feedback through that many last blocks and, for the word embedding, the
    first; ghost_flattened and lai_flattened, whose sequences are single vectors of tokens x features;
    logit_gradient_norm. lookahead wants `target_sequences`, with which there are no such. Default: all of them but
    residual_last and the flattened."""
    exact: bool = True
    """Also without the sketch: for lai one matrix of all input widths x vocabulary a sequence; not for large models."""
    checkpoints: list[str] | None = None
    """Names (`step-100`) of the run's checkpoints, or `start` for `model.name_or_path`. Default: all there are, or
    `start` where there are none."""

    def __post_init__(self) -> None:
        at_least_one(
            {
                "fidelity.batches": self.batches,
                "fidelity.batch_size": self.batch_size - 2,  # correlations need three
                "fidelity.shapley_batches": self.shapley_batches,
                "fidelity.permutations": self.permutations,
            }
        )
        not_negative({"fidelity.standard_error": self.standard_error})
        at_least_one({"fidelity.target_sequences": self.target_sequences})
        for name, values, known in (
            ("estimators", self.measured, ESTIMATORS),
            ("references", self.references, REFERENCES),
        ):
            if unknown := [value for value in values if value not in known]:
                raise ValueError(f"fidelity.{name}: '{unknown[0]}' is none of {', '.join(known)}")
            if not values:
                raise ValueError(f"fidelity.{name} is empty; name at least one of {', '.join(known)}")
        if self.target_sequences is None and LOOKAHEAD in self.measured:
            raise ValueError(
                f"fidelity.estimators: '{LOOKAHEAD}' scores against a validation set: set "
                "fidelity.target_sequences, and data.reference_files"
            )
        if self.target_sequences and (others := [name for name in self.measured if name not in ON_TARGET]):
            raise ValueError(
                f"fidelity.estimators: '{others[0]}' is not measured against fidelity.target_sequences; leave it "
                f"out, or choose among {', '.join(ON_TARGET)}"
            )
        if EXACT in self.references and not self.exact:
            raise ValueError(
                f"fidelity.references: '{EXACT}' holds sketches against exact scores: set fidelity.exact to true"
            )

    @property
    def measured(self) -> list[str]:
        """The estimators, by name."""
        if self.estimators is not None:
            return self.estimators
        return list(DEFAULT if self.target_sequences is None else ON_TARGET)

    @property
    def own_terms(self) -> tuple[bool, ...]:
        """Whether self-influence is in; a target has none of a sample's own."""
        return (True, False) if self.target_sequences is None else (True,)


@dataclass(frozen=True)
class FidelityRun(Config):
    """A run, and how its scores are measured."""

    fidelity: FidelityConfig = field(default_factory=FidelityConfig)
    """How `pipeline.fidelity` holds scores against what samples really do."""

    def __post_init__(self) -> None:
        super().__post_init__()
        of_causal_lm_alone(self.task.kind, "pipeline.fidelity")
        if self.fidelity.target_sequences and self.data.reference_files is None:
            raise ValueError(
                "fidelity.target_sequences needs data.reference_files, which is not set; set it, or leave the other out"
            )
