"""The finished run that a run's held-out figures are held against at its end."""

import json
from pathlib import Path
from typing import Any

from pipeline.config.schema import Config
from pipeline.data.prepared import load_fingerprint
from pipeline.record.starts import config_of_run

_HELD_OUT = ("eval_files", "eval_fraction", "max_eval_sequences", "tokenizer", "sequence_length", "text_field", "frame")
_LABELS = ("kind", "label_field", "pair_field")


def comparison(config: Config) -> dict[str, Any] | None:
    """`run_dir` and the last held-out figures, `evaluation`, of `observe.compare_with`; None where none is named.
    Raises ValueError where that is no finished run with such figures, or they are of other text."""
    name = config.observe.compare_with
    if name is None:
        return None
    path = Path(name, "summary.json")
    figures = json.loads(path.read_text())["evaluation_after"] if path.is_file() else None
    if figures is None:
        why = "has no held-out figures" if path.is_file() else "has no summary.json, so it is no finished run"
        raise ValueError(
            f"observe.compare_with: {name} {why}; name a run that ended with data.eval_files, or leave it out"
        )
    directories = (config.data.prepared_dir, config_of_run(Path(name))["data"]["prepared_dir"])
    own, other = (_text(directory) for directory in directories)
    if differing := [key for key in own if own[key] != other[key]]:
        raise ValueError(
            f"observe.compare_with: {name} was evaluated on other text ({', '.join(differing)} differ), so figures do "
            "not compare; name a run with the same held-out text and tokenizer, or leave it out"
        )
    return {"run_dir": name, "evaluation": figures}


def _text(prepared_dir: str) -> dict[str, Any]:
    """What decides on the held-out text of a prepared dataset."""
    found = load_fingerprint(prepared_dir)
    own: dict[str, Any] = {key: found.get(key) for key in _HELD_OUT}
    own |= {f"task.{key}": found.get("task", {}).get(key) for key in _LABELS}
    if own["eval_fraction"] is not None:
        own["train_files"] = found.get("train_files")
    for key in ("eval_files", "train_files"):
        if own.get(key):
            own[key] = [{name: value for name, value in file.items() if name != "modified"} for file in own[key]]
    return own
