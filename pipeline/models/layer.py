"""A weight matrix at work: its name, orientation and logical shape.

The only place that knows how a weight is stored and what its parameter is called.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

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

    @property
    def transposed(self) -> bool:
        """Whether it is stored as (inputs, outputs)."""
        return False

    @property
    def trained(self) -> bool:
        """Whether the weight gets a gradient."""
        weight: Any = self.module.weight
        return weight.requires_grad

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

    @property
    def transposed(self) -> bool:
        return True

    def means(self, means: Means) -> tuple[Tensor, Tensor]:
        rows, columns = means[self.weight]
        return columns, rows


class AnswerHead(Layer):
    """The last linear map of a classifier. GPT-style models apply it at every position and answer with one of them."""


class Embedding(Layer):
    """A word embedding: a linear map of one-hot rows, stored as (vocabulary, width). Inputs here are its width, outputs
    the vocabulary, as the LM head that may share its weight has them.

    Some scale their output inside the module (`embed_scale`), and none has a gradient in the row of its `padding_idx`.
    """

    def input_rows(self, args: tuple[Any, ...]) -> Tensor:
        """The word at every position, (N,)."""
        return args[0].flatten()

    def row_gradients(self, words_N: Tensor, gradient: Tensor) -> Tensor:
        """What a gradient at the output gives the row of each position's word, (N, width)."""
        rows_ND = gradient.flatten(0, -2)
        module: Any = self.module
        if (scale := getattr(module, "embed_scale", None)) is not None:
            rows_ND = rows_ND * scale
        if module.padding_idx is not None:
            rows_ND = rows_ND * (words_N != module.padding_idx)[:, None]
        return rows_ND


def shape_of(parameter: Any) -> tuple[int, ...]:
    """Of the whole parameter, also where ZeRO-3 holds a part."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
