"""A micro-batch of sequences and the units in it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import ceil

import torch
from torch import Tensor

IGNORE = -100
"""Label of a position that has none: the last of a sequence, and padding."""


Span = tuple[int, int]
"""First and one-past-last position of a unit, in the flattened (B T) positions of a micro-batch."""


PADDING = -1
"""Document id of padded positions."""


def next_token_labels(tokens_BT: Tensor) -> Tensor:
    """The label rule of causal LMs: position t predicts token t + 1, the last one nothing. `tokens_BT`: token ids, in
    which IGNORE stands for what nobody is to predict (padding)."""
    labels_BT = torch.full_like(tokens_BT, IGNORE)
    labels_BT[:, :-1] = tokens_BT[:, 1:]
    return labels_BT


@dataclass(frozen=True)
class Unit:
    """What is scored: `span` of the flattened positions of a batch, and the documents it comes from."""

    position: int
    sample_id: int
    span: Span
    document_ids: list[int]
    subset: str
    left_out: bool = False
    """Some of its documents are in `data.leave_out`."""


@dataclass(frozen=True)
class Batch:
    """Sequences of one length. `labels_BT`: what each position is to predict (`next_token_labels`)."""

    input_ids_BT: Tensor
    labels_BT: Tensor
    units: list[Unit]
    others: Mapping[str, Tensor] = field(default_factory=dict)
    """What else the model is called with, (B, ...): attention_mask, position_ids."""
    padding: int = 0
    """The token to lengthen sequences with."""

    @property
    def spans(self) -> list[Span]:
        """Of the units."""
        return [unit.span for unit in self.units]

    @property
    def tokens_U(self) -> Tensor:
        """Labelled tokens of each unit."""
        return self.sum_per_unit(self.labels_BT != IGNORE)

    def sum_per_unit(self, values_BT: Tensor) -> Tensor:
        """Sum over each unit's positions, in float64; shape (U,)."""
        values_N = values_BT.flatten().double()
        return torch.stack([values_N[start:stop].sum() for start, stop in self.spans])

    def spread_over_tokens(self, values_U: Tensor) -> Tensor:
        """Each unit's value at each of its positions, 0 elsewhere, in float32; shape (B, T)."""
        values_N = torch.zeros(self.input_ids_BT.numel())
        for unit, value in zip(self.units, values_U.tolist(), strict=True):
            values_N[slice(*unit.span)] = value
        return to_device(values_N, self.input_ids_BT.device).view_as(self.input_ids_BT)

    def whole_rows(self, true_U: Tensor) -> Tensor:
        """True where it is true of all units of the same sequence. The device is not waited for."""
        rows_U = self._rows_U()
        if len(rows_U.unique()) == len(rows_U):  # a unit is a sequence
            return true_U
        rows_U = to_device(rows_U, true_U.device)
        false_B = torch.zeros(len(self.input_ids_BT), device=true_U.device).index_add_(0, rows_U, (~true_U).float())
        return false_B[rows_U] == 0

    def blank(self, units_U: Tensor) -> "Batch":
        """The batch with token 0 all over the sequences of these units: of the same shape, with nothing of theirs."""
        ids_BT = self.input_ids_BT.clone()
        ids_BT[to_device(self._rows_U()[units_U], ids_BT.device)] = 0
        return replace(self, input_ids_BT=ids_BT)

    def placed(self, rows_RD: Tensor, answers: bool = False) -> Tensor:
        """Rows of a classifier's layer -> (N, D), one of each position: one a sequence goes to its labelled position.
        `answers`: of rows that are of each position, only those of labelled ones count. The others are 0. Rows of
        anything else stay what they are."""
        labelled_BT1 = (self.labels_BT != IGNORE)[..., None]
        if len(rows_RD) not in (len(labelled_BT1), labelled_BT1.numel()):
            return rows_RD  # nobody knows what they are; who takes them refuses them
        if len(rows_RD) != labelled_BT1.numel():
            rows_BTD = rows_RD[:, None].expand(-1, labelled_BT1.shape[1], -1)
            return rows_BTD.where(labelled_BT1, 0.0).flatten(0, 1)
        return rows_RD.where(labelled_BT1.flatten(0, 1), 0.0) if answers else rows_RD

    def position_weights(self, positions: str) -> Tensor:
        """What each position of a text counts in its sum, (N, 1): `influence.positions`; padding counts nothing."""
        attended_BT = self.attended_BT.float()
        if positions == "first":
            attended_BT = torch.zeros_like(attended_BT)
            attended_BT[:, 0] = 1.0
        if positions == "mean":
            attended_BT = attended_BT / attended_BT.sum(1, keepdim=True).clamp(min=1)
        return attended_BT.flatten()[:, None]

    @property
    def attended_BT(self) -> Tensor:
        """True where a position is no padding, as the model is told."""
        return self.others.get("attention_mask", torch.ones_like(self.input_ids_BT)) != 0

    def prefix(self, fraction: float) -> "Batch":
        """The first positions of every sequence, at least two. For units that are whole sequences."""
        whole = self.input_ids_BT.shape[1]
        length = min(whole, max(2, ceil(fraction * whole)))
        units = []
        for unit in self.units:
            row, start = divmod(unit.span[0], whole)
            stop = unit.span[1] - row * whole
            units.append(replace(unit, span=(row * length + min(start, length), row * length + min(stop, length))))
        others = {name: values[:, :length] for name, values in self.others.items()}
        return Batch(self.input_ids_BT[:, :length], self.labels_BT[:, :length], units, others, self.padding)

    @property
    def positions_U(self) -> Tensor:
        """Of each unit's sequence, in the order of samples."""
        return to_device(torch.tensor([unit.position for unit in self.units]), self.input_ids_BT.device)

    @property
    def row_positions(self) -> list[int]:
        """Of each sequence, in the order of samples."""
        found = {unit.span[0] // self.input_ids_BT.shape[1]: unit.position for unit in self.units}
        return [found[row] for row in range(len(self.input_ids_BT))]

    def _rows_U(self) -> Tensor:
        return torch.tensor([unit.span[0] // self.input_ids_BT.shape[1] for unit in self.units])


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor there, copied while the CPU goes on; from memory that is not pinned, a copy would wait."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
