"""Labelled texts -> rows, one a text: for sequence classification."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from pipeline.config.answers import Answers
from pipeline.config.schema import Config
from pipeline.config.schema_data import TaskConfig
from pipeline.data.corpus import field_of
from pipeline.data.document import Document, Encoded, Problem
from pipeline.data.fingerprint import preparation_seed
from pipeline.data.frame import padding_of
from pipeline.data.held_out import digest
from pipeline.data.planted import PREFIX

FLIPPED = f"{PREFIX}label"
"""Subset of texts whose label was replaced."""


class Labelled:
    """Each text a row: its first `data.sequence_length` tokens, framed as its tokenizer does, and padding; its label.
    A text without a subset of its own has its label as one.

    `classes`: those that a replaced label is drawn from (`task.label_noise`); None where none is replaced.
    """

    def __init__(
        self, config: Config, tokenizer: PreTrainedTokenizerBase, train: bool, classes: Sequence[str] | None
    ) -> None:
        self._tokenizer, self._length, self._padding = tokenizer, config.data.sequence_length, padding_of(tokenizer)
        self._noise, self._seed = config.task.label_noise, preparation_seed(config)
        self._task, self._train, self._classes = config.task, train, classes
        self._pairs = config.task.pair_field is not None and "token_type_ids" in tokenizer.model_input_names
        self._counts: Counter[str] = Counter()
        self._labels: Counter[str] = Counter()
        types = [("token_type_ids", pa.list_(pa.int8(), self._length))] if self._pairs else []
        self.columns = [("label", pa.string()), *types]
        self.sources = [("label", pa.string()), ("true_label", pa.string()), ("cut", pa.bool_())]

    def read(self, found: Iterable[Document | Problem]) -> Iterator[Document | Problem]:
        return with_labels(found, self._task)

    def encode(self, documents: list[Document]) -> list[Encoded]:
        pairs = [document.record["pair"] for document in documents if document.record]
        batch = self._tokenizer(
            [document.text for document in documents],
            pairs if self._task.pair_field else None,
            truncation=True,
            max_length=self._length,
            split_special_tokens=True,  # a text that spells one gets none
            return_attention_mask=False,
            return_token_type_ids=self._pairs,
        )
        found = []
        for number, (document, ids) in enumerate(zip(documents, batch["input_ids"], strict=True)):
            assert document.record is not None
            true = document.record["true_label"]
            label = self._flipped(document.text, document.record["label"] if self._train else true)
            own = true if document.subset == "-" else document.subset
            row: dict[str, Any] = {"label": label}
            if self._pairs:
                types = batch["token_type_ids"][number]
                row["token_type_ids"] = types + [0] * (self._length - len(types))
            subset = own if label == true else FLIPPED
            cut = bool(batch[number].overflowing) if batch.encodings else len(ids) == self._length
            found.append(
                Encoded(np.array(ids, np.int32), subset, row, {"label": label, "true_label": true, "cut": cut})
            )
        return found

    def size(self, encoded: Encoded) -> int:
        """What it takes of the room for tokens: a whole row."""
        return self._length

    def rows(self, batches: Iterable[list[Encoded]], schema: pa.Schema, first: int) -> Iterator[pa.RecordBatch]:
        """Numbered from `first` on."""
        for batch in batches:
            for encoded in batch:
                source = encoded.source
                self._counts.update(cut=source["cut"], flipped=source["label"] != source["true_label"])
                self._labels[source["label"]] += 1
            ids = np.full((len(batch), self._length), self._padding, np.int32)
            owners = np.full((len(batch), self._length), -1, np.int64)
            for row, encoded in enumerate(batch):
                ids[row, : len(encoded.ids)] = encoded.ids
                owners[row, : len(encoded.ids)] = first + row
            first += len(batch)
            columns: list[Any] = [
                pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), self._length) for flat in (ids, owners)
            ]
            columns.append(pa.array([[encoded.subset] for encoded in batch], pa.list_(pa.string())))
            columns += [pa.array([encoded.row[name] for encoded in batch], kind) for name, kind in self.columns]
            yield pa.record_batch(columns, schema)

    def report(self, documents: int) -> dict[str, Any]:
        flipped = self._counts["flipped"]
        return {
            "frame": 0,
            "cut": self._counts["cut"],
            "labels": {label: self._labels[label] for label in ordered(self._labels)},
            "answers": Answers(ordered(self._labels), self._padding)._asdict(),
            **({"planted": {"label": flipped}} if flipped else {}),
        }

    def _flipped(self, text: str, label: str) -> str:
        """The label that a text is given: a function of the seed and the text alone."""
        if not self._classes:
            return label
        generator = np.random.default_rng([self._seed, int.from_bytes(digest(text)[:8], "big")])
        if generator.random() >= self._noise:
            return label
        others = [other for other in self._classes if other != label]
        return others[generator.integers(len(others))]


def with_labels(found: Iterable[Document | Problem], task: TaskConfig) -> Iterator[Document | Problem]:
    """Documents with whole records -> with a record of `label`, `true_label` and `pair` alone, or a problem where they
    have none."""
    true_field = task.true_label_field or task.label_field
    for document in found:
        if isinstance(document, Problem):
            yield document
            continue
        label, true = (field_of(document.record, name) for name in (task.label_field, true_field))
        pair = field_of(document.record, task.pair_field) if task.pair_field else "-"
        what = _trouble(label, task.label_field) or _trouble(true, true_field)
        if not what and (not isinstance(pair, str) or not pair.strip()):
            what = f"no text in the field `{task.pair_field}`"
        if what:
            yield Problem(document.file, document.line, what)
        else:
            record = {"label": str(label), "true_label": str(true), "pair": pair}
            yield Document(document.text, document.subset, document.file, document.line, record)


def _trouble(label: object, name: str) -> str | None:
    if label in (None, ""):
        return f"no label field `{name}`"
    if isinstance(label, bool) or not isinstance(label, str | int):
        return f"label field `{name}` is neither a string nor an integer"
    return None


def ordered(labels: Iterable[str]) -> list[str]:
    """Labels in the order of their logits: by number where all are numbers, else by name."""
    found = set(labels)
    numbers = all(label.removeprefix("-").isdigit() for label in found)
    return sorted(found, key=lambda label: (int(label) if numbers else 0, label))
