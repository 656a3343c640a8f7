"""Packed sequences -> batches. The order of samples is a function of (seed, global position) and nothing else."""

from dataclasses import dataclass
from functools import lru_cache

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


@dataclass(frozen=True)
class UnitTable:
    """All units of a global micro-batch, in the order of their positions, as every rank knows them; on the CPU.

    `losses` are sums over a unit's labelled `tokens`, in nats; `stop`: some rank was asked to stop.
    """

    ranks: Tensor
    scores: Tensor
    losses: Tensor
    tokens: Tensor
    stop: bool

    @classmethod
    def gather(cls, rank: int, scores_U: Tensor, losses_U: Tensor, tokens_U: Tensor, stop: bool) -> "UnitTable":
        """From what each rank knows of its own units. Collective: the one gather of a micro-batch."""
        alike = [torch.full_like(losses_U, value) for value in (rank, stop)]
        own_UC = torch.stack([scores_U.to(losses_U.dtype), losses_U, tokens_U, *alike], dim=1)
        scores, losses, tokens, ranks, stops = collectives.all_gather_rows(own_UC).cpu().T
        return cls(ranks.long(), scores, losses, tokens, bool(stops.any()))


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
        rows = self._at(self._rows, position, size)
        ids_BT = torch.from_numpy(np.stack(rows["input_ids"]).astype(np.int64))
        documents_BT = torch.from_numpy(np.stack(rows["document_ids"]))
        labels_BT = torch.full_like(ids_BT, IGNORE)
        labels_BT[:, :-1] = ids_BT[:, 1:].where(documents_BT[:, 1:] != PADDING, IGNORE)
        return Batch(ids_BT.to(device), labels_BT.to(device), self._units_of(rows, position))

    def units(self, position: int, size: int) -> list[Unit]:
        """The units of those sequences, without their tokens."""
        return self._units_of(self._at(self._documents, position, size), position)

    def tokens_of(self, sample_id: int, document_ids: list[int]) -> list[int]:
        """The tokens of a unit: those of these documents in this row."""
        row = self._rows[sample_id]
        return row["input_ids"][np.isin(row["document_ids"], document_ids)].tolist()

    def _at(self, rows: datasets.Dataset, position: int, size: int) -> dict:
        positions = range(position, position + size)
        indices = [int(self._permutation(self.epoch(p))[p % len(rows)]) for p in positions]
        return {"sample_id": indices, **rows[indices]}

    def _units_of(self, rows: dict, position: int) -> list[Unit]:
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
                units.append(Unit(position + row, sample_id, span, documents, _largest_subset(group)))
        return units


def _largest_subset(parts: list[tuple[int, str, int, int]]) -> str:
    """The subset with most tokens, the first of equals."""
    tokens: dict[str, int] = {}
    for _, subset, start, stop in parts:
        tokens[subset] = tokens.get(subset, 0) + stop - start
    return max(tokens, key=lambda subset: tokens[subset])
