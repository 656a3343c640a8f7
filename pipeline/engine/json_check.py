"""DeepSpeed's JSON held against what DeepSpeed knows, before there is any process group: keys, values, rates."""

import copy
import difflib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS, DeepSpeedConfig, DeepSpeedConfigError
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from pydantic import ValidationError

from pipeline.config.schema import Config
from pipeline.engine.schedule import rate_at

ELSEWHERE = {"sequence_parallel_size"}
"""Keys that DeepSpeed reads once there is a process group."""

PLAIN = (
    "optimizer",
    "scheduler",
    "activation_checkpointing",
    "checkpoint",
    "data_types",
    "flops_profiler",
    "aio",
    "torch_autocast",
)
"""Sections that DeepSpeed reads key by key, without a model that knows its fields."""

ITS_OWN_ADAM = {"torch_adam", "adam_w_mode", "fp32_optimizer_states"}


def check_deepspeed_json(config: Config, settings: dict[str, Any]) -> None:
    """Raises ValueError where DeepSpeed would ignore a key of `settings`, could not use a value, or where the schedule
    does not fit the run."""
    try:
        _check_keys(settings)
        _check_parallelism(settings)
        _check_optimizer(settings["optimizer"])
        if "scheduler" in settings:
            _check_scheduler(settings["scheduler"], config.max_steps)
    except ValueError as error:
        raise ValueError(f"{config.deepspeed_config}: {error}") from None


def notes(config: Config, settings: dict[str, Any]) -> list[str]:
    """What of a JSON without errors people should know before a run: rates of 0, a rate without effect, a warm-up that
    does not end, a section that nothing reads."""
    schedule, path, found = settings.get("scheduler"), config.deepspeed_config, list[str]()
    if "activation_checkpointing" in settings:
        found.append(
            f"{path}: activation_checkpointing has no effect, for transformers' models do not call DeepSpeed's; set "
            "model.activation_checkpointing instead"
        )
    if schedule is None:
        return found
    params = schedule["params"]
    idle = next((step for step in range(1, 101) if rate_at(settings, step)), 101) - 1
    if idle and settings["optimizer"]["params"]["lr"]:
        key = "warmup_min_ratio" if schedule["type"] == "WarmupCosineLR" else "warmup_min_lr"
        first = ' and "last_batch_iteration": 0' if schedule["type"] == "WarmupCosineLR" else ""
        found.append(
            f"{path}: {f'the first {idle} steps train' if idle > 1 else 'the first step trains'} at rate 0, so nothing "
            f"is learned from the samples; set {key} above 0{first} in scheduler.params"
        )
    warmup = params.get("warmup_num_steps", _default(schedule["type"], "warmup_num_steps"))
    if warmup and warmup > config.max_steps:
        found.append(
            f"{path}: the warm-up (scheduler.params.warmup_num_steps {warmup}) is longer than the run (max_steps "
            f"{config.max_steps}): the rate never reaches its peak"
        )
    peak = params.get("warmup_max_lr", _default(schedule["type"], "warmup_max_lr"))
    rate = settings["optimizer"]["params"]["lr"]
    if peak is not None and peak != rate:
        found.append(
            f"{path}: scheduler.params.warmup_max_lr {peak} is the rate; optimizer.params.lr {rate} has no effect"
        )
    return found


