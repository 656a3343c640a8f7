"""Whose loss counts: what the sketches of units are compared with."""

from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from pipeline.config.schema_influence import InfluenceConfig


class Reference(Protocol):
    of_what_is_scored: ClassVar[bool]
    """Whether it is made of the micro-batches that are scored, summed over all ranks."""
    keys: ClassVar[tuple[str, ...]]
    """Keys of InfluenceConfig that its state depends on, beside those of every sketch."""

    def against(self, micro: list[Tensor]) -> tuple[Tensor, float]:
        """The sketch (M,) that units are scored against, and how much of a unit's own is in it. `micro`: the sketches
        of the micro-batches that are scored together, each summed over all ranks."""

    def alone(self, micro_M: Tensor) -> Tensor | None:
        """What one of several micro-batches would have been scored against by itself, where that says something."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class OfBatch:
    """`batch`: the global micro-batches themselves (self-influence, the paper's)."""

    of_what_is_scored: ClassVar[bool] = True
    keys: ClassVar[tuple[str, ...]] = ()

    def against(self, micro: list[Tensor]) -> tuple[Tensor, float]:
        return torch.stack(micro).sum(0) if len(micro) > 1 else micro[0], 1.0

    def alone(self, micro_M: Tensor) -> Tensor | None:
        return micro_M

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Running:
    """`running`: an exponential mean over the calls so far, this one included; bias-corrected, so that the weights of
    all sketches so far add up to 1."""

    of_what_is_scored: ClassVar[bool] = True
    keys: ClassVar[tuple[str, ...]] = ("running_decay", "scope")

    def __init__(self, decay: float, device: torch.device) -> None:
        self._decay, self._device, self._count = decay, device, 0
        self._mean_M: Tensor | None = None

    def against(self, micro: list[Tensor]) -> tuple[Tensor, float]:
        new_M = torch.stack(micro).sum(0) if len(micro) > 1 else micro[0]
        self._count += 1
        share = (1 - self._decay) / (1 - self._decay**self._count)
        self._mean_M = new_M if self._mean_M is None else self._mean_M.lerp(new_M, share)
        return self._mean_M, share

    def alone(self, micro_M: Tensor) -> Tensor | None:
        return None

    def state_dict(self) -> dict[str, Any]:
        return {} if self._mean_M is None else {"mean": self._mean_M.cpu(), "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._mean_M, self._count = state["mean"].to(self._device), state["count"]


class Validation:
    """`validation`: a held-out set, or a random subset that stands for it."""

    of_what_is_scored: ClassVar[bool] = False
    keys: ClassVar[tuple[str, ...]] = ("validation_sequences",)

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.held_M: Tensor | None = None

    def against(self, micro: list[Tensor]) -> tuple[Tensor, float]:
        assert self.held_M is not None, "no validation set was taken in"
        return self.held_M, 0.0

    def alone(self, micro_M: Tensor) -> Tensor | None:
        return None

    def state_dict(self) -> dict[str, Any]:
        return {} if self.held_M is None else {"held": self.held_M.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.held_M = state["held"].to(self._device)


def reference_of(config: InfluenceConfig, device: torch.device) -> OfBatch | Running | Validation:
    if config.reference == "running":
        return Running(config.running_decay, device)
    return Validation(device) if config.reference == "validation" else OfBatch()
