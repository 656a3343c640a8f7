"""Exact ghost influence as other online methods compute it: what the sketches of `ghost` are measured against."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from pipeline.config.schema import InfluenceConfig
from pipeline.config.timing import Stopwatch
from pipeline.data.batch import IGNORE, Batch
from pipeline.influence.estimator import Estimator, Pending


class ExactGhost(Estimator):
    """S_j = sum over layers l, samples z of  <G_j^(l), G_z^(l)> , G the gradient of a linear layer's weight by sample
    (Eq. 3 of arXiv 2510.16007; In-Run Data Shapley, arXiv 2406.11011, and GREATS do the like), own term in.

    Keeps every linear layer's input and output gradient until the backward ends, 4 N (D + O) bytes a layer in float32,
    then multiplies, whichever is cheaper, all token pairs, 2 N^2 (D + O) operations, or the gradients of the samples
    themselves, 2 N D O. The reference is this rank's micro-batch alone: what it would take to compare over ranks is
    left out, as are the embeddings.
    """

    def __init__(
        self,
        config: InfluenceConfig,
        layers: Mapping[str, nn.Module],
        seed: int,
        device: torch.device,
        timed: Stopwatch,
    ) -> None:
        self._layers, self._stopwatch = layers, timed
        # Of the rest it is a control: scores are known when a micro-batch is added, and nothing is shared by ranks.
        super().__init__(replace(config, estimator="none", precondition="none"), Any, seed, device, timed)  # type: ignore[arg-type]
        self.needs_backward = True

    def capture(self, norms: bool = True) -> Self:
        return self

    def __enter__(self) -> Self:
        self._kept: list[tuple[Tensor, list[Tensor]]] = []
        self._hooks = [layer.register_forward_hook(self._passed, prepend=True) for layer in self._layers.values()]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _passed(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            gradients: list[Tensor] = []
            self._kept.append((args[0].detach(), gradients))
            output.register_hook(lambda gradient: gradients.append(gradient.detach()))

    @torch.no_grad()
    def add(self, batch: Batch, losses_BT: Tensor, feedback_NG: Tensor | None) -> None:
        scores_B = torch.zeros(len(losses_BT), dtype=torch.float64, device=losses_BT.device)
        with self._stopwatch("pairs"):
            while self._kept:
                input_BTD, gradients = self._kept.pop()
                scores_B += inner_products(input_BTD, gradients[0].to(input_BTD.dtype))
        losses_B, tokens_B = batch.sum_per_unit(losses_BT), batch.sum_per_unit(batch.labels_BT != IGNORE)
        self._pending.append(Pending(scores_B, torch.zeros_like(losses_B), batch.positions_U, losses_B, tokens_B))


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
