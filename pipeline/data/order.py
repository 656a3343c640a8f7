"""The order of samples: a function of (seed, position) and nothing else."""

from functools import lru_cache

import numpy as np


class Order:
    """Position p holds row permutation(seed, p // rows)[p % rows]: every epoch is its own seeded permutation, at any
    world size, on any rank, however often the run was resumed."""

    def __init__(self, rows: int, seed: int) -> None:
        self._rows, self._seed = rows, seed
        self._permutation = lru_cache(maxsize=2)(self._permutation_of)

    def _permutation_of(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, epoch]).permutation(self._rows)

    def epoch(self, position: int) -> int:
        """How often all rows were seen before `position`."""
        return position // self._rows

    def row(self, position: int) -> int:
        """The row at `position`."""
        return int(self._permutation(self.epoch(position))[position % self._rows])
