"""Keys of the run config that say what is read, and what is learnt from it."""

import math
from dataclasses import dataclass
from typing import Literal

from pipeline.config.paths import expand
from pipeline.config.rules import at_least_one, decays, fractions, not_negative, positive

BUILTIN = "builtin"
"""Of `data.train_files`: the text that every Python installation carries."""


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
