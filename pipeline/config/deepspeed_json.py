"""DeepSpeed's JSON, read and checked: the only place of batch sizes, precision, optimizer, clipping and ZeRO.

What DeepSpeed itself knows of its keys is asked in `engine.json_check`.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.config.schema import Config

SECTIONS = ("optimizer", "scheduler", "zero_optimization", "bf16", "fp16", "torch_autocast")
"""Keys that hold an object of their own keys, and that we read ourselves."""

FREE_TEXT = ("tensorboard", "wandb", "comet", "csv_monitor")
"""Sections in which a string may look like a number: names of jobs."""


def read_deepspeed_config(config: Config) -> dict[str, Any]:
    """DeepSpeed's JSON as a dict, with a scheduler's `total_num_steps: "auto"` filled from `max_steps`.

    Raises ValueError where it is missing, is not JSON, has values of the wrong kind, or is silent or "auto" about what
    only it can say.
    """
    path = Path(config.deepspeed_config)
    settings = _read(path)
    for key, value in settings.items():
        if value is None:
            raise ValueError(f"{path}: {key} is null; leave it out for DeepSpeed's default, or fill it in")
        if key in SECTIONS and not isinstance(value, dict):
            raise ValueError(f"{path}: {key} must be an object, {{...}}, not {json.dumps(value)}")
    for key in ("optimizer", "scheduler"):
        if key in settings and not isinstance(settings[key].setdefault("params", {}), dict):
            raise ValueError(
                f"{path}: {key}.params must be an object, {{...}}, not {json.dumps(settings[key]['params'])}"
            )
    for key, text in _strings({k: v for k, v in settings.items() if k not in FREE_TEXT}):
        if text.lower() in ("true", "false"):
            raise ValueError(f'{path}: {key} must be true or false without quotes, not "{text}"')
        if _is_number(text):
            raise ValueError(f'{path}: {key} must be a number without quotes, not "{text}"')
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
    if auto := [key for key, text in _strings(settings) if text == "auto"]:
        raise ValueError(f'{path}: only scheduler.params.total_num_steps may say "auto", not {", ".join(auto)}')
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        if type(settings.setdefault(key, 1)) is not int or settings[key] < 1:
            raise ValueError(f"{path}: {key} must be a whole number of at least 1, not {json.dumps(settings[key])}")
    clipping = settings["gradient_clipping"]
    if type(clipping) not in (int, float) or clipping < 0:
        raise ValueError(f"{path}: gradient_clipping must be a number, 0 (none) or more, not {json.dumps(clipping)}")
    stage = settings.get("zero_optimization", {}).get("stage", 0)
    if type(stage) is not int or stage not in range(4):
        raise ValueError(f"{path}: zero_optimization.stage must be 0, 1, 2 or 3, not {json.dumps(stage)}")
    # DeepSpeed's progress lines would interrupt the progress bar.
    return {"steps_per_print": sys.maxsize, **settings}


def _read(path: Path) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if again := sorted({key for key in keys if keys.count(key) > 1}):
            raise ValueError(f"deepspeed_config: {path} has {', '.join(again)} twice; keep one of them")
        return dict(pairs)

    def no_number(name: str) -> None:
        raise ValueError(f"deepspeed_config: {path} is not JSON: {name} is no number there")

    try:
        settings = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once, parse_constant=no_number)
    except FileNotFoundError:
        raise ValueError(f"deepspeed_config: no file {path}; ds_configs/ holds ready ones") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"deepspeed_config: {path} is not JSON: {error}") from None
    except OSError as error:
        raise ValueError(f"deepspeed_config: {path} cannot be read ({error.strerror}); give a readable file") from None
    if not isinstance(settings, dict):
        raise ValueError(f"deepspeed_config: {path} must hold an object, {{...}}, not {json.dumps(settings)[:40]}")
    return settings


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every string in there, with its dotted key."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _strings(inner, f"{key}.{name}".strip("."))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _strings(inner, f"{key}.{index}")