def _nearest(key: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else "; remove it"


class _Asked(dict):
    """A dict that remembers which of its keys, there or not, were asked for; so do the dicts inside."""

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__({k: _Asked(v) if isinstance(v, dict) else v for k, v in content.items()})
        self.asked: set[str] = set()

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def keys(self) -> Self:  # type: ignore[override]
        """`key in settings.keys()` is how DeepSpeed asks, too."""
        return self

    def __copy__(self) -> Self:
        return self


def _check_keys(settings: dict[str, Any]) -> None:
    asked = _Asked(copy.deepcopy(settings))
    if trouble := _refused_by_deepspeed(asked):
        raise ValueError(_whose(settings, trouble))
    for key in dict.__iter__(asked):
        if key not in asked.asked | ELSEWHERE:
            raise ValueError(f"{key} is no key of DeepSpeed's, which would ignore it{_nearest(key, asked.asked)}")
    for section in PLAIN:
        inner = dict.get(asked, section)
        if not isinstance(inner, _Asked):
            continue
        for key in dict.__iter__(inner):
            if key not in inner.asked:
                raise ValueError(
                    f"{section}.{key} is no key of DeepSpeed's, which would ignore it{_nearest(key, inner.asked)}"
                )


def _refused_by_deepspeed(settings: dict[str, Any]) -> Exception | None:
    try:
        DeepSpeedConfig(settings)
    except (ValueError, AssertionError, TypeError, AttributeError, KeyError, DeepSpeedConfigError) as error:
        return error
    return None


def _whose(settings: dict[str, Any], trouble: Exception) -> str:
    """The error in a sentence with the section that it is about: the one that alone gives it too."""
    base = {"train_micro_batch_size_per_gpu": 1}
    section = next((key for key in settings if _refused_by_deepspeed(_Asked(base | {key: settings[key]}))), "")
    if not isinstance(trouble, ValidationError):
        if section and not isinstance(settings[section], dict):
            return f"{section} cannot be {json.dumps(settings[section])} ({trouble})"
        return f"{section}: {trouble}" if section else str(trouble)
    first = trouble.errors()[0]
    key = ".".join([section, *map(str, first["loc"])]).strip(".")
    if first["type"] == "extra_forbidden":
        last = str(first["loc"][-1])
        return f"{key} is no key of DeepSpeed's{_nearest(last, _fields(trouble.title, len(first['loc']) > 1))}"
    return f"{key} cannot be {json.dumps(first['input'], default=str)}: {first['msg']}"


def _fields(title: str, nested: bool) -> set[str]:
    """The keys of one of DeepSpeed's models, or (nested) of all of them."""
    models = list(_models(DeepSpeedConfigModel))
    return {name for model in models if nested or model.__name__ == title for name in model.model_fields}


def _models(model: type[DeepSpeedConfigModel]) -> Iterator[type[DeepSpeedConfigModel]]:
    for kind in model.__subclasses__():
        yield kind
        yield from _models(kind)


def _parameters(kind: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(kind).parameters
    return {name: p for name, p in parameters.items() if name not in ("self", "params", "model_params", "optimizer")}


def _default(scheduler: str, name: str) -> Any:
    parameter = _parameters(getattr(lr_schedules, scheduler)).get(name)
    return None if parameter is None or parameter.default is parameter.empty else parameter.default


def _check_parallelism(settings: dict[str, Any]) -> None:
    """Refuses what DeepSpeed knows and the scores do not: ranks that share samples, or layers without their hooks."""
    tensor, expert = settings.get("tensor_parallel", {}), settings.get("expert_parallel", {})
    shared = {
        "tensor_parallel.autotp_size": tensor.get("autotp_size", 0),
        "expert_parallel.enabled": expert.get("enabled", False),
        "sequence_parallel_size": settings.get("sequence_parallel_size", 1),
    }
    for key, value in shared.items():
        if value not in (0, 1) or value is True:
            raise ValueError(
                f"{key} {json.dumps(value)} lets ranks share samples or layers, and here each rank scores samples of "
                "its own by whole layers; remove it. zero_optimization.stage 3 partitions weights among ranks instead"
            )
    if "compile" in settings:
        raise ValueError(
            "compile is for engine.compile(), which is not called here: what watches the layers would break the "
            "compiled graph; remove it"
        )


def _check_optimizer(section: dict[str, Any]) -> None:
    name, params = section.get("type"), section["params"]
    theirs = [n for n, kind in vars(torch.optim).items() if inspect.isclass(kind) and n not in ("Optimizer", "LBFGS")]
    if not isinstance(name, str) or (name.lower() not in DEEPSPEED_OPTIMIZERS and name not in theirs):
        raise ValueError(
            f"optimizer.type {json.dumps(name)} is no optimizer of DeepSpeed's or torch's"
            f"{_nearest(str(name), ['AdamW', 'Adam', 'Adagrad', 'Lamb', 'Lion', 'Muon', *theirs]) if name else ''}"
        )
    known: dict[str, Any] | None
    if name.lower() in ("adam", "adamw"):
        ours = (torch.optim.AdamW,) if params.get("torch_adam") else (FusedAdam, DeepSpeedCPUAdam)
        known = {key: p for kind in ours for key, p in _parameters(kind).items()} | dict.fromkeys(ITS_OWN_ADAM)
    else:
        known = _parameters(getattr(torch.optim, name)) if name in theirs else None  # others' are DeepSpeed's to judge
    if "max_grad_norm" in params:
        raise ValueError("optimizer.params.max_grad_norm is no setting of DeepSpeed's; say it as gradient_clipping")
    for key in params:
        if known is not None and key not in known:
            raise ValueError(f"optimizer.params.{key} is no setting of {name}{_nearest(key, known)}")
    if "lr" not in params:
        raise ValueError("optimizer.params.lr, the learning rate, is missing; DeepSpeed would take a default")
    _numbers("optimizer.params", params, ("lr", "eps", "weight_decay", "momentum", "lr_decay", "alpha"))
    if "betas" in params:
        betas = params["betas"]
        if not isinstance(betas, list) or len(betas) != 2 or not all(_number(b) and 0 <= b < 1 for b in betas):
            raise ValueError(f"optimizer.params.betas must be two numbers from 0 to below 1, not {json.dumps(betas)}")
    for key in ("torch_adam", "adam_w_mode", "amsgrad", "nesterov"):
        if type(params.get(key, False)) is not bool:
            raise ValueError(f"optimizer.params.{key} must be true or false, not {json.dumps(params[key])}")


def _check_scheduler(section: dict[str, Any], steps: int) -> None:
    name, params = section.get("type"), section["params"]
    if not isinstance(name, str) or name not in lr_schedules.VALID_LR_SCHEDULES:
        others = ", ".join(lr_schedules.VALID_LR_SCHEDULES)
        near = _nearest(str(name), lr_schedules.VALID_LR_SCHEDULES).replace("; remove it", "")
        raise ValueError(f"scheduler.type {json.dumps(name)} is none of DeepSpeed's ({others}){near}")
    known = _parameters(getattr(lr_schedules, name))
    for key in params:
        if key not in known:
            raise ValueError(f"scheduler.params.{key} is no setting of {name}{_nearest(key, known)}")
    if missing := [key for key, p in known.items() if p.default is p.empty and key not in params]:
        auto = ' ("auto": max_steps)' if "total_num_steps" in missing else ""
        raise ValueError(f"scheduler.params.{missing[0]}{auto} is missing, which {name} needs")
    ratios = [key for key in known if key.endswith(("_lr", "_ratio", "_rate", "_mom"))]
    _numbers("scheduler.params", params, ratios)
    for key in ("total_num_steps", "warmup_num_steps"):
        if key in params and (type(params[key]) is not int or params[key] < 1):
            raise ValueError(
                f"scheduler.params.{key} must be a whole number of at least 1, not {json.dumps(params[key])}"
            )
    if type(begin := params.get("last_batch_iteration", -1)) is not int or begin < -1:
        raise ValueError(f"scheduler.params.last_batch_iteration must be -1 or more, not {json.dumps(begin)}")
    if params.get("warmup_type", "log") not in ("log", "linear"):
        raise ValueError(f"scheduler.params.warmup_type must be log or linear, not {json.dumps(params['warmup_type'])}")
    for key in ("warmup_min_ratio", "cos_min_ratio"):
        if params.get(key, 0) > 1:
            raise ValueError(f"scheduler.params.{key} is a fraction of the rate, from 0 to 1, not {params[key]}")
    low, high = (params.get(key, _default(name, key)) for key in ("warmup_min_lr", "warmup_max_lr"))
    if _number(low) and _number(high) and low > high:
        raise ValueError(f"scheduler.params.warmup_min_lr {low} is above warmup_max_lr {high}; lower it")
    total = params.get("total_num_steps")
    if total and total < steps:
        raise ValueError(
            f"scheduler.params.total_num_steps {total} is less than max_steps {steps}: the last {steps - total} steps "
            'would train at the end of the schedule; write "auto", or lower max_steps. (For a constant rate from some '
            "step on, resume there without a scheduler, with that rate as optimizer.params.lr)"
        )
    warmup = params.get("warmup_num_steps", _default(name, "warmup_num_steps"))
    if total and total > steps and warmup >= total:
        raise ValueError(
            f"scheduler.params.warmup_num_steps {warmup} is not less than total_num_steps {total}: no step would "
            "follow the warm-up; lower it"
        )


def _number(value: Any) -> bool:
    return type(value) in (int, float)


def _numbers(section: str, params: dict[str, Any], keys: Iterable[str]) -> None:
    """Each of `keys` that is there is a number of at least 0 (or, of a scheduler, a list of one for every group)."""
    for key in keys:
        value = params.get(key, 0)
        several = value if isinstance(value, list) and section.startswith("scheduler") else [value]
        if not all(_number(each) and each >= 0 for each in several):
            raise ValueError(f"{section}.{key} must be a number of at least 0, not {json.dumps(value)}")
