"""What scores tokens by their losses, or without them: `loss`, `random`, `oracle`, `none`, `rho` and `lookahead`."""

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from pipeline.data.batch import Batch

_ALONE = "it compares with nothing"
_SIGN = "its scores all have one sign"


class Loss:
    """Minus the loss."""

    accepts: ClassVar[frozenset[str]] = frozenset(
        {"sequence_classification", "document", "token", "score_first", "top"}
    )
    because: ClassVar[Mapping[str, str]] = {"running": _ALONE, "validation": _ALONE, "threshold": _SIGN}
    after_backward: ClassVar[bool] = False

    def token_scores(self, batch: Batch, losses_BT: Tensor) -> Tensor:
        return -losses_BT


class Random:
    """A number from 0 to 1, a function of (seed, position, document): one for all tokens of a unit, or one for each."""

    accepts: ClassVar[frozenset[str]] = frozenset(
        {"sequence_classification", "document", "token", "score_first", "top"}
    )
    because: ClassVar[Mapping[str, str]] = {"running": _ALONE, "validation": _ALONE, "threshold": _SIGN}
    after_backward: ClassVar[bool] = False

    def __init__(self, seed: int, by_token: bool = False) -> None:
        self._seed, self._by_token = seed, by_token

    def token_scores(self, batch: Batch, losses_BT: Tensor) -> Tensor:
        of_units = [np.random.default_rng([self._seed, u.position, u.document_ids[0]]) for u in batch.units]
        if not self._by_token:
            return batch.spread_over_tokens(torch.tensor([generator.random() for generator in of_units]))
        numbers_N = torch.zeros(losses_BT.numel())
        for unit, generator in zip(batch.units, of_units, strict=True):
            start, stop = unit.span
            numbers_N[start:stop] = torch.from_numpy(generator.random(stop - start))
        return numbers_N.view_as(losses_BT).to(losses_BT.device)


class Oracle:
    """1 for units of the subsets that match one of the patterns, else 0: what a label knows, as the bar above."""

    accepts: ClassVar[frozenset[str]] = frozenset(
        {"sequence_classification", "document", "token", "score_first", "threshold", "top"}
    )
    because: ClassVar[Mapping[str, str]] = {"running": _ALONE, "validation": _ALONE}
    after_backward: ClassVar[bool] = False

    def __init__(self, patterns: Sequence[str]) -> None:
        self._patterns = patterns

    def token_scores(self, batch: Batch, losses_BT: Tensor) -> Tensor:
        good = [any(fnmatchcase(unit.subset, pattern) for pattern in self._patterns) for unit in batch.units]
        return batch.spread_over_tokens(torch.tensor(good, dtype=torch.float64))


class Nothing:
    """`none`: no score, so the policy does nothing."""

    accepts: ClassVar[frozenset[str]] = frozenset({"sequence_classification", "document", "token", "threshold"})
    because: ClassVar[Mapping[str, str]] = {
        "running": _ALONE,
        "validation": _ALONE,
        "score_first": "it scores nothing",
        "top": "it scores nothing",
    }
    after_backward: ClassVar[bool] = False

    def token_scores(self, batch: Batch, losses_BT: Tensor) -> Tensor:
        return torch.full_like(losses_BT, torch.nan)


class Rho:
    """The loss less that of a frozen model, trained on what shall be learnt (RHO-LOSS, arXiv 2206.07137; by token,
    Rho-1, arXiv 2404.07965). Positive is what that model does better, so what can be learnt and is not yet; noise is
    hard for both. `reference_losses`: that model's, of every position."""

    accepts: ClassVar[frozenset[str]] = frozenset(
        {"sequence_classification", "document", "token", "score_first", "threshold", "top"}
    )
    because: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("running", "validation"), "it compares with influence.reference_model"
    )
    after_backward: ClassVar[bool] = False

    def __init__(self, reference_losses: Callable[[Batch], Tensor]) -> None:
        self._reference_losses = reference_losses

    def token_scores(self, batch: Batch, losses_BT: Tensor) -> Tensor:
        return losses_BT - self._reference_losses(batch)


class Lookahead:
    """How much the loss falls when the weights go a fraction of Adam's coming step along the gradient of a reference,

        s_t = loss_t(step(theta, 0)) - loss_t(step(theta, g)) ,

    which to first order is the influence of the reference on the token, all parameters counted, in the geometry of
    Adam's real step, and so (the inner product is symmetric) the token's on the reference. No hooks, any architecture.
    Wants losses at two places: see `training.lookahead`.
    """

    accepts: ClassVar[frozenset[str]] = frozenset(
        {"sequence_classification", "validation", "document", "token", "score_first", "threshold", "top"}
    )
    because: ClassVar[Mapping[str, str]] = {}
    after_backward: ClassVar[bool] = False


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
