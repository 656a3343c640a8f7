"""Adam's second moments as row and column means of every weight matrix."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Means = Mapping[str, tuple[Tensor, Tensor]]
"""Row means and column means, as torch stores it, of the second moment of every weight matrix, by its name; of
fused experts by `PARAMETER[EXPERT]`."""


@dataclass(frozen=True)
class SecondMoments:
    """Adam's after some updates, bias-corrected: v / (1 - beta^updates)."""

    means: Means
    beta: float
    updates: int

    @property
    def newest(self) -> float:
        """Share of the coming update's squared gradient in its own second moment: (1 - b2) / (1 - b2^(updates + 1))."""
        return (1 - self.beta) / (1 - self.beta ** (self.updates + 1))


Moments = dict[str, dict[str, Tensor]]


def second_moments(moments: Moments, beta: float, device: torch.device) -> SecondMoments:
    """As `engine.second_moments` has them: the mean of every row (over its columns) and of every column."""
    updates = int(next(iter(moments.values()))["step"])
    means = {}
    for name, state in moments.items():
        square = state["exp_avg_sq"].to(device).float() / (1 - beta**updates)
        if square.dim() == 2:
            means[name] = (square.mean(1), square.mean(0))
        elif square.dim() == 3:
            means |= {f"{name}[{index}]": (one.mean(1), one.mean(0)) for index, one in enumerate(square)}
    return SecondMoments(means, beta, updates)
