"""Documents -> rows of a split: tokenized, packed, written, counted. Bounded memory."""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import count, pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from pipeline.config.schema import BUILTIN, Config
from pipeline.data.corpus import Problems, read_documents, resolve
from pipeline.data.document import Document, Problem, Split
from pipeline.data.fingerprint import preparation_seed
from pipeline.data.frame import frame_of
from pipeline.data.held_out import part_of
from pipeline.data.overlap import Texts
from pipeline.data.planted import Planter
from pipeline.data.tokenizer import encode

SPLITS = get_args(Split)


BATCH_DOCUMENTS = 1_000


BATCH_CHARACTERS = 8_000_000  # the tokenizer takes some 140 bytes a character (and a longer document all of it)


SOURCES = pa.schema(
    [("document_id", pa.int64()), ("file", pa.string()), ("line", pa.int64()), ("subset", pa.string()),
     ("tokens", pa.int64()), ("bytes", pa.int64())]
)  # fmt: skip


# The rows


def _write_split(
    config: Config,
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    texts: Texts | None = None,
    first_document: int = 0,
) -> dict[str, Any]:
    """Write the rows and the sources of a split under `directory`; returns its part of the report. `texts` is shown
    every document; documents of the training files are numbered from `first_document` on."""
    data, frame = config.data, frame_of(tokenizer, config.data)
    most = data.max_sequences if split == "train" else data.max_eval_sequences
    key = f"{split}_files"
    carved = split == "eval" and data.eval_fraction is not None
    sources = data.train_sources if split == "train" or carved else {key: data.raw_files[key] or []}
    subsets: dict[str, Counter[str]] = {}
    planter = None
    if split == "train" and data.planted_noise:
        foreign = None if data.planted_foreign_files is None else _foreign_tokens(config, tokenizer)
        planter = Planter(data.planted_noise, preparation_seed(config), len(tokenizer), foreign)
    (directory / "documents").mkdir(exist_ok=True)
    document_id, batches = first_document if split == "train" or carved else 0, count()

    def encoded(problems: Problems, documents: Iterable[Document]) -> Iterator[list[tuple[str, np.ndarray]]]:
        """Batches of (subset, tokens of a document), shuffled inside the batch, counted, their places written."""
        nonlocal document_id
        room = None if most is None else most * data.sequence_length  # tokens that still fit
        for batch in _batches(documents):
            order = np.random.default_rng([preparation_seed(config), SPLITS.index(split), next(batches)])
            batch = [batch[index] for index in order.permutation(len(batch))]
            taken: list[tuple[str, np.ndarray]] = []
            rows: list[dict[str, Any]] = []
            for document, ids in zip(batch, encode(tokenizer, [d.text for d in batch], frame), strict=True):
                whole = len(ids)
                ids = ids[:room]
                if room == 0:
                    break
                if not whole:
                    problems.add(Problem(document.file, document.line, "no token in its text"))
                    continue
                if texts:
                    texts.see(split, document.text)
                room = None if room is None else room - len(ids)
                # Of a document cut by `max_sequences`, its share: bits per byte need bytes that were predicted.
                size = {"tokens": len(ids), "bytes": round(len(document.text.encode()) * len(ids) / whole)}
                subsets.setdefault(document.subset, Counter()).update(documents=1, **size)
                where = {"file": document.file, "line": document.line, "subset": document.subset}
                rows.append({"document_id": document_id, **where, **size})
                taken.append((document.subset, ids))
                document_id += 1
            places.write_batch(pa.RecordBatch.from_pylist(rows, SOURCES))
            bar.update(len(taken))
            tokens = sum(s["tokens"] for s in subsets.values())
            rate = tokens / max(bar.format_dict["elapsed"], 1e-9)
            bar.set_postfix_str(f"{tokens:,} tokens, {rate:,.0f} a second", refresh=False)
            yield taken
            if room == 0:
                return

    schema = pa.schema(
        [("input_ids", pa.list_(pa.int32(), data.sequence_length)),
         ("document_ids", pa.list_(pa.int64(), data.sequence_length)), ("subset", pa.list_(pa.string()))]
    )  # fmt: skip
    with (
        pq.ParquetWriter(directory / "documents" / f"{split}.parquet", SOURCES) as places,
        pa.ipc.new_stream(str(directory / f"{split}.arrow"), schema) as writer,
        tqdm(desc=f"preparing {split}", unit=" documents", mininterval=1.0) as bar,
    ):
        sequences, ends, found = 0, [(0, Counter[str]())], list[Problems]()
        for key, files in sources.items():
            problems = Problems(data.max_bad_fraction, f"data.{key}")
            read = problems.leave_out(read_documents(files, data, "train" if carved else split))
            documents = encoded(problems, part_of(split, read, data))
            for rows in _pack(documents, data.sequence_length, frame.padding, schema, document_id):
                writer.write_batch(planter(rows) if planter else rows)
                sequences += rows.num_rows
            problems.check(problems.limit)
            if sequences == ends[-1][0] and not carved:
                besides = "" if data.eval_fraction is None else " but what data.eval_fraction holds out"
                raise ValueError(f"data.{key}: no document in {files}{besides}")
            ends.append((sequences, _totals(subsets)))
            found += [] if carved else [problems]  # the training split reports them
    if not sequences:
        raise ValueError(f"data.eval_fraction {data.eval_fraction} holds out no document of so few; raise it")
    Dataset.from_file(str(directory / f"{split}.arrow")).save_to_disk(str(directory / split))
    (directory / f"{split}.arrow").unlink()
    _say_subsets(config, [source for files in sources.values() for source in resolve(files)], subsets)
    totals = ends[-1][1]
    of_sources = {
        name: {
            "first_row": first,
            "sequences": stop - first,
            "first_document": before["documents"],
            **{key: after[key] - before[key] for key in totals},
        }
        for name, ((first, before), (stop, after)) in zip(sorted(data.mixture or ()), pairwise(ends), strict=False)
    }
    return {
        **totals,
        "sequences": sequences,
        "padding": sequences * data.sequence_length - totals["tokens"],
        "frame": frame.tokens * totals["documents"],
        "subsets": {name: dict(subsets[name]) for name in sorted(subsets)},
        "problems": dict(sum((problems.kinds for problems in found), Counter())),
        "first_problems": [
            {"file": p.file, "line": p.line, "what": p.what} for problems in found for p in problems.first
        ],
        **({"sources": of_sources} if split == "train" and data.mixture else {}),
        **({"planted": dict(planter.counts)} if planter else {}),
    }


