"""What made a dataset, so that one made of something else is noticed."""

import hashlib
import platform
import tempfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipeline.config.schema import BUILTIN, Config
from pipeline.data.corpus import resolve
from pipeline.data.tokenizer import vocabulary_size

FORMAT = 1  # raise it whenever the same inputs would give other rows


def fingerprint(
    config: Config, tokenizer: PreTrainedTokenizerBase | None, known: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Everything that decides what the rows are. `tokenizer` is None where it is trained.

    Reads every file once, unless `known`, an earlier fingerprint, has one of the same name, size and modification time.
    """
    data, seen = config.data, known or {}
    known_files = {
        (file["name"], file["size"], file.get("modified")): file
        for key in ("train_files", "eval_files", "reference_files", "planted_foreign_files")
        for file in seen.get(key) or []
        if "name" in file
    }
    planted: dict[str, Any] = {}
    if data.planted_noise:  # without it no keys: what was prepared before there was any stays what it is
        foreign = data.planted_foreign_files
        planted = {
            "planted_noise": data.planted_noise,
            "planted_foreign_files": foreign and [_identity(source, known_files) for source in resolve(foreign)],
        }
    return {
        "format": FORMAT,
        **{name: files and [_identity(source, known_files) for source in resolve(files)] for name, files in {
            "train_files": data.train_files,
            "eval_files": data.eval_files,
            # Absent where there is none, as it was before there were any.
            **({"reference_files": data.reference_files} if data.reference_files else {}),
        }.items()},
        "tokenizer": {"trained": vocabulary_size(config)} if tokenizer is None else _tokenizer_identity(tokenizer),
        "seed": preparation_seed(config),
        **{key: getattr(data, key) for key in (
            "sequence_length", "text_field", "subset_field", "max_sequences", "max_eval_sequences"
        )},
        **planted,
    }  # fmt: skip


def preparation_seed(config: Config) -> int:
    """What seeds everything random in a preparation."""
    return config.seed if config.data.seed is None else config.data.seed


def _identity(source: str, known_files: dict[tuple[str, int, int], dict[str, Any]]) -> dict[str, Any]:
    """Of a file its name (not its directory, which may move), size and content; of the builtin text the Python version:
    a prepared copy outlives the packages that come and go in an installation; of a hub corpus its id."""
    if source == BUILTIN:
        return {"builtin": platform.python_version()}
    if not Path(source).is_file():
        return {"hub": source}
    state = Path(source).stat()
    name, size, modified = Path(source).name, state.st_size, state.st_mtime_ns
    if (name, size, modified) in known_files:
        return known_files[name, size, modified]
    digest = hashlib.blake2b(digest_size=16)
    with open(source, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return {"name": name, "size": size, "modified": modified, "blake2b": digest.hexdigest()}


def _tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        digest = hashlib.blake2b(digest_size=16)
        for path in sorted(Path(directory).iterdir()):
            # The settings file differs between versions of transformers; of it, only eos matters to the rows.
            if path.name != "tokenizer_config.json":
                digest.update(path.name.encode() + path.read_bytes())
    return {"blake2b": digest.hexdigest(), "eos": tokenizer.eos_token}
