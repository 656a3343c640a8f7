"""What made a dataset, so that one made of something else is noticed."""

import hashlib
import platform
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipeline.config.schema import Config
from pipeline.config.schema_data import BUILTIN
from pipeline.data.corpus import resolve
from pipeline.data.frame import frame_identity
from pipeline.data.hub import commit_of
from pipeline.data.tokenizer import vocabulary_size

FORMAT = 1  # raise it whenever the same inputs would give other rows


class Known:
    """What an earlier preparation found: the content of files by their whole path, size and times, and the commit of
    each hub corpus. Empty: every file is read, every hub asked."""

    def __init__(self, files: dict[str, Any] | None = None, fingerprint: dict[str, Any] | None = None) -> None:
        self.files: dict[str, Any] = {}
        """Of this time, to be kept for the next."""
        self._before = files or {}
        lists = [value for value in (fingerprint or {}).values() if isinstance(value, list)]
        found = [source for sources in lists for source in sources if "hub" in source]
        self._hubs = {source["hub"]: source.get("revision") for source in found}

    def content(self, path: Path) -> str:
        """The hash of a file. Its name, size and modification time alone are no identity: other directories have
        files that are alike in all of them."""
        times = _times(path)
        key = str(path.resolve())
        digest, *before = self._before.get(key, [""])
        if before != times:
            made = hashlib.blake2b(digest_size=16)
            with open(path, "rb") as file:
                while chunk := file.read(1 << 20):
                    made.update(chunk)
            digest = made.hexdigest()
        self.files[key] = [digest, *times]
        return digest

    def changed(self) -> list[str]:
        """The files that are gone, or are no longer what `content` saw."""
        return [
            path
            for path, (_, size, modified, _) in self.files.items()
            if not Path(path).is_file() or _times(Path(path))[:2] != [size, modified]
        ]

    def commit(self, source: str) -> str | None:
        """Of a hub corpus; what was prepared of an earlier one stays good until somebody prepares anew."""
        return self._hubs[source] if source in self._hubs else commit_of(source)


def _times(path: Path) -> list[int]:
    state = path.stat()
    return [state.st_size, state.st_mtime_ns, state.st_ctime_ns]


def fingerprint(
    config: Config,
    tokenizer: PreTrainedTokenizerBase | None,
    known: Known | None = None,
    raw_files: Mapping[str, str | list[str] | None] | None = None,
) -> dict[str, Any]:
    """Everything that decides what the rows are. `tokenizer` is None where it is trained; `raw_files`: others than
    the config's.

    Reads every file once, unless `known` has it.
    """
    data, known = config.data, known or Known()
    raw = data.raw_files if raw_files is None else raw_files
    planted: dict[str, Any] = {}
    if data.planted_noise:  # without it no keys: what was prepared before there was any stays what it is
        foreign = raw["planted_foreign_files"]
        planted = {
            "planted_noise": data.planted_noise,
            "planted_foreign_files": foreign and [_identity(source, known) for source in resolve(foreign)],
        }
    return {
        "format": FORMAT,
        **{
            key: files and [_identity(source, known) for source in resolve(files)] for key, files in raw.items()
            # Others are absent where there are none, as they were before there were any.
            if key == "eval_files" or (files and key != "planted_foreign_files")
        },
        "tokenizer": {"trained": vocabulary_size(config)} if tokenizer is None else _tokenizer_identity(tokenizer),
        "seed": preparation_seed(config),
        **{key: getattr(data, key) for key in (
            "sequence_length", "text_field", "subset_field", "max_sequences", "max_eval_sequences"
        )},
        **({"eval_fraction": data.eval_fraction} if data.eval_fraction is not None else {}),
        **planted,
        **_of_task(config, tokenizer),
    }  # fmt: skip


def _of_task(config: Config, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    """Labels and how texts become rows; of packed text its frame alone."""
    if not config.task.classifies:
        return frame_identity(tokenizer, config.data)
    return {"task": asdict(config.task)}


def preparation_seed(config: Config) -> int:
    """What seeds everything random in a preparation."""
    return config.seed if config.data.seed is None else config.data.seed


def _identity(source: str, known: Known) -> dict[str, Any]:
    """Of a file its name (not its directory, which may move), size and content; of the builtin text the Python version:
    a prepared copy outlives the packages that come and go in an installation; of a hub corpus its id and commit."""
    if source == BUILTIN:
        return {"builtin": platform.python_version()}
    path = Path(source)
    if not path.is_file():
        commit = known.commit(source)
        return {"hub": source, **({"revision": commit} if commit else {})}
    state = path.stat()
    content = known.content(path)
    return {"name": path.name, "size": state.st_size, "modified": state.st_mtime_ns, "blake2b": content}


def _tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        digest = hashlib.blake2b(digest_size=16)
        for path in sorted(Path(directory).iterdir()):
            # The settings file differs between versions of transformers; of it, only eos matters to the rows.
            if path.name != "tokenizer_config.json":
                digest.update(path.name.encode() + path.read_bytes())
    return {"blake2b": digest.hexdigest(), "eos": tokenizer.eos_token}
