"""Dropout in a model."""

import re
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

_RATE = re.compile("drop")
_OF_LAYERS = re.compile("layerdrop|layer_drop|drop_path")
"""Rates at which whole layers are left out."""
_OF_OTHER_TASKS = re.compile("classifi|summary")


def set_dropout(model: PreTrainedModel, rate: float) -> None:
    """Sets every dropout rate of the model to `rate`; at 0 no layer is left out at random either."""
    for _, owner, name in _rates(model):
        if rate == 0 or not _OF_LAYERS.search(name):
            setattr(owner, name, rate)


def dropout_rates(model: PreTrainedModel) -> dict[str, float]:
    """The rates above 0, by the last part of a module's name, or by what it or the config calls them."""
    return {label: float(rate) for label, owner, name in _rates(model) if (rate := getattr(owner, name)) > 0}


def noisy_forward(model: PreTrainedModel) -> str:
    """What dropout means for a run, in a sentence; empty where there is none."""
    rates = dropout_rates(model)
    if not rates:
        return ""
    return (
        f"dropout is active ({_listed(rates)}): the model is trained, and samples are scored, in noisy forwards; "
        "--model.dropout 0 turns it off"
    )


def refuse_dropout(model: PreTrainedModel) -> None:
    """Raises ValueError where a second forward draws otherwise than the first, so that what it is to take out of a
    gradient is not what the first put in."""
    if rates := dropout_rates(model):
        raise ValueError(
            "estimator 'ghost' takes dropped samples out of the gradient by a second pass, which dropout would change; "
            f"this model has {_listed(rates)}. Set model.dropout to 0, or policy.action to observe"
        )


def _listed(rates: dict[str, float]) -> str:
    return ", ".join(f"{name} {rate:g}" for name, rate in rates.items())


def _rates(model: Any) -> Iterator[tuple[str, Any, str]]:
    """Label, owner and attribute of every rate: of dropout modules, of modules that keep their own, and of the config,
    which some forwards read."""
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            label = next((part for part in reversed(path.split(".")) if not part.isdigit()), "dropout")
            yield label, module, "p"
            continue
        for name in _named(module):
            yield name, module, name
    text = model.config.get_text_config(decoder=True)
    for settings in (model.config, text) if text is not model.config else (model.config,):
        for name in _named(settings):
            yield name, settings, name


def _named(owner: Any) -> list[str]:
    return [
        name
        for name, value in vars(owner).items()
        if isinstance(value, int | float)
        and not isinstance(value, bool)
        and _RATE.search(name)
        and not _OF_OTHER_TASKS.search(name)
    ]
