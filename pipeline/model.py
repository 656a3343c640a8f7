"""The causal LM from transformers, with or without ZeRO-3; its linear layers and its head."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled
from transformers.pytorch_utils import Conv1D

from pipeline.config import ModelConfig


def load_model(config: ModelConfig, seed: int, deepspeed_config: dict[str, Any] | None = None) -> PreTrainedModel:
    """The model in float32 (DeepSpeed casts it), in training mode; partitioned from the start under ZeRO-3.

    `name_or_path` is a hub id or a directory with weights, or a `*.json` model config: then the weights are random,
    from `seed`. Raises ValueError where there is no such model.
    """
    # Alive while the model is made, this makes transformers load and initialise ZeRO-3 partitions correctly, tied
    # weights included; a bare deepspeed.zero.Init initialises GPT-Neo wrongly.
    zero3 = HfDeepSpeedConfig(deepspeed_config) if deepspeed_config else None
    torch.manual_seed(seed)
    try:
        if config.name_or_path.endswith(".json"):
            model = _from_scratch(json.loads(Path(config.name_or_path).read_text()), zero3=is_deepspeed_zero3_enabled())
        else:
            model = AutoModelForCausalLM.from_pretrained(config.name_or_path, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise _no_model(config, error) from error
    del zero3
    if config.activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model.train()


def model_without_weights(config: ModelConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The same model on torch's meta device: shapes only, whatever its size. Raises ValueError where there is none."""
    name = config.name_or_path
    try:
        json_settings = json.loads(Path(name).read_text()) if name.endswith(".json") else None
        settings = AutoConfig.for_model(**json_settings) if json_settings else AutoConfig.from_pretrained(name)
        with torch.device("meta"), no_init_weights():
            model = AutoModelForCausalLM.from_config(settings, dtype=dtype)
    except (OSError, ValueError) as error:
        raise _no_model(config, error) from error
    model.tie_weights()
    if config.activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model.train()


def _no_model(config: ModelConfig, error: Exception) -> ValueError:
    return ValueError(
        f"model.name_or_path: no model could be loaded from '{config.name_or_path}' ({error}); give a hub id, a "
        "directory with weights, or a model config (*.json) to start from scratch"
    )


def _from_scratch(settings: dict[str, Any], zero3: bool) -> PreTrainedModel:
    """Random weights that are a function of the seed, not of the ZeRO stage.

    Under ZeRO-3 transformers initialises every module once, when all are there; elsewhere torch has drawn weights for
    each as it was made, before. Those draws are left out, so both begin at the same one.
    """
    with nullcontext() if zero3 else no_init_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=torch.float32)
    if not zero3:
        model.initialize_weights()
        model.tie_weights()
    return model


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Every linear map, the LM head included, by name, in the model's own order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def head_layer(model: PreTrainedModel) -> tuple[str, nn.Linear]:
    """The LM head and its name. Raises ValueError where the model has none."""
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if module is head and isinstance(module, nn.Linear):
            return name, module
    raise ValueError(f"{type(model).__name__} has no linear LM head, which every influence estimator needs")


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The transformer's blocks, from the embedding on. Raises ValueError where there is no list of them."""
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == model.config.num_hidden_layers:
            return module
    raise ValueError(f"{type(model).__name__} has no list of {model.config.num_hidden_layers} blocks")


def layer_shape(module: Any) -> tuple[int, int]:
    """Inputs and outputs of a layer (or of a word embedding: width and vocabulary), also where ZeRO-3 holds a part."""
    rows, columns = getattr(module.weight, "ds_shape", module.weight.shape)
    return (rows, columns) if is_conv1d(module) else (columns, rows)


def is_conv1d(module: nn.Module) -> bool:
    """Whether a linear map stores its weight as (inputs, outputs), as GPT-2's do."""
    return isinstance(module, Conv1D)


def final_norm(model: PreTrainedModel) -> nn.Module:
    """The norm before the LM head. Raises ValueError where the model's last module is none."""
    for name in ("ln_f", "norm", "final_layer_norm"):
        for module in (model.base_model, getattr(model.base_model, "decoder", None)):
            if (norm := getattr(module, name, None)) is not None:
                return norm
    raise ValueError(
        f"{type(model).__name__} has no final norm by a name that is known here (ln_f, norm, final_layer_norm), which "
        "estimator 'residual' needs; choose another estimator"
    )
