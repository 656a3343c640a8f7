"""Appendix E of arXiv 2510.16007: logit gradients scaled by a running mean of their squares."""

import torch
from torch import Tensor


class RunningMean:
    """An exponential mean over global micro-batches of each one's mean over its tokens, bias-corrected:

    m <- decay m + (1 - decay) (sum over tokens) / tokens, `mean_C` = m / (1 - decay^n). Sums are gathered by `add`,
    handed over for the ranks' sum by `take`, and come back to `update`: what is scored is scored with the means of the
    micro-batches before it.
    """

    def __init__(self, size: int, decay: float, device: torch.device) -> None:
        self.decay, self.updates = decay, 0
        self.raw_C = torch.zeros(size, device=device)
        self._sum_C = torch.zeros(size, device=device)

    @property
    def mean_C(self) -> Tensor | None:
        """None before the first update."""
        return self.raw_C / (1 - self.decay**self.updates) if self.updates else None

    def add(self, sum_C: Tensor) -> None:
        """Gather the sum over some tokens of this rank."""
        self._sum_C += sum_C

    def take(self) -> Tensor:
        """What was gathered since the last call."""
        sum_C, self._sum_C = self._sum_C, torch.zeros_like(self._sum_C)
        return sum_C

    def update(self, sum_C: Tensor, tokens: float) -> None:
        """Take in a global micro-batch. One without tokens, or whose sum is not finite, is none."""
        if tokens > 0 and sum_C.isfinite().all():
            self.load(self.raw_C * self.decay + sum_C * ((1 - self.decay) / tokens), self.updates + 1)

    def load(self, raw_C: Tensor, updates: int) -> None:
        """Go on from a saved `raw_C` after `updates` updates."""
        self.raw_C, self.updates = raw_C.to(self.raw_C.device), updates


class SquaredGradient(RunningMean):
    """D: the running mean, per logit coordinate, of squared logit gradients (Appendix E), and the scale made of it.

    The scale of each side is (D + eps^2)^-power. Power 1/2 is the paper's, which multiplies both sides by Adam's whole
    denominator; 1/4 on each side makes their product g g' / sqrt(v), Adam's own step. Before the first micro-batch the
    scale is 1: with the D of those before it, no softmax has to be formed twice.
    """

    EPS = 1e-8

    def __init__(self, vocabulary: int, decay: float, power: float, device: torch.device) -> None:
        super().__init__(vocabulary, decay, device)
        self.power = power

    @property
    def scale_V(self) -> Tensor | None:
        """None before the first update."""
        return None if self.mean_C is None else (self.mean_C + self.EPS**2).pow(-self.power)
