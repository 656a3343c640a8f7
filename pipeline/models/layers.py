"""All weight matrices of a model at work, and which trained weights are none."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pipeline.models.adapters import at_work, refuse_unknown_adapters
from pipeline.models.experts import Experts, Router, experts_of, is_experts
from pipeline.models.layer import AnswerHead, Embedding, Layer, TransposedLayer, shape_of


@dataclass(frozen=True)
class Layers:
    """All trained weight matrices of a causal LM. What is frozen takes no part in any score."""

    linear: Mapping[str, Layer]
    """By module name, in the model's own order, the LM head, routers and experts (as one layer each) among them."""
    head: Layer
    words: Embedding
    """These two whether they are trained or not."""
    left_out: Mapping[str, str]
    """Trained parameters that are in no score, and by which rule."""

    @property
    def weights(self) -> set[str]:
        """Names of all parameters that are scored, by an estimator that scores all it can."""
        words = {self.words.weight} if self.words.trained else set()
        return self.linear_weights | words

    @property
    def linear_weights(self) -> set[str]:
        return _weights_of(self.linear.values())

    def want_trained_head(self, what: str) -> None:
        """Raises ValueError where `what` is of the head's own gradient, and the head is frozen."""
        if self.head.name not in self.linear:
            raise ValueError(
                f"{what} compares by the LM head's own gradient, and {self.head.weight} is frozen: leave it out of "
                "fidelity.estimators, or train the head (model.trainable)"
            )

    @property
    def body(self) -> Mapping[str, Layer]:
        """All linear maps but the head."""
        return {name: layer for name, layer in self.linear.items() if name != self.head.name}


VECTOR = "norms, biases and other vectors"
_POSITIONS = re.compile("pos|wpe|token_type|segment|lang")
POSITIONS = "embeddings of positions and of token types"
SEQUENCE = "convolutions along the sequence and state matrices"
"""Of state-space layers."""


def layers_of(model: PreTrainedModel) -> Layers:
    """Every trained parameter accounted for: scored as a `Layer`, or left out by a stated rule.

    Raises ValueError, naming them, for weights that are neither (experts and routers kept as bare parameters,
    other convolutions, adapters that are no plain LoRA), and for a model without a linear LM head or a word embedding,
    or that trains neither a linear layer nor the word embedding.
    """
    refuse_unknown_adapters(model)
    names = _parameter_names(model)
    every = {name: layer for name, module in model.named_modules() if (layer := _layer(name, module, names))}
    head = head_of(model)
    linear = {name: head if name == head.name else layer for name, layer in every.items() if layer.trained}
    words = words_of(model)
    scored = _weights_of([*linear.values(), words])
    others = {
        names[id(module.weight)]
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and id(module.weight) in names and _POSITIONS.search(name.split(".")[-1])
    }
    convolutions = {
        names[id(module.weight)]
        for module in model.modules()
        if isinstance(module, nn.Conv1d) and id(module.weight) in names
    }
    left_out, unknown = {}, {}
    for name, parameter in model.named_parameters():
        if name in scored or not parameter.requires_grad:
            continue
        shape = shape_of(parameter)
        if sum(size > 1 for size in shape) <= 1 or name.endswith("bias"):
            left_out[name] = VECTOR
        elif name in others:
            left_out[name] = POSITIONS
        elif name in convolutions or name.endswith("A_log"):
            left_out[name] = SEQUENCE
        else:
            unknown[name] = shape
    if unknown:
        raise ValueError(_unscored(model, unknown))
    layers = Layers(linear, head, words, left_out)
    if not layers.weights:
        raise ValueError(
            "nothing that is trained could be scored: no linear layer and no word embedding is among it. Train one of "
            "them too (model.trainable), or choose influence.estimator loss, random or none"
        )
    return layers


def _weights_of(layers: Iterable[Layer]) -> set[str]:
    layers = list(layers)
    return {layer.weight for layer in layers} | {layer.down for layer in layers if isinstance(layer, Experts)}


def _is_linear(module: nn.Module) -> bool:
    """Whether a module's output is the linear map of its input and nothing else is done to it."""
    forward = type(module).forward
    if forward in (nn.Linear.forward, Conv1D.forward):
        return True
    if not isinstance(module, nn.Linear):
        return False
    # A linear layer with a forward of its own, which routers have too: does it do the same on a plain one?
    plain = nn.utils.skip_init(nn.Linear, 3, 2)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.copy_(torch.arange(parameter.numel()).view_as(parameter))
        rows = torch.arange(6.0).view(2, 3)
        try:
            return bool(torch.allclose(forward(plain, rows), plain(rows)))
        except (TypeError, AttributeError, ValueError, RuntimeError):
            return False


def head_of(model: PreTrainedModel) -> Layer:
    """The LM head, or a classifier's last layer. Raises ValueError where the model has none."""
    head, names = at_work(model.get_output_embeddings()), _parameter_names(model)
    found = None
    for name, module in model.named_modules():
        if module is head and _is_linear(module):
            return _linear(name, module, names)
        if head is None and isinstance(module, nn.Linear) and module.out_features == model.config.num_labels:
            found = AnswerHead(name, module, names[id(module.weight)], module.in_features, module.out_features)
    if found is None:
        raise ValueError(f"{type(model).__name__} has no linear LM head, which every influence estimator needs")
    return found


def words_of(model: PreTrainedModel) -> Embedding:
    """The word embedding. Raises ValueError where the model has none that is a table of words."""
    try:
        given = model.get_input_embeddings()
    except NotImplementedError:  # transformers', of models that read something else
        given = None
    words = at_work(given) if isinstance(given, nn.Module) else None
    name = next((name for name, module in model.named_modules() if module is words), None)
    if words is None or name is None:
        raise ValueError(
            f"{type(model).__name__} has no word embedding that is known here; choose influence.estimator loss, "
            "random or none"
        )
    vocabulary, width = shape_of(words.weight)
    return Embedding(name, words, _parameter_names(model)[id(words.weight)], width, vocabulary)


def _layer(name: str, module: nn.Module, names: Mapping[int, str]) -> Layer | None:
    """The layer that a module is; None where it is none."""
    if _is_linear(module):
        return _linear(name, module, names)
    if is_experts(module):
        return experts_of(name, module, names)
    if Router.fits(module):
        weight: Any = module.weight
        outputs, inputs = shape_of(weight)
        return Router(name, module, names[id(weight)], inputs, outputs)
    return None


def _linear(name: str, module: Any, names: Mapping[int, str]) -> Layer:
    rows, columns = shape_of(module.weight)
    if isinstance(module, Conv1D):
        return TransposedLayer(name, module, names[id(module.weight)], rows, columns)
    return Layer(name, module, names[id(module.weight)], columns, rows)


def _parameter_names(model: nn.Module) -> dict[int, str]:
    return {id(parameter): name for name, parameter in model.named_parameters()}


def _unscored(model: PreTrainedModel, unknown: Mapping[str, tuple[int, ...]]) -> str:
    every = sum(prod(shape_of(parameter)) for parameter in model.parameters() if parameter.requires_grad)
    share = sum(map(prod, unknown.values())) / every
    shown = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in list(unknown.items())[:4])
    shown += ", ..." if len(unknown) > 4 else ""
    return (
        f"{type(model).__name__} trains {len(unknown)} weights, {share:.0%} of its parameters, that are no linear "
        f"layer and no embedding, so a score would leave them out: {shown}. Freeze them (model.trainable), or choose "
        "influence.estimator lli, which claims the LM head only, or loss, random or none"
    )
