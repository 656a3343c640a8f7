"""Documents -> tokens -> packed rows on disk, with a fingerprint of what made them. One pass, bounded memory.

    prepared_dir/train/ eval/        rows (see `load_split`), memory-mapped by `datasets`
    prepared_dir/documents/*.parquet where every document came from, for audits: document_id, file, line, subset,
                                     tokens (in the rows, with its eos), bytes (UTF-8, of its whole text)
    prepared_dir/tokenizer/          the tokenizer, as `AutoTokenizer` reads it
    prepared_dir/fingerprint.json    what made the dataset
    prepared_dir/report.json         what is in it, and what was wrong with the files

Run it with `python -m pipeline.prepare --config run.yaml`; training does where the directory is missing.
"""

import glob
import hashlib
import json
import os
import shutil
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, load_from_disk
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pipeline.config import BUILTIN, TRAIN_TOKENIZER, Config, exit_on_user_error, parse
from pipeline.corpus import Document, Problem, builtin_documents, read_documents, resolve

FORMAT = 1  # raise it whenever the same inputs would give other rows
BATCH_DOCUMENTS = 1_000
BATCH_CHARACTERS = 8_000_000  # the tokenizer takes some 140 bytes a character (and a longer document all of it)
TOKENIZER_CHARACTERS = 8_000_000  # what a tokenizer is trained on
EOS = "<|endoftext|>"
PROBLEMS_PRINTED = 5
PROBLEMS_KEPT = 100
SOURCES = pa.schema(
    [("document_id", pa.int64()), ("file", pa.string()), ("line", pa.int64()), ("subset", pa.string()),
     ("tokens", pa.int64()), ("bytes", pa.int64())]
)  # fmt: skip

Split = Literal["train", "eval"]