def _totals(subsets: Mapping[str, Counter[str]]) -> Counter[str]:
    return Counter({key: sum(counts[key] for counts in subsets.values()) for key in ("documents", "tokens", "bytes")})


def _say_subsets(config: Config, files: list[str], subsets: dict[str, Counter[str]]) -> None:
    """Say how many documents of records have no subset: a field that none has is misspelled, or there is none."""
    without, every = subsets.get("-", Counter())["documents"], sum(part["documents"] for part in subsets.values())
    if without and any(source != BUILTIN and not source.endswith(".txt") for source in files):
        tqdm.write(
            f"data.subset_field: {without:,} of {every:,} documents have no field `{config.data.subset_field}`; they "
            "are subset `-`. Name another field where they have subsets",
            file=sys.stderr,
        )


def _foreign_tokens(config: Config, tokenizer: PreTrainedTokenizerBase) -> Iterator[np.ndarray]:
    """The tokens of the documents of `data.planted_foreign_files`, again and again. Raises ValueError where there are
    none."""
    files, frame = config.data.planted_foreign_files or [], frame_of(tokenizer, config.data)
    while True:
        problems = Problems(config.data.max_bad_fraction, "data.planted_foreign_files")
        batch: list[Document] = []
        for batch in _batches(problems.leave_out(read_documents(files, config.data, "train"))):
            yield from encode(tokenizer, [document.text for document in batch], frame)
        problems.check(problems.limit)
        if not batch:
            raise ValueError(f"data.planted_foreign_files: no document in {files}")


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
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
    batches: Iterable[list[tuple[str, np.ndarray]]], length: int, padding_id: int, schema: pa.Schema, first: int = 0
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
        tokens = np.concatenate([tokens, *(ids for _, ids in batch)])
        owners = np.concatenate([owners, np.repeat(new, [len(ids) for _, ids in batch])])
        names += [subset for subset, _ in batch]
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
