"""Sequences of random tokens, for measuring cost."""

import numpy as np
import torch

from pipeline.data.batch import Batch, Unit, next_token_labels, to_device
from pipeline.data.samples import Samples


class RandomTokens(Samples):
    """Sequences of `length` uniform random tokens, a function of (seed, position), each one document."""

    def __init__(self, vocabulary: int, length: int, seed: int) -> None:
        self._vocabulary, self._length, self._seed = vocabulary, length, seed

    def batch_at(self, positions: list[int], device: torch.device) -> Batch:
        rows = [np.random.default_rng([self._seed, p]).integers(self._vocabulary, size=self._length) for p in positions]
        ids_BT = torch.from_numpy(np.stack(rows))
        labels_BT = next_token_labels(ids_BT)
        return Batch(to_device(ids_BT, device), to_device(labels_BT, device), self._units_at(positions))

    def units(self, position: int, size: int) -> list[Unit]:
        return self._units_at(list(range(position, position + size)))

    def _units_at(self, positions: list[int]) -> list[Unit]:
        return [
            Unit(position, position, (row * self._length, (row + 1) * self._length), [position], "-")
            for row, position in enumerate(positions)
        ]

    def epoch(self, position: int) -> int:
        return 0
