"""Slow and obviously right: Eq. 4 over token pairs, in float64, on a model that nothing has partitioned."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pipeline.data.batch import IGNORE, Batch


def quadruple_loop(inputs: list[list[list[Tensor]]], gradients: list[list[Tensor]], include_self: bool) -> list[float]:
    """S_j = sum over z, t in j, t' in z of (sum_l a_l[j][t] . a_l[z][t']) (g[j][t] . g[z][t']).

    `inputs[l][j][t]` and `gradients[j][t]` are vectors, the latter logit gradients.
    """
    scores = []
    for j in range(len(gradients)):
        score = 0.0
        for z in range(len(gradients)):
            if z == j and not include_self:
                continue
            for t in range(len(gradients[j])):
                for u in range(len(gradients[z])):
                    layers = sum(float(layer[j][t] @ layer[z][u]) for layer in inputs)
                    score += layers * float(gradients[j][t] @ gradients[z][u])
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
    gradients_NV = (logits_NV.softmax(1) - onehot_NV) * (labels_N != IGNORE)[:, None]
    pairs_NN = sum(layer @ layer.T for layer in inputs) * (gradients_NV @ gradients_NV.T)
    batch, tokens = ids_BT.shape
    pairs_BB = pairs_NN.view(batch, tokens, batch, tokens).sum((1, 3))
    if not include_self:
        pairs_BB = pairs_BB - pairs_BB.diag().diag()
    return pairs_BB.sum(1)


def token_pair_sketches(model: PreTrainedModel, batch: Batch) -> Tensor:
    """LAI's gradient sketch of every sample, whole and in float64: (B, sum of input widths x V), so that Eq. 4 is an
    inner product of two."""
    inputs: dict[nn.Module, Tensor] = {}
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | Conv1D)]
    hooks = [
        layer.register_forward_hook(lambda m, args, _out: inputs.update({m: args[0].double()})) for layer in layers
    ]
    with torch.no_grad():
        logits_BTV = model(input_ids=batch.input_ids_BT).logits
    for hook in hooks:
        hook.remove()
    onehot_BTV = F.one_hot(batch.labels_BT.clamp(min=0), logits_BTV.shape[2])
    gradients_BTV = (logits_BTV.softmax(2) - onehot_BTV) * (batch.labels_BT != IGNORE)[:, :, None]
    inputs_BTD = torch.cat([inputs[layer] for layer in layers], dim=2)
    return torch.einsum("btd,btv->bdv", inputs_BTD, gradients_BTV.double()).flatten(1)
