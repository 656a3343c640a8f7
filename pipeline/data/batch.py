"""A micro-batch of sequences and the units in it."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

IGNORE = -100
"""Label of a position that has none: the last of a sequence, and padding."""


Span = tuple[int, int]
"""First and one-past-last position of a unit, in the flattened (B T) positions of a micro-batch."""


PADDING = -1
"""Document id of padded positions."""


@dataclass(frozen=True)
class Unit:
    """What is scored: `span` of the flattened positions of a batch, and the documents it comes from."""

    position: int
    sample_id: int
    span: Span
    document_ids: list[int]
    subset: str


@dataclass(frozen=True)
class Batch:
    """`label_t` is token t + 1, IGNORE at the last position and where that token is padding."""

    input_ids_BT: Tensor
    labels_BT: Tensor
    units: list[Unit]

    def sum_per_unit(self, values_BT: Tensor) -> Tensor:
        """Sum over each unit's positions, in float64; shape (U,)."""
        values_N = values_BT.flatten().double()
        return torch.stack([values_N[start:stop].sum() for start, stop in (unit.span for unit in self.units)])

    def spread_over_tokens(self, values_U: Tensor) -> Tensor:
        """Each unit's value at each of its positions, 0 elsewhere, in float32; shape (B, T)."""
        values_N = torch.zeros(self.input_ids_BT.numel())
        for unit, value in zip(self.units, values_U.tolist(), strict=True):
            values_N[slice(*unit.span)] = value
        return values_N.to(self.input_ids_BT.device).view_as(self.input_ids_BT)

    def whole_rows(self, true_U: Tensor) -> Tensor:
        """True where it is true of all units of the same sequence."""
        rows_U = self._rows_U().to(true_U.device)
        return ~torch.isin(rows_U, rows_U[~true_U])

    def blank(self, units_U: Tensor) -> "Batch":
        """The batch with token 0 all over the sequences of these units: of the same shape, with nothing of theirs."""
        ids_BT = self.input_ids_BT.clone()
        ids_BT[self._rows_U()[units_U].to(ids_BT.device)] = 0
        return replace(self, input_ids_BT=ids_BT)

    @property
    def positions_U(self) -> Tensor:
        """Of each unit's sequence, in the order of samples."""
        return torch.tensor([unit.position for unit in self.units], device=self.input_ids_BT.device)

    def _rows_U(self) -> Tensor:
        return torch.tensor([unit.span[0] // self.input_ids_BT.shape[1] for unit in self.units])


@dataclass(frozen=True)
class Scored:
    """This rank's units of one micro-batch: the positions of their sequences, scores against all that is decided
    together and against the micro-batch alone, losses (sums over labelled tokens, nats), how many tokens these are."""

    positions_U: Tensor
    scores_U: Tensor
    micro_scores_U: Tensor
    losses_U: Tensor
    tokens_U: Tensor
