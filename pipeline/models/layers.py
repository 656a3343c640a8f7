"""The linear layers of a model: names, orientation, logical shapes."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Every linear map, the LM head included, by name, in the model's own order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def layer_shape(module: Any) -> tuple[int, int]:
    """Inputs and outputs of a layer (or of a word embedding: width and vocabulary), also where ZeRO-3 holds a part."""
    rows, columns = getattr(module.weight, "ds_shape", module.weight.shape)
    return (rows, columns) if is_conv1d(module) else (columns, rows)


def is_conv1d(module: nn.Module) -> bool:
    """Whether a linear map stores its weight as (inputs, outputs), as GPT-2's do."""
    return isinstance(module, Conv1D)
