"""Controls: `loss`, `random` and `none`. They score units by themselves, from nothing but the losses."""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from pipeline.data.batch import Batch

_ALONE = "it compares with nothing"
_SIGN = "its scores all have one sign"


class Loss:
    """Minus the mean loss over labelled tokens."""

    accepts: ClassVar[frozenset[str]] = frozenset({"document", "score_first"})
    because: ClassVar[Mapping[str, str]] = {"running": _ALONE, "validation": _ALONE, "threshold": _SIGN}
    after_backward: ClassVar[bool] = False

    def __init__(self, seed: int) -> None: ...

    def scores(self, batch: Batch, losses_U: Tensor, tokens_U: Tensor) -> Tensor:
        return -losses_U / tokens_U.clamp(min=1)


class Random:
    """A number from 0 to 1, a function of (seed, position, document)."""

    accepts: ClassVar[frozenset[str]] = frozenset({"document", "score_first"})
    because: ClassVar[Mapping[str, str]] = {"running": _ALONE, "validation": _ALONE, "threshold": _SIGN}
    after_backward: ClassVar[bool] = False

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def scores(self, batch: Batch, losses_U: Tensor, tokens_U: Tensor) -> Tensor:
        numbers = [np.random.default_rng([self._seed, u.position, u.document_ids[0]]).random() for u in batch.units]
        return torch.tensor(numbers, device=losses_U.device)


class Nothing:
    """`none`: no score, so the policy does nothing."""

    accepts: ClassVar[frozenset[str]] = frozenset({"document", "threshold"})
    because: ClassVar[Mapping[str, str]] = {"running": _ALONE, "validation": _ALONE, "score_first": "it scores nothing"}
    after_backward: ClassVar[bool] = False

    def __init__(self, seed: int) -> None: ...

    def scores(self, batch: Batch, losses_U: Tensor, tokens_U: Tensor) -> Tensor:
        return torch.full_like(losses_U, torch.nan)


class Unwatched:
    """The `Watch` of a control: there is nothing to see."""

    visit = None
    norms: Mapping[str, Tensor] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None: ...

    def before_losses(self, logits_BTV: Tensor) -> None: ...

    def before_backward(self, losses_BT: Tensor, step_tokens: float | None) -> None: ...

    def backward_to_inputs(self, losses_BT: Tensor) -> None: ...
