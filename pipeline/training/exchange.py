"""Sequences that ranks hand to each other, so that work can be shared out anew."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.data.batch import IGNORE, Batch, Unit
from pipeline.engine import collectives


@dataclass(frozen=True)
class Sequences:
    """Whole sequences R, on every rank, with what a token of each weighs in the loss."""

    positions: list[int]
    input_ids_RT: Tensor
    labels_RT: Tensor
    weights_RT: Tensor
    others: dict[str, Tensor]
    padding: int

    def __len__(self) -> int:
        return len(self.positions)

    def batch(self, rows: list[int]) -> tuple[Batch, Tensor]:
        """Some of them, each one unit, and their weights."""
        length = self.input_ids_RT.shape[1]
        units = [
            Unit(self.positions[row], self.positions[row], (index * length, (index + 1) * length), [-1], "-")
            for index, row in enumerate(rows)
        ]
        others = {name: values[rows] for name, values in self.others.items()}
        return Batch(self.input_ids_RT[rows], self.labels_RT[rows], units, others, self.padding), self.weights_RT[rows]


def exchange(batches: Sequence[Batch], weights: Sequence[Tensor], wanted: list[int]) -> Sequences:
    """The sequences at the `wanted` positions (the same on every rank), in their order, from whichever rank read them;
    `weights`: of this rank's tokens, by batch. Shorter ones are padded without labels. Collective: a gather for each
    tensor of a batch."""
    among = set(wanted)
    own = [
        (position, batch, row, weights_BT)
        for batch, weights_BT in zip(batches, weights, strict=True)
        for row, position in enumerate(batch.row_positions)
        if position in among
    ]
    device = batches[0].input_ids_BT.device
    longest = max(batch.input_ids_BT.shape[1] for batch in batches)
    length = int(collectives.all_gather_rows(torch.tensor([[longest]], device=device)).max())

    def gathered(rows: list[Tensor], like: Tensor, padding: int) -> Tensor:
        padded = [F.pad(row, (0, length - len(row)), value=padding) for row in rows]
        stacked = torch.stack(padded) if padded else like.new_zeros(0, length)
        return collectives.all_gather_rows(stacked)[order]

    positions = torch.tensor([[position] for position, *_ in own], dtype=torch.long, device=device)
    found = collectives.all_gather_rows(positions.view(-1, 1))[:, 0].tolist()
    order = torch.tensor([found.index(position) for position in wanted], device=device)
    ids_RT = gathered(
        [batch.input_ids_BT[row] for _, batch, row, _ in own], batches[0].input_ids_BT, batches[0].padding
    )
    labels_RT = gathered([batch.labels_BT[row] for _, batch, row, _ in own], batches[0].labels_BT, IGNORE)
    weights_RT = gathered([weights_BT[row] for _, _, row, weights_BT in own], weights[0], 0)
    others = {
        name: gathered([batch.others[name][row] for _, batch, row, _ in own], like, 0)
        for name, like in batches[0].others.items()
    }
    return Sequences(wanted, ids_RT, labels_RT, weights_RT, others, batches[0].padding)
