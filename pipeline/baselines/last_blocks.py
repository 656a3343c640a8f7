"""Influence with exact feedback through the last blocks only."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.data.batch import Batch
from pipeline.influence.adam import adam_factors
from pipeline.influence.hooks import hooks
from pipeline.influence.micro_batch import forward_losses
from pipeline.models.heads import blocks
from pipeline.models.layer import Layer
from pipeline.models.layers import layers_of
from pipeline.models.second_moments import Means


def partial_backward_gram(model: PreTrainedModel, batch: Batch, last: int, means: Means | None) -> Tensor:
    """Influence with exact gradients through the last `last` blocks, (B, B), self-influence on the diagonal; no sketch.

    With e_t the gradient at the input of the first of these blocks, the sum over the following parts of their inner
    products of two samples:

        head and word embedding: sum over t of  h_t (outer) g_t  +  e'_t (outer) onehot(token_t)
        linear layers of the last blocks: sum over t of  a_t (outer) b_t ,  b_t their true output gradients
        all other linear layers: sum over t of  a_t (outer) e_t

    e' is e taken through the first block, too: first to its output, in proportion to the root mean squares of the
    residual stream there and where e is, as a network behind norms does not see its scale. The embedding's is a
    large part of the whole gradient. A model of at most last + 1 blocks has the word embedding's part, one of at most
    `last` has all of it exact. `means`: in Adam's geometry, as `ghost` and `residual` are. Raises ValueError where the
    head is frozen.
    """
    stack, found = list(blocks(model)), layers_of(model)
    found.want_trained_head("a form with exact last blocks")
    layers, head, words = found.linear, found.head.name, found.words
    deep = {id(module) for block in stack[-last:] for module in block.modules()}
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    streams: list[Tensor] = []

    def passed(name: str, args: tuple[Any, ...], output: Tensor) -> None:
        inputs[name], outputs[name] = args[0].detach(), output

    with hooks(
        before=[(block, lambda args: streams.append(args[0])) for block in stack],
        after=[(layer.module, partial(passed, name)) for name, layer in layers.items()],
    ):
        losses_BT = forward_losses(model, batch)
    exact = [name for name, layer in layers.items() if id(layer.module) in deep or name == head]
    first = max(len(stack) - last, 0)
    wanted = [streams[first], *(outputs[name] for name in exact)]
    e_BTD, *gradients = torch.autograd.grad(losses_BT.sum(), wanted, retain_graph=True)
    embedded_BTD = e_BTD
    if first > 0:
        output = streams[1]
        scale_BT1 = streams[first].norm(dim=2, keepdim=True) / output.norm(dim=2, keepdim=True)
        (embedded_BTD,) = torch.autograd.grad(output, streams[0], e_BTD * scale_BT1.detach())
    feedback = dict(zip(exact, gradients, strict=True))

    def factors(layer: Layer) -> tuple[Tensor | float, Tensor | float, Tensor | float]:
        """Of outputs, of inputs, and of inputs where the feedback is not the layer's own."""
        if means is None:
            return 1.0, 1.0, 1.0
        outputs_O, inputs_D = layer.means(means)
        output_scale, input_scale = adam_factors(outputs_O, inputs_D)
        mean = outputs_O.mean()
        return output_scale, input_scale, input_scale * torch.where(mean > 0, mean, 1.0) ** -0.25

    word_rows, word_columns, _ = factors(words)
    onehot_BTV = F.one_hot(batch.input_ids_BT, words.outputs).to(e_BTD) * word_rows
    embedding = _gradients(embedded_BTD * word_columns, onehot_BTV)
    parts = []
    for name, layer in layers.items():
        output_scale, own_scale, shared_scale = factors(layer)
        if name not in feedback:
            parts.append(_gradients(inputs[name] * shared_scale, e_BTD * word_columns))
            continue
        parts.append(_gradients(inputs[name] * own_scale, feedback[name] * output_scale))
        if layer.weight == words.weight:
            parts[-1], embedding = parts[-1] + embedding, torch.zeros_like(embedding)
    return torch.stack([part @ part.T for part in [embedding, *parts]]).sum(0)


def _gradients(input_BTD: Tensor, gradient_BTO: Tensor) -> Tensor:
    return (input_BTD.transpose(1, 2) @ gradient_BTO).flatten(1)
