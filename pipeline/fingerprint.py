"""What made a dataset, so that one made of something else is noticed."""

import hashlib
import tempfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipeline.builtin import builtin_documents
from pipeline.config import BUILTIN, Config
from pipeline.corpus import resolve
from pipeline.document import Split
from pipeline.tokenizer import vocabulary_size

FORMAT = 1  # raise it whenever the same inputs would give other rows


def fingerprint(config: Config, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    """Everything that decides what the rows are; reads every file once. `tokenizer` is None where it is trained."""
    data = config.data
    return {
        "format": FORMAT,
        "train_files": [_identity(source, "train") for source in resolve(data.train_files)],
        "eval_files": None if data.eval_files is None else [_identity(s, "eval") for s in resolve(data.eval_files)],
        "tokenizer": {"trained": vocabulary_size(config)} if tokenizer is None else _tokenizer_identity(tokenizer),
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


def changes(old: dict[str, Any], new: dict[str, Any]) -> str:
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
