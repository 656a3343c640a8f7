"""The order of samples: a function of (seed, position) and nothing else, in no memory."""

from functools import lru_cache

import numpy as np

KIND = "feistel"
"""Which function it is. A run that began in another order can't go on in this one."""

_ROUNDS = 8
_WORD = 2**64 - 1


class Order:
    """Position p holds row permutation(seed, p // rows)[p % rows]: every epoch is its own seeded permutation, at any
    world size, on any rank, however often the run was resumed.

    The permutation is a bijection that is computed, not an array that is kept (which for a corpus of the Pile's size
    would take gigabytes on every rank): a Feistel network (Luby and Rackoff, 1988) over the smallest 4^n numbers that
    hold all rows, its rounds keyed by (seed, epoch), applied again until the result is a row (cycle walking; Black and
    Rogaway, 2002), which takes fewer than four turns on average.
    """

    def __init__(self, rows: int, seed: int) -> None:
        assert 0 < rows <= 2**62
        self._rows, self._seed = rows, seed
        self._half = max(1, -(-(rows - 1).bit_length() // 2))
        """Bits of each half of a number."""
        self._keys = lru_cache(maxsize=2)(self._keys_of)

    def epoch(self, position: int) -> int:
        """How often all rows were seen before `position`."""
        return position // self._rows

    def row(self, position: int) -> int:
        """The row at `position`."""
        epoch, place = divmod(position, self._rows)
        while (place := self._shuffled(place, self._keys(epoch))) >= self._rows:
            pass
        return place

    def _keys_of(self, epoch: int) -> list[int]:
        return [int(key) for key in np.random.SeedSequence([self._seed, epoch]).generate_state(_ROUNDS, np.uint64)]

    def _shuffled(self, number: int, keys: list[int]) -> int:
        half, mask = self._half, 2**self._half - 1
        left, right = number >> half, number & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        return left << half | right


def _mixed(word: int) -> int:
    """Of 64 bits, each of which depends on all of them: the end of SplitMix64 (Steele, Lea and Flood, 2014)."""
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & _WORD
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & _WORD
    return word ^ (word >> 31)
