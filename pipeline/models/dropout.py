"""Dropout in a model."""

from torch import nn
from transformers import PreTrainedModel


def refuse_dropout(model: PreTrainedModel) -> None:
    """Raises ValueError where a second forward draws otherwise than the first, so that what it is to take out of a
    gradient is not what the first put in."""
    rates = {name: module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout) and module.p}
    if rate := getattr(model.config, "attention_dropout", 0):  # some architectures have no module for it
        rates["attention_dropout"] = rate
    if rates:
        raise ValueError(
            "estimator 'ghost' takes dropped samples out of the gradient by a second pass, which dropout would change; "
            f"this model has {rates}. Set them to 0 in its config.json, or policy.action to observe"
        )
