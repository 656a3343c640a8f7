"""Influence with each sequence flattened to one vector, as the authors' public code computes it."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.data.batch import Batch
from pipeline.influence.hooks import hooks
from pipeline.influence.micro_batch import forward_losses
from pipeline.models.layers import layers_of


def flattened_grams(model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
    """Influence with each sequence flattened to one vector of tokens x features, (B, B): for comparison only.

    With A_l and b_l the inputs and output gradients of layer l so flattened, `ghost_flattened` is the sum over l of
    <A_l j, A_l z> <b_l j, b_l z>, and `lai_flattened` has the head's b, the logit gradient, for all. Tokens meet only
    tokens at the same position, so they are the inner products of gradients for sequences of one label only.
    `logit_gradient_norm` is on the diagonal: the root of the sum over tokens of |g_t|^2. Raises ValueError where the
    head is frozen.
    """
    inputs: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}

    def gram(rows_BTD: Tensor) -> Tensor:
        rows = rows_BTD.detach().flatten(1)
        return rows @ rows.T

    def read(name: str, args: tuple[Any, ...], output: Tensor) -> None:
        inputs[name] = gram(args[0])
        if output.requires_grad:
            output.register_hook(lambda gradient: gradients.update({name: gram(gradient)}))

    layers = layers_of(model)
    layers.want_trained_head("a flattened form")
    with hooks(after=[(layer.module, partial(read, name)) for name, layer in layers.linear.items()]):
        forward_losses(model, batch).sum().backward()
    model.zero_grad()
    feedback = gradients[layers.head.name]
    return {
        "ghost_flattened": torch.stack([inputs[name] * gradients[name] for name in gradients]).sum(0),
        "lai_flattened": torch.stack(list(inputs.values())).sum(0) * feedback,
        "logit_gradient_norm": feedback.diagonal().sqrt().diag(),
    }
