"""What happened in an optimizer step: the units as every rank knows them, and what was decided."""

from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor

from pipeline.data.batch import Scored
from pipeline.engine import collectives
from pipeline.influence.policy import Decision


@dataclass(frozen=True)
class UnitTable:
    """Units as every rank knows them, in the order of their positions; on the CPU.

    `losses` are sums over a unit's labelled `tokens`, in nats. Where several micro-batches are decided together,
    `micro_steps` numbers them and `micro_scores` are against the unit's own one. `stop`: some rank was asked to stop.
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
    def gather(cls, rank: int, scored: list[Scored], stop: bool) -> Self:
        """From what each rank knows of its own units, by micro-batch. Collective: the one gather."""
        numbers = [torch.full_like(part.losses_U, index) for index, part in enumerate(scored)]
        columns = [[getattr(part, field.name) for part in scored] for field in fields(Scored)]
        own = [torch.cat(column).double() for column in (numbers, *columns)]
        alike = [torch.full_like(own[0], value) for value in (rank, stop)]
        gathered = collectives.all_gather_rows(torch.stack([*own, *alike], dim=1)).cpu()
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
class Outcome:
    """What happened in an optimizer step."""

    micro_batches: list[tuple[int, UnitTable, Decision]]
    """First position, units and what was decided on them, of each global micro-batch."""
    gradient_norm: float | None
    skipped: bool
    """DeepSpeed refused an update that was not finite."""
    disagreement: float | None
    """With `influence.scope: step`, the fraction of the units that their micro-batch alone would have decided
    differently."""
    audit: float | None
    """`Step.audit`, where it was due."""

    @property
    def healthy(self) -> bool:
        return not self.skipped and all(bool(units.finite.all()) for _, units, _ in self.micro_batches)

    @property
    def stop(self) -> bool:
        """Some rank was asked to stop."""
        return any(units.stop for _, units, _ in self.micro_batches)
