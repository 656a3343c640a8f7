"""Adapters of the peft library in a model: added by a config of theirs, and told apart from what they wrap."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NAME = "default"


def adapter_settings(path: str) -> dict[str, Any]:
    """The PEFT config at `path`, a file or a directory. Raises ValueError where there is none."""
    file = Path(path, CONFIG) if Path(path).is_dir() else Path(path)
    try:
        settings = json.loads(file.read_text())
        if not isinstance(settings, dict) or "peft_type" not in settings:
            raise ValueError("it has no peft_type")
        return settings
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model.peft: {file} is no PEFT config ({error}); give an {CONFIG} or a directory with one, such as "
            "peft.LoraConfig(...).save_pretrained(DIR) writes"
        ) from error


def add_adapter(model: PreTrainedModel, path: str, seed: int) -> None:
    """Adds the adapter whose config is at `path`, drawn from `seed`, or with the weights that lie beside it; all else
    is frozen. Raises ValueError where the library is not there or does not take the config."""
    config = _config(path)
    torch.manual_seed(seed)
    _inject(model, config)
    weights = Path(path, WEIGHTS)
    if weights.is_file():
        from peft import set_peft_model_state_dict

        found: Any = set_peft_model_state_dict(model, load_file(weights), NAME)
        if found.unexpected_keys:
            raise ValueError(
                f"model.peft: {weights} holds {', '.join(sorted(found.unexpected_keys)[:4])}, for which its config has "
                "no place"
            )


def add_alike(twin: PreTrainedModel, model: PreTrainedModel, path: str) -> None:
    """Adds to `twin`, a model of fewer blocks, adapters to the modules that have them in any block of `model`."""
    config = copy.deepcopy(_config(path))
    wrapped = {without_numbers(name) for name, module in model.named_modules() if _is_adapter(module)}
    config.target_modules = [name for name, _ in twin.named_modules() if without_numbers(name) in wrapped]
    if hasattr(config, "layers_to_transform"):
        config.layers_to_transform = config.layers_pattern = None
    _inject(twin, config)


def at_work(module: Any) -> Any:
    """What the linear map or the embedding is of a module that an adapter wraps: its copy that is trained, or the
    original."""
    while True:
        if hasattr(module, "modules_to_save"):
            module = module.modules_to_save[module.active_adapters[0]]
        elif hasattr(module, "base_layer"):
            module = module.base_layer
        else:
            return module


def refuse_unknown_adapters(model: nn.Module) -> None:
    """Raises ValueError, naming them, for trained adapters that do not come to linear layers, each applied to its input
    as a plain LoRA's are."""
    for name, module in model.named_modules():
        if not _is_adapter(module) or not any(parameter.requires_grad for parameter in module.parameters()):
            continue
        kind, variants = type(module), list(getattr(module, "lora_variant", {}).values())
        if kind.__module__.startswith("peft.tuners.lora") and kind.__name__.startswith("Linear") and not variants:
            continue
        what = type(variants[0] if variants else module)
        raise ValueError(
            f"the adapter at {name} ({what.__module__}.{what.__name__}) is no plain LoRA of a linear layer, so no "
            "score knows its gradients; choose one in the PEFT config (peft_type LORA, use_dora false, target_modules "
            "that are linear layers), or influence.estimator loss, random or none"
        )


def without_numbers(name: str) -> str:
    """A parameter's or module's name, the same for all blocks."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _is_adapter(module: nn.Module) -> bool:
    return hasattr(module, "base_layer") and hasattr(module, "adapter_layer_names")


def _config(path: str) -> Any:
    settings = adapter_settings(path)
    try:
        from peft import PeftConfig
    except ImportError as error:
        raise ValueError(
            f"model.peft: the peft library is not there ({error}); install it: pip install -c launch/constraints.txt "
            "-e '.[peft]'"
        ) from error
    try:
        config = PeftConfig.from_peft_type(**settings | {"inference_mode": False})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"model.peft: the peft library does not take the config at {path}: {error}") from error
    how = getattr(config, "init_lora_weights", True)
    if isinstance(how, str) and how != "gaussian":
        raise ValueError(
            f"model.peft: init_lora_weights '{how}' changes the weights that the adapter is for, so it would not fit "
            "them when it is loaded again; set it to true or gaussian"
        )
    return config


def _inject(model: PreTrainedModel, config: Any) -> None:
    from peft.utils.other import set_additional_trainable_modules

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    try:
        model.add_adapter(config, NAME)
        set_additional_trainable_modules(model, config, model.config.to_dict(), NAME)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ValueError(f"model.peft: the adapter cannot be added to {type(model).__name__}: {error}") from error
