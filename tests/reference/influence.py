"""Slow and obviously right: Eq. 4 over token pairs, in float64, on a model that nothing has partitioned."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pipeline.data.batch import IGNORE, Batch


def quadruple_loop(inputs: list[list[list[Tensor]]], feedback: list[list[Tensor]], include_self: bool) -> list[float]:
    """S_j = sum over z, t in j, t' in z of (sum_l a_l[j][t] . a_l[z][t']) (g[j][t] . g[z][t']).

    `inputs[l][j][t]` and `feedback[j][t]` are vectors.
    """
    scores = []
    for j in range(len(feedback)):
        score = 0.0
        for z in range(len(feedback)):
            if z == j and not include_self:
                continue
            for t in range(len(feedback[j])):
                for u in range(len(feedback[z])):
                    layers = sum(float(layer[j][t] @ layer[z][u]) for layer in inputs)
                    score += layers * float(feedback[j][t] @ feedback[z][u])
        scores.append(score)
    return scores


def token_pair_scores(
    model: PreTrainedModel, ids_BT: Tensor, labels_BT: Tensor, head_only: bool, include_self: bool
) -> Tensor:
    """Eq. 4 of all samples of a batch against the batch, by (B T) x (B T) token-pair matrices in float64."""
    model = model.double().eval()
    inputs, hooks = [], []
    for module in model.modules():
        wanted = module is model.get_output_embeddings() if head_only else isinstance(module, nn.Linear | Conv1D)
        if wanted:
            hooks.append(module.register_forward_hook(lambda _m, args, _out: inputs.append(args[0].flatten(0, 1))))
    with torch.no_grad():
        logits_NV = model(input_ids=ids_BT).logits.flatten(0, 1)
    for hook in hooks:
        hook.remove()
    labels_N = labels_BT.flatten()
    onehot_NV = F.one_hot(labels_N.clamp(min=0), logits_NV.shape[1])
    feedback_NV = (logits_NV.softmax(1) - onehot_NV) * (labels_N != IGNORE)[:, None]
    pairs_NN = sum(layer @ layer.T for layer in inputs) * (feedback_NV @ feedback_NV.T)
    batch, tokens = ids_BT.shape
    pairs_BB = pairs_NN.view(batch, tokens, batch, tokens).sum((1, 3))
    if not include_self:
        pairs_BB = pairs_BB - pairs_BB.diag().diag()
    return pairs_BB.sum(1)


def layer_inputs(model: PreTrainedModel, batch: Batch) -> tuple[list[Tensor], Tensor]:
    """The input of every linear layer, in the model's order, in float64, and the logits."""
    inputs: dict[nn.Module, Tensor] = {}
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | Conv1D)]
    hooks = [
        layer.register_forward_hook(lambda m, args, _out: inputs.update({m: args[0].double()})) for layer in layers
    ]
    with torch.no_grad():
        logits_BTV = model(input_ids=batch.input_ids_BT).logits
    for hook in hooks:
        hook.remove()
    return [inputs[layer] for layer in layers], logits_BTV


def token_pair_moments(model: PreTrainedModel, batch: Batch, weights_L: Tensor | None = None) -> Tensor:
    """LAI's moment of every sample, whole: (B, sum of input widths x V), so that Eq. 4 is an inner product of two; its
    terms of layer l times weights_L[l]."""
    inputs, logits_BTV = layer_inputs(model, batch)
    if weights_L is not None:
        inputs = [x * weight.sqrt() for x, weight in zip(inputs, weights_L, strict=True)]
    onehot_BTV = F.one_hot(batch.labels_BT.clamp(min=0), logits_BTV.shape[2])
    feedback_BTV = (logits_BTV.softmax(2) - onehot_BTV) * (batch.labels_BT != IGNORE)[:, :, None]
    return torch.einsum("btd,btv->bdv", torch.cat(inputs, dim=2), feedback_BTV.double()).flatten(1)
