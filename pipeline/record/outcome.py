"""What happened in an optimizer step: the units as every rank knows them, and what was decided."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import pandas as pd
import torch
from torch import Tensor

from pipeline.data.batch import IGNORE, Batch
from pipeline.influence.policy import Decision
from pipeline.influence.scorer import Scored


@dataclass(frozen=True)
class UnitTable:
    """Units as every rank knows them, in the order of their positions; on the CPU. Where several micro-batches are
    decided together, `micro_steps` numbers them and `micro_scores` are against the unit's own one. `stop`: some rank
    was asked to stop.
    """

    ranks: Tensor
    micro_steps: Tensor
    positions: Tensor
    scores: Tensor
    micro_scores: Tensor
    losses: Tensor
    tokens: Tensor
    stop: bool

    @classmethod
    def gather(cls, rank: int, scored: list[Scored], stop: bool, all_gather_rows: Callable[[Tensor], Tensor]) -> Self:
        """From what each rank knows of its own units, by micro-batch. Collective: one call of `all_gather_rows`."""
        numbers = [torch.full_like(part.losses_U, index) for index, part in enumerate(scored)]
        names = ("positions_U", "scores_U", "micro_scores_U", "losses_U", "tokens_U")
        columns = [[getattr(part, name) for part in scored] for name in names]
        own = [torch.cat(column).double() for column in (numbers, *columns)]
        alike = [torch.full_like(own[0], value) for value in (rank, stop)]
        gathered = all_gather_rows(torch.stack([*own, *alike], dim=1)).cpu()
        in_order = gathered[gathered[:, 0].argsort(stable=True)]  # by micro-batch, then by rank
        micro_steps, positions, scores, micro_scores, losses, tokens, ranks, stops = in_order.T
        ranks, micro_steps, positions = ranks.long(), micro_steps.long(), positions.long()
        return cls(ranks, micro_steps, positions, scores, micro_scores, losses, tokens, bool(stops.any()))

    @property
    def finite(self) -> Tensor:
        """Units whose loss is a number, and whose score is (where nothing is scored, none is)."""
        scored = not self.scores.isnan().all()
        return self.losses.isfinite() & (self.scores.isfinite() if scored else True)

    def of(self, mask: Tensor) -> "UnitTable":
        """Some of the units."""
        columns = ("ranks", "micro_steps", "positions", "scores", "micro_scores", "losses", "tokens")
        return replace(self, **{name: getattr(self, name)[mask] for name in columns})


@dataclass(frozen=True)
class OfTokens:
    """What was decided of single tokens: weights of this rank's labelled ones, in order; of all ranks' together, how
    many got weight 0 and the weighted mean loss, 0 where nothing is kept."""

    weights_n: Tensor
    removed: int
    loss: float


@dataclass(frozen=True)
class Decided:
    """A global micro-batch of units, and what became of each."""

    units: UnitTable
    decision: Decision
    tokens: "OfTokens | None" = None
    """With `influence.unit: token`."""

    def weights_of(self, batch: Batch, rank: int) -> Tensor:
        """What the tokens of this rank's batch weigh in the loss, (B, T)."""
        if self.tokens is None:
            return batch.spread_over_tokens(self.decision.weights[self.units.ranks == rank])
        labelled_BT = batch.labels_BT != IGNORE
        own = self.tokens.weights_n.to(labelled_BT.device, torch.float32)
        return torch.zeros_like(labelled_BT, dtype=torch.float32).masked_scatter(labelled_BT, own)

    @property
    def scored(self) -> int:
        """Units, of all ranks; single tokens where these are decided."""
        return len(self.units.scores) if self.tokens is None else int(self.units.tokens.sum())

    @property
    def removed(self) -> int:
        """How many of them got weight 0."""
        return int((self.decision.weights == 0).sum()) if self.tokens is None else self.tokens.removed

    @property
    def kept_tokens(self) -> float:
        """Sum of the weights of all labelled tokens."""
        return float((self.decision.weights * self.units.tokens).sum())

    @property
    def all_tokens(self) -> float:
        """How many labelled tokens there are, dropped ones too."""
        return float(self.units.tokens.sum())

    @property
    def loss(self) -> float:
        """The weighted mean loss of a token, 0 where nothing is kept."""
        if self.tokens is not None:
            return self.tokens.loss
        kept = self.decision.weights > 0  # what is not finite is not
        weights = self.decision.weights[kept]
        tokens = float((weights * self.units.tokens[kept]).sum())
        return float((weights * self.units.losses[kept]).sum()) / tokens if tokens else 0.0


@dataclass(frozen=True)
class Outcome:
    """What happened in optimizer step `step` (from 1), the same on every rank but for `metadata` and `norms`."""

    step: int
    positions: list[int]
    """First position in the sample order of each global micro-batch."""
    micro_batches: list[Decided]
    gradient_norm: float | None
    """Global, before clipping, where DeepSpeed knows it."""
    skipped: bool
    """DeepSpeed refused an update that was not finite."""
    disagreement: float | None
    """With `influence.scope: step`, the fraction of the units that their micro-batch alone would have decided
    differently."""
    audit: float | None
    """Pearson's correlation of the scores with how much the units' losses fell, where it was due."""
    norms: Mapping[str, Tensor]
    """Root mean square norm of each layer's input, in the last scored forward of this rank, where it was due."""
    metadata: Mapping[int, Any]
    """What this rank's batches carried along, by position."""

    @property
    def loss(self) -> float:
        """The mean over micro-batches of each one's weighted mean over its kept tokens, nats; before the step."""
        return sum(part.loss for part in self.micro_batches) / len(self.micro_batches)

    @property
    def removed(self) -> int:
        """Units of all ranks that got weight 0."""
        return sum(part.removed for part in self.micro_batches)

    @property
    def healthy(self) -> bool:
        return not self.skipped and all(bool(part.units.finite.all()) for part in self.micro_batches)

    @property
    def stop(self) -> bool:
        """Some rank was asked to stop."""
        return any(part.units.stop for part in self.micro_batches)

    def table(self) -> pd.DataFrame:
        """A row for every unit of all ranks, in the order of micro-batches and positions: `step, micro_step, rank,
        position, tokens, loss` (mean over tokens), `score, weight, kept, reason, metadata` (None for other ranks')."""
        parts = []
        for number, part in enumerate(self.micro_batches):
            units, weights = part.units, part.decision.weights.tolist()
            parts.append(
                pd.DataFrame(
                    {
                        "step": self.step,
                        "micro_step": number,
                        "rank": units.ranks.tolist(),
                        "position": units.positions.tolist(),
                        "tokens": units.tokens.long().tolist(),
                        "loss": (units.losses / units.tokens.clamp(min=1)).tolist(),
                        "score": units.scores.tolist(),
                        "weight": weights,
                        "kept": [weight > 0 for weight in weights],
                        "reason": part.decision.reasons,
                        "metadata": [self.metadata.get(position) for position in units.positions.tolist()],
                    }
                )
            )
        return pd.concat(parts, ignore_index=True)
