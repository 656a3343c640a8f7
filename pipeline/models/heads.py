"""The norm before the LM head and the blocks below it, found in a model."""

from torch import nn
from transformers import PreTrainedModel


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The transformer's blocks, from the embedding on. Raises ValueError where there is no list of them."""
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == model.config.num_hidden_layers:
            return module
    raise ValueError(f"{type(model).__name__} has no list of {model.config.num_hidden_layers} blocks")


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
