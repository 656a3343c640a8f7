"""Documents -> tokens -> packed rows on disk, with a fingerprint of what made them. One pass, bounded memory.

prepared_dir/train/ eval/ reference/ rows (see `load_split`), memory-mapped by `datasets`
prepared_dir/documents/*.parquet where every document came from, for audits: document_id, file, line, subset,
                                 tokens (in the rows, with its frame), bytes (UTF-8, of these tokens)
prepared_dir/tokenizer/          the tokenizer, as `AutoTokenizer` reads it
prepared_dir/fingerprint.json    what made the dataset
prepared_dir/files.json          hashes of the files by path and time, so that they are read once
prepared_dir/report.json         what is in it, and what was wrong with the files
"""

import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets, load_from_disk
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from pipeline.config.answers import Answers
from pipeline.config.differences import changes
from pipeline.config.ownership import owned
from pipeline.config.schema import Config
from pipeline.data.corpus import check_files, gone
from pipeline.data.document import Split
from pipeline.data.fingerprint import Known, fingerprint
from pipeline.data.frame import frame_of, in_words
from pipeline.data.limits import check_model
from pipeline.data.overlap import Texts, refuse_shared_files
from pipeline.data.overlap import in_words as overlap_in_words
from pipeline.data.replacing import is_made_of, made_of, refuse_other_things, replaced
from pipeline.data.split import write_split
from pipeline.data.tokenizer import load_tokenizer, train_tokenizer


def ensure_prepared(config: Config) -> None:
    """Prepare where `data.prepared_dir` is missing. In one process (`training.preparing`).

    Raises ValueError where it was made of something else; held-out splits that the config does not ask for are no
    difference, and neither are raw files that are gone: what was prepared from them is what counts.
    """
    directory = Path(config.data.prepared_dir)
    if not (directory / "fingerprint.json").exists():
        return prepare(config)
    if not any(gone(files) for files in config.data.raw_files.values() if files):
        refuse_shared_files(config.data)
    tokenizer = load_tokenizer(config)
    check_model(config, tokenizer)
    old = made_of(directory)
    known = Known(load_files(directory), old)
    new = _fingerprint_of_what_is_left(config, tokenizer, old, known)
    if config.data.reference_files is None:
        old.pop("reference_files", None)
        if not config.data.holds_out:
            old |= {key: new[key] for key in ("eval_files", "max_eval_sequences")}
    if differences := changes(old, new):
        raise ValueError(
            f"data.prepared_dir: {directory} was prepared from something else:\n{differences}\n"
            "Run `python -m pipeline.prepare --config ...` to replace it, or choose another data.prepared_dir."
        )
    if known.files != load_files(directory):  # moved or touched since, or prepared before there was this list
        with suppress(OSError):
            _write_files(directory, known)


def _fingerprint_of_what_is_left(
    config: Config, tokenizer: PreTrainedTokenizerBase | None, old: dict[str, Any], known: Known
) -> dict[str, Any]:
    """The fingerprint, in which files that are gone are taken for those that `old` knows."""
    left: dict[str, Any] = {}
    for name, files in config.data.raw_files.items():
        if files is not None and old.get(name) and (missing := gone(files)):
            where = f"what {config.data.prepared_dir} holds of it" + (
                f" (and {len(missing) - 1} more)" * (len(missing) > 1)
            )
            print(f"data.{name}: {missing[0]} is gone; going on with {where}", flush=True)
            left[name] = [entry for entry in ([files] if isinstance(files, str) else files) if entry not in missing]
    here = {name: files or None for name, files in left.items()}
    new = fingerprint(config, tokenizer, known, config.data.raw_files | here)
    for name, files in left.items():
        before = [_without_time(file) for file in old[name]]
        if not files or all(_without_time(file) in before for file in new[name]):
            new[name] = old[name]
    return new


def _without_time(file: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in file.items() if key != "modified"}


