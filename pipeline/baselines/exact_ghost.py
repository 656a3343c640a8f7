"""Exact ghost influence as other online methods compute it: what the sketches of `ghost` are measured against."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.config.timing import Stopwatch
from pipeline.data.batch import Batch
from pipeline.influence.hooks import hooks
from pipeline.influence.scorer import Scored
from pipeline.models.layer import Layer
from pipeline.models.layers import layers_of


class ExactGhost:
    """A `Scorer`: S_j = sum over layers l, samples z of  <G_j^(l), G_z^(l)> , G the gradient of a linear layer's weight
    by sample (Eq. 3 of arXiv 2510.16007; In-Run Data Shapley, arXiv 2406.11011, and GREATS do the like), self-influence
    in.

    Keeps every linear layer's input and output gradient until the backward ends, 4 N (D + O) bytes a layer in float32,
    then multiplies, whichever is cheaper, all token pairs, 2 N^2 (D + O) operations, or the gradients of the samples
    themselves, 2 N D O. The reference is this rank's micro-batch alone: what it would take to compare over ranks is
    left out, as are the embeddings.
    """

    after_backward = True
    compares = True
    reads_second_moments = False

    def __init__(self, model: PreTrainedModel, timed: Stopwatch) -> None:
        self._layers, self._timed = layers_of(model).linear, timed
        self._scored: list[Scored] = []

    def watch(self, batch: Batch, norms: bool = False) -> "ExactGhostWatch":
        return ExactGhostWatch(self._layers)

    @torch.no_grad()
    def add(self, batch: Batch, watch: "ExactGhostWatch", losses_BT: Tensor, logit_sketch_NG: Tensor | None) -> None:
        scores_B = torch.zeros(len(losses_BT), dtype=torch.float64, device=losses_BT.device)
        with self._timed("pairs"):
            while watch.kept:
                input_BTD, gradients = watch.kept.pop()
                scores_B += inner_products(input_BTD, gradients[0].to(input_BTD.dtype))
        losses_B = batch.sum_per_unit(losses_BT)
        self._scored.append(Scored(batch.positions_U, scores_B, scores_B, losses_B, batch.tokens_U))

    def scores(self) -> list[Scored]:
        scored, self._scored = self._scored, []
        return scored

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> list[str]:
        return []


class ExactGhostWatch:
    """One micro-batch."""

    visit = None
    norms: Mapping[str, Tensor] = {}

    def __init__(self, layers: Mapping[str, Layer]) -> None:
        self._layers = layers
        self.kept: list[tuple[Tensor, list[Tensor]]] = []
        """Of every layer its input and, once the backward came by, its output gradient."""

    def __enter__(self) -> Self:
        self._hooks = hooks(after=[(layer.module, self._passed) for layer in self._layers.values()])
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def before_losses(self, logits_BTV: Tensor) -> None: ...

    def before_backward(self, losses_BT: Tensor, step_tokens: float | None) -> None: ...

    def backward_to_inputs(self, losses_BT: Tensor) -> None: ...

    def _passed(self, args: tuple[Any, ...], output: Tensor) -> None:
        if output.requires_grad:
            gradients: list[Tensor] = []
            self.kept.append((args[0].detach(), gradients))
            output.register_hook(lambda gradient: gradients.append(gradient.detach()))


def inner_products(input_BTD: Tensor, gradient_BTO: Tensor) -> Tensor:
    """Inner product of each sample's weight gradient with the sum of all samples', (B,), float64."""
    samples, tokens, inputs = input_BTD.shape
    outputs = gradient_BTO.shape[2]
    if samples * tokens * (inputs + outputs) < inputs * outputs:
        input_ND, gradient_NO = input_BTD.flatten(0, 1), gradient_BTO.flatten(0, 1)
        pairs_NN = (input_ND @ input_ND.T) * (gradient_NO @ gradient_NO.T)
        return pairs_NN.view(samples, -1).sum(1, dtype=torch.float64)
    gradients_BDO = input_BTD.transpose(1, 2) @ gradient_BTO
    total_DO = gradients_BDO.sum(0)
    return torch.stack([(gradient_DO * total_DO).sum(dtype=torch.float64) for gradient_DO in gradients_BDO])
