"""A corpus prepared in parts, on as many hosts as there are, and put together without being read or written again.

PREPARED_DIR.shards/03-of-16/   a prepared dataset of the 3rd, 19th, 35th ... of the training files; made again, it is
                                left alone where it is whole
PREPARED_DIR                    has links to the rows of all of them, each in train/03, and to where documents came
                                from, in documents/train.parquet/03.parquet
"""

import json
import os
import re
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from pipeline.config.ownership import owned
from pipeline.config.schema import TRAIN_TOKENIZER, Config
from pipeline.data.corpus import resolve
from pipeline.data.document import SHARD
from pipeline.data.fingerprint import Known, fingerprint
from pipeline.data.prepared import load_files, load_report, prepare, write_descriptions
from pipeline.data.problems import PROBLEMS_KEPT
from pipeline.data.replacing import SHARDS, is_made_of, made_of, refuse_other_things, replaced
from pipeline.data.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Shard:
    number: int
    """From 1."""
    of: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """`3/16`. Raises ValueError where it says no such thing."""
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise ValueError(f"--shard: '{text}' is no part of a whole; give NUMBER/OF, 1/16 to 16/16")
        return cls(int(found[1]), int(found[2]))

    @property
    def name(self) -> str:
        return str(self.number).zfill(len(str(self.of)))


def prepare_shard(config: Config, shard: Shard) -> Config:
    """Prepare this part of the training files, and all held-out ones; returns the config that it is the dataset of."""
    own = config_of(config, shard)
    prepare(own, (shard.number - 1) * SHARD)
    return own


def config_of(config: Config, shard: Shard) -> Config:
    """Of a shard. Raises ValueError for what is one thing of the whole corpus, and for more shards than files."""
    data, tokenizer = config.data, config.model.tokenizer or config.model.name_or_path
    whole = {
        "data.mixture": (data.mixture, "prepare it in one go"),
        "data.max_sequences": (data.max_sequences, "leave it out"),
        "data.planted_noise": (data.planted_noise, "leave it out"),
        "task.kind sequence_classification": (config.task.classifies, "prepare it in one go"),
        "model.tokenizer train": (tokenizer == TRAIN_TOKENIZER, "train one on a few files, and name its directory"),
    }
    for key, (there, remedy) in whole.items():
        if there:
            raise ValueError(f"--shard: {key} is of the whole corpus and no shard knows the others: {remedy}")
    files = resolve(data.train_files or [])
    if len(files) < shard.of:
        raise ValueError(
            f"--shard: {shard.of} shards of {len(files)} training files leave some without any; take {len(files)} or "
            "fewer"
        )
    directory = f"{data.prepared_dir.rstrip('/')}.shards/{shard.name}-of-{shard.of}"
    return replace(config, data=replace(data, train_files=files[shard.number - 1 :: shard.of], prepared_dir=directory))


def merge(config: Config, of: int) -> None:
    """Make `data.prepared_dir` of its `of` shards, by links (copies where the file system has none). Rows, held-out
    text and tokenizer are theirs; figures are added up.

    Raises ValueError where a shard is missing or was made of something else.
    """
    if of < 1:
        raise ValueError(f"--merge: of {of} shards nothing can be made; give the number that the corpus was cut into")
    target = Path(config.data.prepared_dir).resolve()
    with owned(target, "data.prepared_dir"):
        refuse_other_things(target)
        shards = [Shard(number, of) for number in range(1, of + 1)]
        tokenizer, files = load_tokenizer(config), dict[str, Any]()
        directories = {shard.name: _whole(config_of(config, shard), shard, tokenizer) for shard in shards}
        for directory in directories.values():
            files |= load_files(directory)
        known = Known(files)
        new = fingerprint(config, tokenizer, known)
        if is_made_of(target, new):
            return
        first = next(iter(directories.values()))
        carved = ("eval",) if config.data.eval_fraction is not None else ()
        of_all = ("train", *carved)
        with replaced(target) as temporary:
            (temporary / "documents").mkdir()
            for path in sorted(first.iterdir()):
                if path.is_dir() and path.name not in (*of_all, "documents"):
                    _link(path, temporary / path.name)
            for path in sorted((first / "documents").iterdir()):
                if path.stem not in of_all:
                    _link(path, temporary / "documents" / path.name)
            for split in of_all:
                for name, directory in directories.items():
                    _link(directory / split, temporary / split / name)
                    places = Path("documents", f"{split}.parquet")
                    _link(directory / places, temporary / places / f"{name}.parquet")
            reports = [load_report(directory) for directory in directories.values()]
            report = {
                split: _together([report[split] for report in reports]) if split in of_all else part
                for split, part in reports[0].items()
            }
            for split, part in report.items():
                if split not in of_all and "overlap" in part:
                    # A text that two shards have is counted by both.
                    found = [report[split]["overlap"].get("train", 0) for report in reports]
                    part["overlap"]["train"] = min(sum(found), part["documents"])
            write_descriptions(temporary, report, known, new | {SHARDS: of})


def _whole(own: Config, shard: Shard, tokenizer: Any) -> Path:
    """The directory of a shard that is there and made of what `own` says."""
    directory = Path(own.data.prepared_dir)
    command = f"python -m pipeline.prepare --config ... --shard {shard.number}/{shard.of}"
    if not (directory / "fingerprint.json").exists():
        raise ValueError(f"--merge: {directory} is not there or not whole; make it: {command}")
    if made_of(directory) != json.loads(json.dumps(fingerprint(own, tokenizer, Known(load_files(directory))))):
        raise ValueError(
            f"--merge: {directory} was made of something else than the config says; make it again: {command}"
        )
    return directory


def _link(source: Path, target: Path) -> None:
    """A file, or all files under a directory, under another name as well."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, copy_function=_linked)
    else:
        _linked(str(source), str(target))


def _linked(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


def _together(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The parts of a report that several shards have of one split (`load_report`)."""
    numbers = ("documents", "tokens", "bytes", "sequences", "padding", "frame")
    subsets: dict[str, Counter[str]] = {}
    for part in parts:
        for name, counts in part["subsets"].items():
            subsets.setdefault(name, Counter()).update(counts)
    overlap = [Counter(part["overlap"]) for part in parts if "overlap" in part]
    return {
        **{key: sum(part[key] for part in parts) for key in numbers},
        "subsets": {name: dict(subsets[name]) for name in sorted(subsets)},
        "problems": dict(sum((Counter(part["problems"]) for part in parts), Counter())),
        "first_problems": [problem for part in parts for problem in part["first_problems"]][:PROBLEMS_KEPT],
        **({"overlap": dict(sum(overlap, Counter()))} if overlap else {}),
        "shards": [part["documents"] for part in parts],
    }