def prepare(config: Config, first_document: int = 0) -> None:
    """Make `data.prepared_dir`, or leave it where the same inputs made it, or replace it. `first_document`: where the
    numbers of the training documents begin, in a shard.

    It appears by a rename at the very end: killed at any moment, it leaves no directory that looks whole. Raises
    ValueError on unusable files, too many problems in them, a tokenizer or model that does not fit, a directory that
    another process prepares just now, and one that holds anything that is not ours.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # before the first batch; launchers often set it to false
    target = Path(config.data.prepared_dir).resolve()
    with owned(target, "data.prepared_dir"):
        _prepare(config, target, first_document)


def _prepare(config: Config, target: Path, first_document: int) -> None:
    refuse_other_things(target)
    refuse_shared_files(config.data)
    tokenizer = load_tokenizer(config)
    check_model(config, tokenizer)
    for key, files in config.data.raw_files.items():
        if files:
            check_files(files, f"data.{key}")
    known = Known(load_files(target))
    new = fingerprint(config, tokenizer, known)
    if is_made_of(target, new):
        return
    with replaced(target) as temporary:
        if tokenizer is None:
            tokenizer = train_tokenizer(config)
        if not config.task.classifies:
            tqdm.write(in_words(tokenizer, frame_of(tokenizer, config.data)), file=sys.stderr)
        parts, texts = {}, Texts()
        if config.data.holds_out:
            parts["eval"] = write_split(config, "eval", tokenizer, temporary, texts, first_document)
        if config.data.reference_files is not None:
            parts["reference"] = write_split(config, "reference", tokenizer, temporary, texts)
        train = write_split(config, "train", tokenizer, temporary, texts, first_document)
        report = {"train": train, **parts}
        if config.task.classifies:
            refuse_unknown_labels(report)
        texts.add_to(report)
        for line in overlap_in_words(report):
            tqdm.write(line, file=sys.stderr)
        if changed := known.changed():
            raise ValueError(
                f"data files: {changed[0]} was written to while it was read, so nobody knows what was read of it. "
                "Wait until nobody writes there, and prepare again"
            )
        tokenizer.save_pretrained(str(temporary / "tokenizer"))
        write_descriptions(temporary, report, known, new)


def write_descriptions(directory: Path, report: dict[str, Any], known: Known, made_of: dict[str, Any]) -> None:
    """report.json, files.json and fingerprint.json of a prepared dataset."""
    (directory / "report.json").write_text(json.dumps(report, indent=2))
    _write_files(directory, known)
    (directory / "fingerprint.json").write_text(json.dumps(made_of, indent=2))


def load_split(prepared_dir: str | Path, split: Split) -> Dataset:
    """The packed rows of a split, memory-mapped, each of `sequence_length` tokens:

    input_ids (int32): documents one after the other, each in its frame (eos behind it, by default); a document
        may go on in the next row.
    document_ids (int64): of every token, counting up from 0 in the split, or in each shard of it (`shards`); -1 is
        padding, at the end of the last row (of each source's with `data.mixture`, of each shard's).
    subset (strings): of each document of the row, in the order of their first tokens.

    With `data.planted_noise`, some training rows hold noise instead: see `Planter`.

    Raises ValueError where the split was not prepared.
    """
    path = Path(prepared_dir) / split
    if not path.exists():
        raise ValueError(f"no {split} split in {prepared_dir}; set data.{split}_files and run `pipeline.prepare`")
    shards = [file.parent for file in sorted(path.glob("*/state.json"))] or [path]
    parts = [load_from_disk(str(shard), keep_in_memory=False) for shard in shards]
    return concatenate_datasets(parts) if len(parts) > 1 else parts[0]


def load_fingerprint(prepared_dir: str | Path) -> dict[str, Any]:
    """What made the dataset. Raises ValueError where there is none."""
    return _load_json(Path(prepared_dir) / "fingerprint.json")


def load_report(prepared_dir: str | Path) -> dict[str, Any]:
    """Per split: documents, tokens, bytes, sequences, padding (tokens), frame (tokens, bos and eos), subsets
    (documents, tokens, bytes of each), problems (count of each kind) and first_problems (file, line, what); where noise
    was planted, planted (training sequences replaced by each kind; documents and tokens are those before); in held-out
    splits, overlap (of its texts, how many each other split has); with `data.mixture`, sources (of each its first_row,
    sequences, first_document, documents, tokens and bytes). Raises ValueError where there is none."""
    return _load_json(Path(prepared_dir) / "report.json")


def _load_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ValueError(f"{path.parent} is no prepared dataset (no {path.name}); run `pipeline.prepare`")
    return json.loads(path.read_text())


def load_answers(prepared_dir: str | Path) -> Answers | None:
    """What there is to answer of labelled texts; None where the dataset is of packed text."""
    found = load_report(prepared_dir)["train"].get("answers")
    return Answers(**found) if found else None


def refuse_unknown_labels(report: dict[str, Any]) -> None:
    """Raises ValueError where a held-out text has a label that no training text has."""
    known = report["train"]["labels"]
    if len(known) < 2:
        raise ValueError(
            f"task.label_field: all training texts have the label {', '.join(known)}, so there is nothing to learn; "
            "name another field, or files with more labels"
        )
    for split in report.keys() - {"train"}:
        if unknown := sorted(report[split]["labels"].keys() - known.keys()):
            raise ValueError(
                f"data.{split}_files: no training text has the label {unknown[0]!r}; the labels are "
                f"{', '.join(list(known)[:12])}. Give files of the same task, or another task.label_field"
            )


def load_files(directory: Path) -> dict[str, Any]:
    """What `Known` knew of the files."""
    try:
        found = json.loads((directory / "files.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write_files(directory: Path, known: Known) -> None:
    new = directory / f"files.json.{os.getpid()}"
    new.write_text(json.dumps(known.files, indent=1))
    new.replace(directory / "files.json")
