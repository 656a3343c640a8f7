"""How much each layer counts against the others in the scores of a forward: two calibrations of cross-layer scale."""

from typing import Literal

import torch
from torch import Tensor

from pipeline.influence.appendix_e import RunningMean
from pipeline.influence.hooks import LayerInputs
from pipeline.models.second_moments import Means


class LayerWeights:
    """Weighs the products a . a' of every layer:

        inverse_norm   w_l = 1 / E|a_l|^2
        gains          w_l = n_l mean(v_l) / E|a_l|^2

    scaled to mean one over the layers; 1 before anything is known. E: the mean over the tokens of earlier global
    micro-batches. v: the optimizer's second moment of the layer's n_l weights. A token's gradient a (outer) b has
    |a|^2 |b|^2 as the sum of its squares, so n_l mean(v_l) is E|a_l|^2 E|b_l|^2 where the two sides know nothing of
    each other, up to a factor that layers share. `gains` are then E|b_l|^2: how large the layer's own output gradient
    is, in whose place the forward puts the logit gradient.
    """

    def __init__(
        self, kind: Literal["inverse_norm", "gains"], inputs: LayerInputs, decay: float, device: torch.device
    ) -> None:
        self._inputs = inputs
        self.squares = RunningMean(len(inputs.names), decay, device)
        self._numerators: Tensor | None = torch.ones(len(inputs.names), device=device)
        if kind == "gains":
            self._numerators = None  # until `learn`

    def add(self, tokens: Tensor) -> None:
        """Gather the squares of the last forward, for so many tokens."""
        self.squares.add(self._inputs.mean_squares() * tokens)

    def learn(self, means: Means) -> None:
        """gains: by second moments, here by layer, from now on."""
        sums = [means[name][0].sum() * len(means[name][1]) for name in self._inputs.names]
        self._numerators = torch.stack(sums)
        self.weigh()

    def weigh(self) -> None:
        """Weigh by what is known now, until the next call."""
        mean_squares, numerators = self.squares.mean_C, self._numerators
        if mean_squares is None or numerators is None:
            return
        weights = torch.where(mean_squares > 0, numerators / mean_squares, 0.0)
        weights = weights / weights.mean()
        self._inputs.weights = dict(zip(self._inputs.names, weights.tolist(), strict=True))
