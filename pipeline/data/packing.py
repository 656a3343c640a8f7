"""Documents -> packed rows: one after the other, cut where a row is full."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from pipeline.config.schema import Config
from pipeline.data.corpus import Problems, read_documents
from pipeline.data.document import Document, Encoded, Problem, Split
from pipeline.data.fingerprint import preparation_seed
from pipeline.data.frame import frame_of
from pipeline.data.planted import Planter
from pipeline.data.tokenizer import encode

BATCH_DOCUMENTS = 1_000


BATCH_CHARACTERS = 8_000_000  # the tokenizer takes some 140 bytes a character (and a longer document all of it)


class Packed:
    """Documents in their frames, one after the other, in rows of `data.sequence_length` tokens, some of which
    `data.planted_noise` replaces in the training split."""

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase, split: Split) -> None:
        data = config.data
        self._tokenizer, self._frame, self._length = tokenizer, frame_of(tokenizer, data), data.sequence_length
        self._planter = None
        if split == "train" and data.planted_noise:
            foreign = None if data.planted_foreign_files is None else _foreign_tokens(config, tokenizer)
            self._planter = Planter(data.planted_noise, preparation_seed(config), len(tokenizer), foreign)
        self.columns: list[tuple[str, pa.DataType]] = []
        self.sources: list[tuple[str, pa.DataType]] = []

    def read(self, found: Iterable[Document | Problem]) -> Iterable[Document | Problem]:
        return found

    def encode(self, documents: list[Document]) -> list[Encoded]:
        found = encode(self._tokenizer, [document.text for document in documents], self._frame)
        return [Encoded(ids, document.subset) for document, ids in zip(documents, found, strict=True)]

    def size(self, encoded: Encoded) -> int:
        """What it takes of the room for tokens."""
        return len(encoded.ids)

    def rows(self, batches: Iterable[list[Encoded]], schema: pa.Schema, first: int) -> Iterator[pa.RecordBatch]:
        """Numbered from `first` on."""
        for rows in _pack(batches, self._length, self._frame.padding, schema, first):
            yield self._planter(rows) if self._planter else rows

    def report(self, documents: int) -> dict[str, Any]:
        planted = {"planted": dict(self._planter.counts)} if self._planter else {}
        return {"frame": self._frame.tokens * documents, **planted}


def _foreign_tokens(config: Config, tokenizer: PreTrainedTokenizerBase) -> Iterator[np.ndarray]:
    """The tokens of the documents of `data.planted_foreign_files`, again and again. Raises ValueError where there are
    none."""
    files, frame = config.data.planted_foreign_files or [], frame_of(tokenizer, config.data)
    while True:
        problems = Problems(config.data.max_bad_fraction, "data.planted_foreign_files")
        batch: list[Document] = []
        for batch in batches_of(problems.leave_out(read_documents(files, config.data, "train"))):
            yield from encode(tokenizer, [document.text for document in batch], frame)
        problems.check(problems.limit)
        if not batch:
            raise ValueError(f"data.planted_foreign_files: no document in {files}")


def batches_of(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if len(batch) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _pack(
    batches: Iterable[list[Encoded]], length: int, padding_id: int, schema: pa.Schema, first: int = 0
) -> Iterator[pa.RecordBatch]:
    """Rows of `length` tokens from documents one after the other, numbered from `first` on; only the last row is
    padded."""
    tokens, owners = np.empty(0, np.int32), np.empty(0, np.int64)
    names: list[str] = []  # subsets of the documents from `first` on, the owner of the first token left over

    def rows() -> pa.RecordBatch:
        ends = zip(owners[:whole:length] - first, owners[:whole].reshape(-1, length).max(1) - first, strict=True)
        columns = [pa.FixedSizeListArray.from_arrays(pa.array(flat[:whole]), length) for flat in (tokens, owners)]
        return pa.record_batch([*columns, pa.array([names[a : b + 1] for a, b in ends], schema.types[2])], schema)

    for batch in batches:
        new = first + len(names) + np.arange(len(batch))
        tokens = np.concatenate([tokens, *(encoded.ids for encoded in batch)])
        owners = np.concatenate([owners, np.repeat(new, [len(encoded.ids) for encoded in batch])])
        names += [encoded.subset for encoded in batch]
        whole = len(tokens) // length * length
        yield rows()
        tokens, owners = tokens[whole:], owners[whole:]
        done = owners[0] - first if len(owners) else len(names)
        names, first = names[done:], first + done
    if len(tokens):
        whole = length
        padding = length - len(tokens)
        tokens = np.concatenate([tokens, np.full(padding, padding_id, np.int32)])
        owners = np.concatenate([owners, np.full(padding, -1)])
        yield rows()
