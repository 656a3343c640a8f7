"""Documents -> a split: read, tokenized, made into rows, written, counted. Bounded memory."""

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

from pipeline.config.schema import Config
from pipeline.config.schema_data import BUILTIN
from pipeline.data.corpus import Problems, read_documents, resolve
from pipeline.data.document import Document, Encoded, Problem, Split
from pipeline.data.fingerprint import preparation_seed
from pipeline.data.held_out import part_of
from pipeline.data.labelled import Labelled, ordered, with_labels
from pipeline.data.overlap import Texts
from pipeline.data.packing import Packed, batches_of

SPLITS = get_args(Split)


SOURCES = pa.schema(
    [("document_id", pa.int64()), ("file", pa.string()), ("line", pa.int64()), ("subset", pa.string()),
     ("tokens", pa.int64()), ("bytes", pa.int64())]
)  # fmt: skip


def write_split(
    config: Config,
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    texts: Texts | None = None,
    first_document: int = 0,
) -> dict[str, Any]:
    """Write the rows and the sources of a split under `directory`; returns its part of the report. `texts` is shown
    every document; documents of the training files are numbered from `first_document` on."""
    data = config.data
    most = data.max_sequences if split == "train" else data.max_eval_sequences
    key = f"{split}_files"
    carved = split == "eval" and data.eval_fraction is not None
    sources = data.train_sources if split == "train" or carved else {key: data.raw_files[key] or []}
    subsets: dict[str, Counter[str]] = {}
    form = _form(config, tokenizer, split)
    places_of = pa.schema([*SOURCES, *(pa.field(*column) for column in form.sources)])
    (directory / "documents").mkdir(exist_ok=True)
    document_id, batches = first_document if split == "train" or carved else 0, count()

    def in_form(problems: Problems, documents: Iterable[Document]) -> Iterator[list[Encoded]]:
        """Batches of documents, shuffled inside the batch, counted, their places written."""
        nonlocal document_id
        room = None if most is None else most * data.sequence_length  # tokens that still fit
        for batch in batches_of(documents):
            order = np.random.default_rng([preparation_seed(config), SPLITS.index(split), next(batches)])
            batch = [batch[index] for index in order.permutation(len(batch))]
            taken: list[Encoded] = []
            rows: list[dict[str, Any]] = []
            for document, encoded in zip(batch, form.encode(batch), strict=True):
                whole, ids = len(encoded.ids), encoded.ids[:room]
                if room == 0:
                    break
                if not whole:
                    problems.add(Problem(document.file, document.line, "no token in its text"))
                    continue
                if texts:
                    texts.see(split, document.text)
                encoded = encoded._replace(ids=ids)
                room = None if room is None else room - form.size(encoded)
                # Of a document cut by `max_sequences`, its share: bits per byte need bytes that were predicted.
                size = {"tokens": len(ids), "bytes": round(len(document.text.encode()) * len(ids) / whole)}
                subsets.setdefault(encoded.subset, Counter()).update(documents=1, **size)
                where = {"file": document.file, "line": document.line, "subset": encoded.subset}
                rows.append({"document_id": document_id, **where, **size, **encoded.source})
                taken.append(encoded)
                document_id += 1
            places.write_batch(pa.RecordBatch.from_pylist(rows, places_of))
            bar.update(len(taken))
            tokens = sum(s["tokens"] for s in subsets.values())
            rate = tokens / max(bar.format_dict["elapsed"], 1e-9)
            bar.set_postfix_str(f"{tokens:,} tokens, {rate:,.0f} a second", refresh=False)
            yield taken
            if room == 0:
                return

    schema = pa.schema(
        [("input_ids", pa.list_(pa.int32(), data.sequence_length)),
         ("document_ids", pa.list_(pa.int64(), data.sequence_length)), ("subset", pa.list_(pa.string())),
         *form.columns]
    )  # fmt: skip
    with (
        pq.ParquetWriter(directory / "documents" / f"{split}.parquet", places_of) as places,
        pa.ipc.new_stream(str(directory / f"{split}.arrow"), schema) as writer,
        tqdm(desc=f"preparing {split}", unit=" documents", mininterval=1.0) as bar,
    ):
        sequences, ends, found = 0, [(0, Counter[str]())], list[Problems]()
        for key, files in sources.items():
            problems = Problems(data.max_bad_fraction, f"data.{key}")
            there = read_documents(files, data, "train" if carved else split, config.task.classifies)
            read = problems.leave_out(form.read(there))
            documents = in_form(problems, part_of(split, read, data))
            for rows in form.rows(documents, schema, document_id):
                writer.write_batch(rows)
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
        "subsets": {name: dict(subsets[name]) for name in sorted(subsets)},
        "problems": dict(sum((problems.kinds for problems in found), Counter())),
        "first_problems": [
            {"file": p.file, "line": p.line, "what": p.what} for problems in found for p in problems.first
        ],
        **({"sources": of_sources} if split == "train" and data.mixture else {}),
        **form.report(totals["documents"]),
    }


def _form(config: Config, tokenizer: PreTrainedTokenizerBase, split: Split) -> Packed | Labelled:
    """What the rows of a split are."""
    if not config.task.classifies:
        return Packed(config, tokenizer, split)
    train = split == "train"
    classes = _classes(config) if train and config.task.label_noise else None
    return Labelled(config, tokenizer, train, classes)


def _classes(config: Config) -> list[str]:
    """The labels of the training files, all of which are read for it."""
    labels = set[str]()
    for files in config.data.train_sources.values():
        found = with_labels(read_documents(files, config.data, "train", whole_records=True), config.task)
        labels |= {document.record["label"] for document in found if isinstance(document, Document) and document.record}
    return ordered(labels)


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
