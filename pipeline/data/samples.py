"""Packed sequences -> batches. The order of samples is a function of (seed, global position) and nothing else."""

from functools import lru_cache

import datasets
import numpy as np
import torch

from pipeline.data.batch import IGNORE, PADDING, Batch, Unit


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
