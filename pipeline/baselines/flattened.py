"""Influence with each sequence flattened to one vector, as the authors' public code computes it."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.data.batch import Batch
from pipeline.models.heads import head_layer
from pipeline.models.layers import linear_layers
from pipeline.tasks.causal_lm import token_losses


def flattened_grams(model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
    """Influence with each sequence flattened to one vector of tokens x features, (B, B): for comparison only.

    With A_l and b_l the inputs and output gradients of layer l so flattened, `ghost_flattened` is the sum over l of
    <A_l j, A_l z> <b_l j, b_l z>, and `lai_flattened` has the head's b, the logit gradient, for all. Tokens meet only
    tokens at the same position, so they are the inner products of gradients for sequences of one label only.
    `logit_gradient_norm` is on the diagonal: the root of the sum over tokens of |g_t|^2.
    """
    inputs: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}

    def gram(rows_BTD: Tensor) -> Tensor:
        rows = rows_BTD.detach().flatten(1)
        return rows @ rows.T

    def hook(name: str):
        def read(_module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            inputs[name] = gram(args[0])
            if output.requires_grad:
                output.register_hook(lambda gradient: gradients.update({name: gram(gradient)}))

        return read

    hooks = [layer.register_forward_hook(hook(name)) for name, layer in linear_layers(model).items()]
    try:
        logits_BTV = model(input_ids=batch.input_ids_BT, use_cache=False).logits
        token_losses(logits_BTV, batch.labels_BT)[0].sum().backward()
    finally:
        for handle in hooks:
            handle.remove()
    model.zero_grad()
    feedback = gradients[head_layer(model)[0]]
    return {
        "ghost_flattened": torch.stack([inputs[name] * gradients[name] for name in gradients]).sum(0),
        "lai_flattened": torch.stack(list(inputs.values())).sum(0) * feedback,
        "logit_gradient_norm": feedback.diagonal().sqrt().diag(),
    }
