"""Packed sequences -> batches. The order of samples is a function of (seed, global position) and nothing else."""

from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Self

import datasets
import numpy as np
import torch
from torch import Tensor

from pipeline import collectives
from pipeline.influence import Span
from pipeline.loss import IGNORE

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


class Samples:
    """The training sequences in the order of their global position: every epoch is its own seeded permutation.

    Position p holds row permutation(seed, p // rows)[p % rows], at any world size, on any rank, however often the run
    was resumed.
    """

    def __init__(self, rows: datasets.Dataset, seed: int, unit: str) -> None:
        self._rows = rows.with_format("numpy")
        self._documents = self._rows.select_columns(["document_ids", "subset"])
        self._seed, self._unit = seed, unit
        self._permutation = lru_cache(maxsize=2)(self._permutation_of)

    def _permutation_of(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, epoch]).permutation(len(self._rows))

    def epoch(self, position: int) -> int:
        """How often all sequences were seen before `position`."""
        return position // len(self._rows)

    def batch(self, position: int, size: int, device: torch.device) -> Batch:
        """The sequences at positions `position` to `position + size`, not included."""
        return self.batch_at(list(range(position, position + size)), device)

    def batch_at(self, positions: list[int], device: torch.device) -> Batch:
        """The sequences at these positions."""
        rows = self._at(self._rows, positions)
        ids_BT = torch.from_numpy(np.stack(rows["input_ids"]).astype(np.int64))
        documents_BT = torch.from_numpy(np.stack(rows["document_ids"]))
        labels_BT = torch.full_like(ids_BT, IGNORE)
        labels_BT[:, :-1] = ids_BT[:, 1:].where(documents_BT[:, 1:] != PADDING, IGNORE)
        return Batch(ids_BT.to(device), labels_BT.to(device), self._units_of(rows, positions))

    def units(self, position: int, size: int) -> list[Unit]:
        """The units of those sequences, without their tokens."""
        positions = list(range(position, position + size))
        return self._units_of(self._at(self._documents, positions), positions)

    def tokens_of(self, sample_id: int, document_ids: list[int]) -> list[int]:
        """The tokens of a unit: those of these documents in this row."""
        row = self._rows[sample_id]
        return row["input_ids"][np.isin(row["document_ids"], document_ids)].tolist()

    def _at(self, rows: datasets.Dataset, positions: list[int]) -> dict:
        indices = [int(self._permutation(self.epoch(p))[p % len(rows)]) for p in positions]
        return {"sample_id": indices, **rows[indices]}

    def _units_of(self, rows: dict, positions: list[int]) -> list[Unit]:
        units = []
        for row, (sample_id, document_ids_T, subset) in enumerate(
            zip(rows["sample_id"], rows["document_ids"], rows["subset"], strict=True)
        ):
            length = len(document_ids_T)
            starts = np.flatnonzero(np.diff(document_ids_T, prepend=document_ids_T[0] - 1))
            stops = np.append(starts[1:], length)
            # (document, its subset, first, one past last) for each, padding left out.
            parts = [
                (int(document_ids_T[start]), str(name), int(start), int(stop))
                for start, stop, name in zip(starts, stops, [*subset, ""], strict=False)
                if document_ids_T[start] != PADDING
            ]
            for group in [[part] for part in parts] if self._unit == "document" else [parts]:
                span = (row * length + group[0][2], row * length + group[-1][3])
                documents = [document for document, *_ in group]
                units.append(Unit(positions[row], sample_id, span, documents, _largest_subset(group)))
        return units


def _largest_subset(parts: list[tuple[int, str, int, int]]) -> str:
    """The subset with most tokens, the first of equals."""
    tokens: dict[str, int] = {}
    for _, subset, start, stop in parts:
        tokens[subset] = tokens.get(subset, 0) + stop - start
    return max(tokens, key=lambda subset: tokens[subset])
