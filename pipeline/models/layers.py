"""The weight matrices of a model at work: names, orientation, logical shapes; and which trained weights are none.

The only place that knows how a weight is stored and what its parameter is called.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pipeline.models.second_moments import Means


@dataclass(frozen=True, eq=False)
class Layer:
    """A linear map: outputs = inputs x weight. `nn.Linear`, stored as (outputs, inputs)."""

    name: str
    """The module's."""
    module: nn.Module
    weight: str
    """The parameter's name; tied modules share it."""
    inputs: int
    outputs: int
    """Logical sizes, also where ZeRO-3 holds a part."""

    def input_rows(self, args: tuple[Any, ...]) -> Tensor:
        """What a forward gives the module, (N, inputs) for the N positions, detached."""
        return args[0].detach().flatten(0, -2)

    def output_rows(self, gradient: Tensor) -> Tensor:
        """A gradient at the module's output, (N, outputs)."""
        return gradient.flatten(0, -2)

    def means(self, means: Means) -> tuple[Tensor, Tensor]:
        """Of the weight's second moments: of every output (over inputs), (outputs,), and of every input, (inputs,)."""
        return means[self.weight]


class TransposedLayer(Layer):
    """GPT-2's `Conv1D`: a linear map stored as (inputs, outputs)."""

    def means(self, means: Means) -> tuple[Tensor, Tensor]:
        rows, columns = means[self.weight]
        return columns, rows


class Embedding(Layer):
    """A word embedding: a linear map of one-hot rows, stored as (vocabulary, width). Inputs here are its width, outputs
    the vocabulary, as the LM head that may share its weight has them."""

    def input_rows(self, args: tuple[Any, ...]) -> Tensor:
        """The word at every position, (N,)."""
        return args[0].flatten()


@dataclass(frozen=True)
class Layers:
    """All trained weight matrices of a causal LM."""

    linear: Mapping[str, Layer]
    """By module name, in the model's own order, the LM head among them."""
    head: Layer
    words: Embedding
    left_out: Mapping[str, str]
    """Trained parameters that are in no score, and by which rule."""

    @property
    def body(self) -> Mapping[str, Layer]:
        """All linear maps but the head."""
        return {name: layer for name, layer in self.linear.items() if name != self.head.name}


VECTOR = "norms, biases and other vectors"
POSITIONS = "embeddings of positions and of token types"


def layers_of(model: PreTrainedModel) -> Layers:
    """Every trained parameter accounted for: scored as a `Layer`, or left out by a stated rule.

    Raises ValueError, naming them, for weights that are neither (experts and routers kept as bare parameters,
    convolutions), and for a model without a linear LM head or a word embedding.
    """
    names = _parameter_names(model)
    linear = {
        name: _linear(name, module, names)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
    words = words_of(model)
    scored = {layer.weight for layer in (*linear.values(), words)}
    others = {
        names[id(module.weight)]
        for module in model.modules()
        if isinstance(module, nn.Embedding) and id(module.weight) in names
    }
    left_out, unknown = {}, {}
    for name, parameter in model.named_parameters():
        if name in scored or not parameter.requires_grad:
            continue
        shape = _shape(parameter)
        if sum(size > 1 for size in shape) <= 1:
            left_out[name] = VECTOR
        elif name in others:
            left_out[name] = POSITIONS
        else:
            unknown[name] = shape
    if unknown:
        raise ValueError(_unscored(model, unknown))
    return Layers(linear, head_of(model), words, left_out)


def head_of(model: PreTrainedModel) -> Layer:
    """The LM head. Raises ValueError where the model has none."""
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if module is head and isinstance(module, nn.Linear):
            return _linear(name, module, _parameter_names(model))
    raise ValueError(f"{type(model).__name__} has no linear LM head, which every influence estimator needs")


def words_of(model: PreTrainedModel) -> Embedding:
    """The word embedding."""
    words = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is words)
    vocabulary, width = _shape(words.weight)
    return Embedding(name, words, _parameter_names(model)[id(words.weight)], width, vocabulary)


def _linear(name: str, module: Any, names: Mapping[int, str]) -> Layer:
    rows, columns = _shape(module.weight)
    if isinstance(module, Conv1D):
        return TransposedLayer(name, module, names[id(module.weight)], rows, columns)
    return Layer(name, module, names[id(module.weight)], columns, rows)


def _parameter_names(model: nn.Module) -> dict[int, str]:
    return {id(parameter): name for name, parameter in model.named_parameters()}


def _shape(parameter: Any) -> tuple[int, ...]:
    """Of the whole parameter, also where ZeRO-3 holds a part."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _unscored(model: PreTrainedModel, unknown: Mapping[str, tuple[int, ...]]) -> str:
    every = sum(prod(_shape(parameter)) for parameter in model.parameters() if parameter.requires_grad)
    share = sum(map(prod, unknown.values())) / every
    shown = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in list(unknown.items())[:4])
    shown += ", ..." if len(unknown) > 4 else ""
    return (
        f"{type(model).__name__} trains {len(unknown)} weights, {share:.0%} of its parameters, that are no linear "
        f"layer and no embedding, so a score would leave them out: {shown}. Choose "
        "influence.estimator lli, which claims the LM head only, or loss, random or none"
    )
