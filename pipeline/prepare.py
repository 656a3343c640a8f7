"""Documents -> tokens -> packed rows on disk, with a fingerprint of what made them. One pass, bounded memory.

    prepared_dir/train/ eval/ reference/ rows (see `load_split`), memory-mapped by `datasets`
    prepared_dir/documents/*.parquet where every document came from, for audits: document_id, file, line, subset,
                                     tokens (in the rows, with its eos), bytes (UTF-8, of these tokens)
    prepared_dir/tokenizer/          the tokenizer, as `AutoTokenizer` reads it
    prepared_dir/fingerprint.json    what made the dataset
    prepared_dir/report.json         what is in it, and what was wrong with the files

Run it with `python -m pipeline.prepare --config run.yaml`; training does where the directory is missing.
"""

import glob
import itertools
import json
import os
import shutil
import socket
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, load_from_disk
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from pipeline.collectives import launched_rank
from pipeline.config import Config, exit_on_user_error, parse
from pipeline.corpus import Problems, read_documents
from pipeline.document import Document, Split
from pipeline.fingerprint import changes, fingerprint, preparation_seed
from pipeline.planted import Planter
from pipeline.tokenizer import encode, load_tokenizer, train_tokenizer

SPLITS = get_args(Split)
BATCH_DOCUMENTS = 1_000
BATCH_CHARACTERS = 8_000_000  # the tokenizer takes some 140 bytes a character (and a longer document all of it)
SOURCES = pa.schema(
    [("document_id", pa.int64()), ("file", pa.string()), ("line", pa.int64()), ("subset", pa.string()),
     ("tokens", pa.int64()), ("bytes", pa.int64())]
)  # fmt: skip


def ensure_prepared(config: Config) -> None:
    """On rank 0, prepare where `data.prepared_dir` is missing; on the others, wait for it. Before any process group.

    Raises ValueError, on rank 0, where it was made of something else; held-out splits that the config does not ask for
    are no difference.
    """
    directory = Path(config.data.prepared_dir)
    if rank := launched_rank():
        # No collective: a large corpus takes longer than any of their timeouts.
        for second in itertools.count():
            if (directory / "fingerprint.json").exists():
                return
            if second % 60 == 5:
                print(f"rank {rank} waits for rank 0 to prepare {directory} (all hosts must see it)", flush=True)
            time.sleep(1)
    if not (directory / "fingerprint.json").exists():
        return prepare(config)
    old = load_fingerprint(directory)
    new = fingerprint(config, load_tokenizer(config), known=old)
    if config.data.reference_files is None:
        old.pop("reference_files", None)
        if config.data.eval_files is None:
            old |= {key: new[key] for key in ("eval_files", "max_eval_sequences")}
    if differences := changes(old, new):
        raise ValueError(
            f"data.prepared_dir: {directory} was prepared from something else:\n{differences}\n"
            "Run `python -m pipeline.prepare --config ...` to replace it, or choose another data.prepared_dir."
        )


