"""Noise in place of some training sequences, so that it can be measured whether it is found. For experiments only."""

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

PREFIX = "planted/"
"""Subsets of planted sequences begin with it; what follows is the kind."""


_NGRAM = 8


class Planter:
    """Replaces the fraction `noise` of a split's rows, seen in their order.

    Every 1 / noise-th row is replaced, from a start that `seed` draws, by the kinds in turn:

    uniform     tokens drawn at random from the whole vocabulary
    shuffled    the row's own tokens in a random order
    repeated    a random 8-gram of the row, over and over
    foreign     the next tokens of `foreign`, an endless stream (None: this kind is left out)

    What is drawn is a function of (seed, number of the row) alone, and of how many rows of foreign text came before. A
    replaced row keeps its padding and its `document_ids`, which say what was replaced; the subset of each of its
    documents becomes `planted/KIND`. `counts`: rows replaced so far, by kind.
    """

    def __init__(self, noise: float, seed: int, vocabulary: int, foreign: Iterator[np.ndarray] | None) -> None:
        self._noise, self._seed, self._vocabulary = noise, seed, vocabulary
        self._foreign, self._waiting = foreign, np.empty(0, np.int32)
        self._start = float(self._generator(-1).random())
        self._kinds = ["uniform", "shuffled", "repeated", *(["foreign"] if foreign else [])]
        self._row = 0
        self.counts: Counter[str] = Counter()

    def __call__(self, rows: pa.RecordBatch) -> pa.RecordBatch:
        """The next rows, some of them replaced."""
        first, self._row = self._row, self._row + rows.num_rows
        places = {row - first: number for row in range(first, self._row) if (number := self._number(row)) is not None}
        if not places:
            return rows
        length = rows.schema.field("input_ids").type.list_size
        # Of a slice, `values` would be those of the whole array.
        ids_RT = rows["input_ids"].flatten().to_numpy().reshape(-1, length).copy()
        real_RT = rows["document_ids"].flatten().to_numpy().reshape(-1, length) >= 0
        subsets = rows["subset"].to_pylist()
        for place, number in places.items():
            kind = self._kinds[number % len(self._kinds)]
            real = real_RT[place]
            ids_RT[place, real] = self._noise_of(kind, ids_RT[place, real], self._generator(first + place))
            subsets[place] = [PREFIX + kind] * len(subsets[place])
            self.counts[kind] += 1
        columns: list[Any] = [
            pa.FixedSizeListArray.from_arrays(pa.array(ids_RT.ravel(), pa.int32()), length),
            rows["document_ids"],
            pa.array(subsets, rows.schema.field("subset").type),
        ]
        return pa.record_batch(columns, rows.schema)

    def _number(self, row: int) -> int | None:
        """Which of the replaced rows this is, from 0; None where it is not one."""
        before = math.floor(self._start + self._noise * row)
        return before if math.floor(self._start + self._noise * (row + 1)) > before else None

    def _generator(self, row: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, 2, row + 1])  # 0 and 1 shuffle the documents of the two splits

    def _noise_of(self, kind: str, own: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        size = len(own)
        if kind == "uniform":
            return generator.integers(self._vocabulary, size=size)
        if kind == "shuffled":
            return generator.permutation(own)
        if kind == "repeated":
            start = generator.integers(max(size - _NGRAM, 0) + 1)
            return np.resize(own[start : start + _NGRAM], size)
        assert self._foreign is not None
        while len(self._waiting) < size:
            self._waiting = np.concatenate([self._waiting, next(self._foreign)])
        taken, self._waiting = self._waiting[:size], self._waiting[size:]
        return taken
