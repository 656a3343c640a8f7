"""What a run takes where only its model and its text are named: a place for everything, and a DeepSpeed JSON."""

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from pipeline.config.schema import TRAIN_TOKENIZER
from pipeline.config.schema_data import BUILTIN, DataConfig
from pipeline.data.corpus import SUFFIXES
from pipeline.data.limits import positions_of

HERE = Path(__file__).parent
JSON = HERE / "deepspeed_default.json"
JSON_BF16 = HERE / "deepspeed_default_bf16.json"


def defaults(given: Mapping[str, Any]) -> dict[str, str]:
    """Values for keys that are not `given`, flat with dots, where some of those are missing that every run needs:

    run_dir, data.prepared_dir    under runs/, by the names of model and text
    deepspeed_config              AdamW at a low rate, ZeRO 2; bf16 where there is an accelerator, else float32
    data.sequence_length          what the model has positions for, where that is less than its default
    model.tokenizer               trained on the text, for a model from scratch

    None where no model is named.
    """
    needed = ("run_dir", "deepspeed_config", "data.prepared_dir")
    if "model.name_or_path" not in given or all(key in given for key in needed):
        return {}
    model = str(given["model.name_or_path"])
    name = f"{_name(model)}-{_name(_first_files(given))}"
    accelerated = torch.accelerator.is_available()
    found = {
        "run_dir": f"runs/{name}",
        "data.prepared_dir": f"runs/data/{name}",
        "deepspeed_config": str(JSON_BF16 if accelerated else JSON),
    }
    limit = positions_of(model)
    if limit is not None and limit < DataConfig.sequence_length:
        found["data.sequence_length"] = str(limit)
    if model.endswith(".json"):
        found["model.tokenizer"] = TRAIN_TOKENIZER
    return {key: value for key, value in found.items() if key not in given}


def _first_files(given: Mapping[str, Any]) -> str:
    """The first of `data.train_files`; of a mixture there is no first."""
    if any(key.startswith("data.mixture") for key in given):
        return "mixture"
    files = given.get("data.train_files", BUILTIN)
    if isinstance(files, str) and files.startswith("["):
        with suppress(ValueError):  # no list, but a glob that begins with a bracket
            files = json.loads(files)
    return str(files[0] if isinstance(files, list) and files else files)


def _name(path: str) -> str:
    """The last part of a path, glob or hub id that says something, without suffix, in letters that any file system
    takes."""
    parts = [part for part in path.split("/") if part.strip("*?.") and part.lstrip("*?") not in SUFFIXES]
    last = parts[-1] if parts else path
    for suffix in (*SUFFIXES, ".json", ".gguf"):
        last = last.removesuffix(suffix)
    return re.sub(r"[^\w.-]+", "-", last.partition("@")[0]).strip("-.") or "text"