def prepare(config: Config) -> None:
    """Make `data.prepared_dir`, or leave it where the same inputs made it, or replace it.

    It appears by a rename at the very end: killed at any moment, it leaves no directory that looks whole. Raises
    ValueError on unusable files, too many problems in them, a tokenizer that does not fit, or a foreign directory.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # before the first batch; launchers often set it to false
    target = Path(config.data.prepared_dir).resolve()
    exists = (target / "fingerprint.json").exists()
    if not exists and target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(
            f"data.prepared_dir: {target} exists and is no prepared dataset; remove it or choose another directory"
        )
    tokenizer = load_tokenizer(config)
    new = fingerprint(config, tokenizer)
    if exists:
        differences = changes(load_fingerprint(target), new)
        if not differences:
            return print(f"{target} is already prepared from the same inputs")
        print(f"{target} was prepared from something else and will be replaced:\n{differences}")

    # The host is part of the name: on a shared file system, another node's process ids say nothing here.
    prefix = f"{target.name}.tmp-{socket.gethostname()}-"
    for stale in target.parent.glob(f"{glob.escape(prefix)}*"):
        if not _others_alive(stale.name.removeprefix(prefix).split(".")[0]):
            shutil.rmtree(stale)
    temporary = target.with_name(f"{prefix}{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        if tokenizer is None:
            tokenizer = train_tokenizer(config)
        report = {"train": _write_split(config, "train", tokenizer, temporary)}
        if config.data.eval_files is not None:
            report["eval"] = _write_split(config, "eval", tokenizer, temporary)
        if config.data.reference_files is not None:
            report["reference"] = _write_split(config, "reference", tokenizer, temporary)
        tokenizer.save_pretrained(str(temporary / "tokenizer"))
        (temporary / "report.json").write_text(json.dumps(report, indent=2))
        (temporary / "fingerprint.json").write_text(json.dumps(new, indent=2))
        if target.exists():
            target.rename(temporary.with_name(f"{temporary.name}.replaced"))
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(temporary.with_name(f"{temporary.name}.replaced"), ignore_errors=True)


def _others_alive(pid: str) -> bool:
    """Whether another process with this id runs on this host."""
    if not pid.isdigit() or int(pid) == os.getpid():  # our own id: a container's processes get the same ones again
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def load_split(prepared_dir: str | Path, split: Split) -> Dataset:
    """The packed rows of a split, memory-mapped, each of `sequence_length` tokens:

    input_ids (int32): documents one after the other, each closed by eos; a document may go on in the next row.
    document_ids (int64): of every token, counting up from 0 in the split; -1 is padding, at the end of the last row.
    subset (strings): of each document of the row, in the order of their first tokens.

    With `data.planted_noise`, some training rows hold noise instead: see `Planter`.

    Raises ValueError where the split was not prepared.
    """
    path = Path(prepared_dir) / split
    if not path.exists():
        raise ValueError(f"no {split} split in {prepared_dir}; set data.{split}_files and run `pipeline.prepare`")
    dataset = load_from_disk(str(path), keep_in_memory=False)
    assert isinstance(dataset, Dataset)
    return dataset


def load_fingerprint(prepared_dir: str | Path) -> dict[str, Any]:
    """What made the dataset. Raises ValueError where there is none."""
    return _load_json(Path(prepared_dir) / "fingerprint.json")


def load_report(prepared_dir: str | Path) -> dict[str, Any]:
    """Per split: documents, tokens, bytes, sequences, padding (tokens), subsets (documents, tokens, bytes of each),
    problems (count of each kind) and first_problems (file, line, what); where noise was planted, planted (training
    sequences replaced by each kind; documents and tokens are those before). Raises ValueError where there is none."""
    return _load_json(Path(prepared_dir) / "report.json")


def _load_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ValueError(f"{path.parent} is no prepared dataset (no {path.name}); run `pipeline.prepare`")
    return json.loads(path.read_text())


# The rows


def _write_split(config: Config, split: Split, tokenizer: PreTrainedTokenizerBase, directory: Path) -> dict[str, Any]:
    """Write the rows and the sources of a split under `directory`; returns its part of the report."""
    data = config.data
    files, most = {
        "train": (data.train_files, data.max_sequences),
        "eval": (data.eval_files or [], data.max_eval_sequences),
        "reference": (data.reference_files or [], data.max_eval_sequences),
    }[split]
    problems = Problems(data.max_bad_fraction)
    documents = problems.leave_out(read_documents(files, data, split))
    subsets: dict[str, Counter[str]] = {}
    planter = None
    if split == "train" and data.planted_noise:
        foreign = None if data.planted_foreign_files is None else _foreign_tokens(config, tokenizer)
        planter = Planter(data.planted_noise, preparation_seed(config), len(tokenizer), foreign)
    (directory / "documents").mkdir(exist_ok=True)

    def encoded() -> Iterator[list[tuple[str, np.ndarray]]]:
        """Batches of (subset, tokens of a document), shuffled inside the batch, counted, their sources written."""
        room = None if most is None else most * data.sequence_length  # tokens that still fit
        document_id = 0
        for number, batch in enumerate(_batches(documents)):
            order = np.random.default_rng([preparation_seed(config), SPLITS.index(split), number])
            batch = [batch[index] for index in order.permutation(len(batch))]
            taken: list[tuple[str, np.ndarray]] = []
            rows: list[dict[str, Any]] = []
            for document, ids in zip(batch, encode(tokenizer, [d.text for d in batch]), strict=True):
                whole = len(ids)
                ids = ids[:room]
                if not len(ids):
                    break
                room = None if room is None else room - len(ids)
                # Of a document cut by `max_sequences`, its share: bits per byte need bytes that were predicted.
                size = {"tokens": len(ids), "bytes": round(len(document.text.encode()) * len(ids) / whole)}
                subsets.setdefault(document.subset, Counter()).update(documents=1, **size)
                where = {"file": document.file, "line": document.line, "subset": document.subset}
                rows.append({"document_id": document_id, **where, **size})
                taken.append((document.subset, ids))
                document_id += 1
            sources.write_batch(pa.RecordBatch.from_pylist(rows, SOURCES))
            bar.update(len(taken))
            bar.set_postfix_str(f"{sum(s['tokens'] for s in subsets.values()):,} tokens", refresh=False)
            yield taken
            if room == 0:
                return

    schema = pa.schema(
        [("input_ids", pa.list_(pa.int32(), data.sequence_length)),
         ("document_ids", pa.list_(pa.int64(), data.sequence_length)), ("subset", pa.list_(pa.string()))]
    )  # fmt: skip
    with (
        pq.ParquetWriter(directory / "documents" / f"{split}.parquet", SOURCES) as sources,
        pa.ipc.new_stream(str(directory / f"{split}.arrow"), schema) as writer,
        tqdm(desc=f"preparing {split}", unit=" documents", mininterval=1.0) as bar,
    ):
        sequences = 0
        for rows in _pack(encoded(), data.sequence_length, tokenizer.eos_token_id, schema):
            writer.write_batch(planter(rows) if planter else rows)
            sequences += rows.num_rows
    problems.check(problems.limit)
    if not sequences:
        raise ValueError(f"data.{split}_files: no document in {files}")
    Dataset.from_file(str(directory / f"{split}.arrow")).save_to_disk(str(directory / split))
    (directory / f"{split}.arrow").unlink()
    totals = {key: sum(counts[key] for counts in subsets.values()) for key in ("documents", "tokens", "bytes")}
    return {
        **totals,
        "sequences": sequences,
        "padding": sequences * data.sequence_length - totals["tokens"],
        "subsets": {name: dict(subsets[name]) for name in sorted(subsets)},
        "problems": dict(problems.kinds),
        "first_problems": [asdict(problem) for problem in problems.first],
        **({"planted": dict(planter.counts)} if planter else {}),
    }


def _foreign_tokens(config: Config, tokenizer: PreTrainedTokenizerBase) -> Iterator[np.ndarray]:
    """The tokens of the documents of `data.planted_foreign_files`, again and again. Raises ValueError where there are
    none."""
    files = config.data.planted_foreign_files or []
    while True:
        documents = (d for d in read_documents(files, config.data, "train") if isinstance(d, Document))
        batch: list[Document] = []
        for batch in _batches(documents):
            yield from encode(tokenizer, [document.text for document in batch])
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
    batches: Iterable[list[tuple[str, np.ndarray]]], length: int, eos: int, schema: pa.Schema
) -> Iterator[pa.RecordBatch]:
    """Rows of `length` tokens from documents one after the other; only the last row is padded."""
    tokens, owners = np.empty(0, np.int32), np.empty(0, np.int64)
    names: list[str] = []  # subsets of the documents from `first` on, the owner of the first token left over
    first = 0

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
        tokens = np.concatenate([tokens, np.full(padding, eos, np.int32)])
        owners = np.concatenate([owners, np.full(padding, -1)])
        yield rows()


# The command


def _table(report: dict[str, Any]) -> str:
    lines = [f"{'':5} {'subset':24} {'documents':>12} {'tokens':>16} {'MB':>10}"]
    for split, part in report.items():
        for name, counts in [*part["subsets"].items(), ("all", part)]:
            size = f"{counts['documents']:12,} {counts['tokens']:16,} {counts['bytes'] / 1e6:10,.2f}"
            lines.append(f"{split:5} {name:24} {size}")
        lines.append(f"{split:5} {part['sequences']:,} sequences, {part['padding']:,} tokens of padding")
        lines += [f"{split:5} planted: {count:,} x {kind}" for kind, count in part.get("planted", {}).items()]
        lines += [f"{split:5} left out: {count:,} x {what}" for what, count in part["problems"].items()]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Prepare `data.prepared_dir` and print what is in it. Exits with code 2 and a message on a user's error."""
    config = parse("pipeline.prepare", argv)
    with exit_on_user_error("pipeline.prepare"):
        prepare(config)
        print(_table(load_report(config.data.prepared_dir)))


if __name__ == "__main__":
    main()