def ensure_prepared(config: Config) -> None:
    """Prepare where `data.prepared_dir` is missing. Raises ValueError where it was made of something else."""
    directory = Path(config.data.prepared_dir)
    if not (directory / "fingerprint.json").exists():
        return prepare(config)
    if changes := _changes(load_fingerprint(directory), fingerprint(config, _pretrained_tokenizer(config))):
        raise ValueError(
            f"data.prepared_dir: {directory} was prepared from something else:\n{changes}\n"
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
    tokenizer = _pretrained_tokenizer(config)
    new = fingerprint(config, tokenizer)
    if exists:
        changes = _changes(load_fingerprint(target), new)
        if not changes:
            return print(f"{target} is already prepared from the same inputs")
        print(f"{target} was prepared from something else and will be replaced:\n{changes}")

    # The host is part of the name: on a shared file system, another node's process ids say nothing here.
    prefix = f"{target.name}.tmp-{socket.gethostname()}-"
    for stale in target.parent.glob(f"{glob.escape(prefix)}*"):
        if not _others_alive(stale.name.removeprefix(prefix).split(".")[0]):
            shutil.rmtree(stale)
    temporary = target.with_name(f"{prefix}{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        if tokenizer is None:
            tokenizer = _train_tokenizer(config)
        report = {"train": _write_split(config, "train", tokenizer, temporary)}
        if config.data.eval_files is not None:
            report["eval"] = _write_split(config, "eval", tokenizer, temporary)
        tokenizer.save_pretrained(str(temporary / "tokenizer"))
        (temporary / "report.json").write_text(json.dumps(report, indent=2))
        (temporary / "fingerprint.json").write_text(json.dumps(new, indent=2))
        if target.exists():
            target.rename(temporary.with_name(f"{temporary.name}.replaced"))
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(temporary.with_name(f"{temporary.name}.replaced"), ignore_errors=True)


def load_split(prepared_dir: str | Path, split: Split) -> Dataset:
    """The packed rows of a split, memory-mapped, each of `sequence_length` tokens:

    input_ids (int32): documents one after the other, each closed by eos; a document may go on in the next row.
    document_ids (int64): of every token, counting up from 0 in the split; -1 is padding, at the end of the last row.
    subset (strings): of each document of the row, in the order of their first tokens.

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
    problems (count of each kind) and first_problems (file, line, what). Raises ValueError where there is none."""
    return _load_json(Path(prepared_dir) / "report.json")


def _load_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ValueError(f"{path.parent} is no prepared dataset (no {path.name}); run `pipeline.prepare`")
    return json.loads(path.read_text())


# What made a dataset


def fingerprint(config: Config, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    """Everything that decides what the rows are; reads every file once. `tokenizer` is None where it is trained."""
    data = config.data
    return {
        "format": FORMAT,
        "train_files": [_identity(source, "train") for source in resolve(data.train_files)],
        "eval_files": None if data.eval_files is None else [_identity(s, "eval") for s in resolve(data.eval_files)],
        "tokenizer": {"trained": _vocabulary_size(config)} if tokenizer is None else _tokenizer_identity(tokenizer),
        "seed": config.seed,
        **{key: getattr(data, key) for key in (
            "sequence_length", "text_field", "subset_field", "max_sequences", "max_eval_sequences"
        )},
    }  # fmt: skip


def _identity(source: str, split: Split) -> dict[str, Any]:
    """Of a file its name (not its directory, which may move), size and content; of builtin text its content."""
    digest = hashlib.blake2b(digest_size=16)
    if source == BUILTIN:
        for document in builtin_documents()[split]:
            digest.update(repr(document).encode())
        return {"builtin": digest.hexdigest()}
    if not Path(source).is_file():
        return {"hub": source}
    with open(source, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return {"name": Path(source).name, "size": Path(source).stat().st_size, "blake2b": digest.hexdigest()}


def _tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        digest = hashlib.blake2b(digest_size=16)
        for path in sorted(Path(directory).iterdir()):
            # The settings file differs between versions of transformers; of it, only eos matters to the rows.
            if path.name != "tokenizer_config.json":
                digest.update(path.name.encode() + path.read_bytes())
    return {"blake2b": digest.hexdigest(), "eos": tokenizer.eos_token}


def _changes(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The keys that differ, one a line, with both values; empty where none does."""
    before, after = _flat(old), _flat(new)
    lines = [
        f"  {key}: {before.get(key, 'absent')!r} -> {after.get(key, 'absent')!r}"
        for key in {**before, **after}
        if key not in before or key not in after or before[key] != after[key]
    ]
    return "\n".join(lines[:20] + [f"  ... and {len(lines) - 20} more"] * (len(lines) > 20))


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict | list):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {key: leaf for part, inner in items for key, leaf in _flat(inner, f"{name}.{part}".strip(".")).items()}


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


# The tokenizer


def _pretrained_tokenizer(config: Config) -> PreTrainedTokenizerBase | None:
    """The tokenizer that the config names; None where it is to be trained."""
    name = config.model.tokenizer or config.model.name_or_path
    if name == TRAIN_TOKENIZER:
        return None
    if name.endswith(".json"):
        raise ValueError(
            f"model.tokenizer: {name} is a model config, which has no tokenizer; set model.tokenizer to a hub id or a "
            f"local directory, or to `{TRAIN_TOKENIZER}`"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"model.tokenizer: no tokenizer can be loaded from `{name}`: {error}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"model.tokenizer: `{name}` has no eos token, which has to close every document; give it one "
            "(tokenizer.eos_token = ..., save_pretrained) and name the saved directory"
        )
    return tokenizer


def _vocabulary_size(config: Config) -> int:
    path = Path(config.model.name_or_path)
    if path.suffix != ".json" or not path.is_file():
        raise ValueError(
            f"model.tokenizer: `{TRAIN_TOKENIZER}` takes its vocabulary size from a model config (*.json), and "
            f"model.name_or_path is `{path}`; name such a file, or a tokenizer"
        )
    size = json.loads(path.read_text()).get("vocab_size")
    if not isinstance(size, int) or size < 257:
        raise ValueError(f"{path}: vocab_size is {size}; a byte-level tokenizer needs at least 257 (256 bytes and eos)")
    return size


def _train_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """A byte-level BPE, trained on the first `TOKENIZER_CHARACTERS` of the training documents."""

    def sample() -> Iterator[str]:
        room = TOKENIZER_CHARACTERS
        for document in read_documents(config.data.train_files, config.data, "train"):
            if isinstance(document, Document):
                yield document.text[:room]
                room -= len(document.text)
            if room <= 0:
                return

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_vocabulary_size(config),
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # every byte: no text is ever unknown
        show_progress=False,
    )
    bpe.train_from_iterator(sample(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, clean_up_tokenization_spaces=False)


# The rows


@dataclass
class _Problems:
    """What was wrong with the records of a split so far."""

    limit: float
    documents: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    first: list[Problem] = field(default_factory=list)

    def leave_out(self, records: Iterable[Document | Problem]) -> Iterator[Document]:
        """The documents among the records. Raises ValueError as soon as, of 1,000 records or more, ten times more than
        `limit` are problems: a wrong field name should not cost a night. The verdict on all is the caller's `check`."""
        for record in records:
            if isinstance(record, Document):
                self.documents += 1
                yield record
                continue
            self.kinds[record.what] += 1
            if len(self.first) < PROBLEMS_KEPT:
                self.first.append(record)
            if len(self.first) <= PROBLEMS_PRINTED and self.kinds.total() <= PROBLEMS_PRINTED:
                tqdm.write(f"left out: {record.file}:{record.line}: {record.what}", file=sys.stderr)
            if self.documents + self.kinds.total() >= 1_000:
                self.check(10 * self.limit)

    def check(self, limit: float) -> None:
        """Raises ValueError where more than `limit` of the records so far are problems."""
        problems, records = self.kinds.total(), self.documents + self.kinds.total()
        if problems > limit * records:
            offenders = "\n".join(f"  {p.file}:{p.line}: {p.what}" for p in self.first[:PROBLEMS_PRINTED])
            raise ValueError(
                f"{problems} of {records} records cannot be used, more than data.max_bad_fraction = {self.limit} of "
                f"them:\n{offenders}\nRepair the files, or raise data.max_bad_fraction to leave such records out."
            )


def _write_split(config: Config, split: Split, tokenizer: PreTrainedTokenizerBase, directory: Path) -> dict[str, Any]:
    """Write the rows and the sources of a split under `directory`; returns its part of the report."""
    data = config.data
    files, most = data.train_files, data.max_sequences
    if split == "eval":
        files, most = data.eval_files or [], data.max_eval_sequences
    problems = _Problems(data.max_bad_fraction)
    documents = problems.leave_out(read_documents(files, data, split))
    subsets: dict[str, Counter[str]] = {}
    (directory / "documents").mkdir(exist_ok=True)

    def encoded() -> Iterator[list[tuple[str, np.ndarray]]]:
        """Batches of (subset, tokens of a document), shuffled inside the batch, counted, their sources written."""
        room = None if most is None else most * data.sequence_length  # tokens that still fit
        document_id = 0
        for number, batch in enumerate(_batches(documents)):
            order = np.random.default_rng([config.seed, split == "eval", number]).permutation(len(batch))
            batch = [batch[index] for index in order]
            taken: list[tuple[str, np.ndarray]] = []
            rows: list[dict[str, Any]] = []
            for document, ids in zip(batch, _encode(tokenizer, [d.text for d in batch]), strict=True):
                ids = ids[:room]
                if not len(ids):
                    break
                room = None if room is None else room - len(ids)
                size = {"tokens": len(ids), "bytes": len(document.text.encode())}
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
            writer.write_batch(rows)
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
    }


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


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[np.ndarray]:
    """The tokens of every text, closed by eos. A text that spells a special token gets no special token: nothing in
    a document may look like its end."""
    batch = tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # documents longer than the model's context are meant to be
    )
    return [np.array([*ids, tokenizer.eos_token_id], np.int32) for ids in batch["input_ids"]]


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
