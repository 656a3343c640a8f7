"""DeepSpeed's JSON, read and checked: the only place of batch sizes, precision, optimizer, clipping and ZeRO."""

import json
import sys
from pathlib import Path
from typing import Any

from pipeline.config.schema import Config


def read_deepspeed_config(config: Config) -> dict[str, Any]:
    """DeepSpeed's JSON as a dict, with a scheduler's `total_num_steps: "auto"` filled from `max_steps`.

    Raises ValueError where it is missing, is not JSON, or is silent or "auto" about what only it can say.
    """
    path = Path(config.deepspeed_config)
    try:
        settings: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"deepspeed_config: no file {path}; ds_configs/ holds ready ones") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"deepspeed_config: {path} is not JSON: {error}") from None
    if "train_batch_size" in settings:
        raise ValueError(f"{path}: remove train_batch_size; it follows from ranks x micro-batch x accumulation")
    for key, why in {
        "train_micro_batch_size_per_gpu": "samples per rank and micro-batch",
        "gradient_clipping": "DeepSpeed would clip at 1.0 without a word; write 1.0, or 0 for none",
        "optimizer": "its type and params",
    }.items():
        if key not in settings:
            raise ValueError(f"{path}: {key} is missing ({why})")
    schedule = settings.get("scheduler", {}).get("params", {})
    if schedule.get("total_num_steps") == "auto":
        schedule["total_num_steps"] = config.max_steps
    if auto := list(_auto_keys(settings)):
        raise ValueError(f'{path}: only scheduler.params.total_num_steps may say "auto", not {", ".join(auto)}')
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        if not isinstance(settings.setdefault(key, 1), int) or settings[key] < 1:
            raise ValueError(f"{path}: {key} must be a whole number of at least 1, not {settings[key]!r}")
    # DeepSpeed's progress lines would interrupt the progress bar.
    return {"steps_per_print": sys.maxsize, **settings}


def _auto_keys(settings: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in settings.items():
        if isinstance(value, dict):
            found += _auto_keys(value, f"{prefix}{key}.")
        elif value == "auto":
            found.append(prefix + key)
    return found
