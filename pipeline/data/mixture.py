"""The order of samples of several sources: shares dealt out by largest deficit, each source in its own seeded order."""

import math
from array import array
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.config.schema_data import SourceConfig
from pipeline.data.order import Order

PARTS = 1_000_000
"""That shares are rounded to: whole numbers of them make an order exact, and let it repeat."""


@dataclass(frozen=True)
class Source:
    """Of a mixture: where its rows lie, and how it is to be read."""

    name: str
    first_row: int
    rows: int
    weight: float
    """Any positive number; the share is its part of the sum over the sources that are left."""
    epochs: float | None = None

    @property
    def most(self) -> int | None:
        """Sequences read of it at most; None without a limit."""
        return None if self.epochs is None else math.floor(self.epochs * self.rows)


def sources_of(mixture: Mapping[str, SourceConfig], report: Mapping[str, Any]) -> list[Source]:
    """The sources of a prepared mixture, by name; `report`: of its training split (`load_report`). Without weights
    their sizes are the weights."""
    found = []
    for name, config in sorted(mixture.items()):
        first, rows = (report["sources"][name][key] for key in ("first_row", "sequences"))
        found.append(Source(name, first, rows, rows if config.weight is None else config.weight, config.epochs))
    return found


def shares_of(weights: Sequence[float]) -> list[int]:
    """Weights as parts of `PARTS`, which they sum to: largest remainders, each at least one."""
    exact = [PARTS * weight / math.fsum(weights) for weight in weights]
    parts = [max(1, math.floor(part)) for part in exact]
    by_remainder = sorted(range(len(parts)), key=lambda s: parts[s] - exact[s])
    for s in by_remainder[: max(PARTS - sum(parts), 0)]:
        parts[s] += 1
    parts[parts.index(max(parts))] -= max(sum(parts) - PARTS, 0)
    return parts


class Deal:
    """Turns without end for sources with these shares, D = sum(shares): every turn, a source's deficit grows by its
    share, and the largest deficit (the first of equals) gets the turn and pays D.

    After n turns, source s has had at least n share_s / D - (1/2 + ... + 1/S) and less than n share_s / D + 1 of them
    (S sources; the largest deficit as in the cup game). After D turns all deficits are 0, and all repeats.
    """

    def __init__(self, shares: Sequence[int], deficits: Sequence[int] | None = None) -> None:
        """`deficits`: to begin with, for less than D turns."""
        self.shares, self._period = list(shares), sum(shares)
        self._deficits, self._counts = list(deficits or [0] * len(shares)), [0] * len(shares)
        self._first = tuple(self._deficits)
        self._dealt, self._before = array("q"), array("q")

    def turn(self, n: int) -> tuple[int, int]:
        """Who has turn `n`, from 0, and how many it had before."""
        rounds, rest = divmod(n, self._period)
        self._deal(rest + 1)
        s = self._dealt[rest]
        return s, rounds * self.shares[s] + self._before[rest]

    def deficits(self, n: int) -> list[int]:
        """Of each after the first `n` turns, fewer than D."""
        counts = self.counts(n)
        return [
            before + n * share - count * self._period
            for before, share, count in zip(self._first, self.shares, counts, strict=True)
        ]

    def counts(self, n: int) -> list[int]:
        """How many of the first `n` turns each has."""
        rounds, rest = divmod(n, self._period)
        self._deal(rest)
        of_rest = np.bincount(self._dealt[:rest], minlength=len(self.shares)).tolist()
        return [rounds * share + more for share, more in zip(self.shares, of_rest, strict=True)]

    def last(self, s: int, number: int) -> int:
        """How many turns are over when `s` has had `number` of them, one or more."""
        rounds, rest = divmod(number - 1, self.shares[s])
        while self._counts[s] <= rest:
            self._deal(len(self._dealt) + 1)
        return rounds * self._period + int(np.flatnonzero(np.array(self._dealt) == s)[rest]) + 1

    def _deal(self, turns: int) -> None:
        while len(self._dealt) < turns:
            deficits = [deficit + share for deficit, share in zip(self._deficits, self.shares, strict=True)]
            s = deficits.index(max(deficits))
            deficits[s] -= self._period
            self._deficits = deficits
            self._dealt.append(s)
            self._before.append(self._counts[s])
            self._counts[s] += 1


@dataclass(frozen=True)
class Piece:
    """Of an order whose weights move: from position `first` on all sources have these `shares`, of which so many
    sequences of each were `read` before, and these `deficits` were left."""

    first: int
    shares: list[int]
    read: list[int]
    deficits: list[int]


@dataclass(frozen=True)
class Stretch:
    """Positions from `first` on, in which the same sources are left."""

    first: int
    left: list[int]
    """Which sources."""
    read: list[int]
    """Sequences of every source before."""
    deal: Deal
    """The turns of those that are left."""


class MixtureOrder:
    """The position's turn says the source (`Deal`), and the source's own seeded order (`Order`) its row. A source that
    was read as often as it may be is left out from there on, and the deal begins anew among the others.

    `end`: how many positions there are; None where a source has no limit.

    Where the weights move (`move`), the deal goes on under the new shares with the deficits that there were. `pieces`:
    of such an order, so far.
    """

    def __init__(self, sources: Sequence[Source], seed: int, pieces: Sequence[Piece] | None = None) -> None:
        self.sources = list(sources)
        self._orders = [Order(source.rows, seed) for source in sources]
        self.stretches: list[Stretch] = [self._stretch_of(piece) for piece in pieces or ()]
        self.end: int | None = None if pieces else 0
        read = [0] * len(self.sources)
        while self.end is not None and (left := [s for s, source in enumerate(sources) if source.most != read[s]]):
            shares = shares_of([sources[s].weight for s in left])
            deal = Deal([share // math.gcd(*shares) for share in shares])
            self.stretches.append(Stretch(self.end, left, read, deal))
            limits = [(index, most - read[s]) for index, s in enumerate(left) if (most := sources[s].most) is not None]
            self.end = self.end + min(deal.last(*limit) for limit in limits) if limits else None
            if self.end is not None:
                read = self.read(self.end)

    @property
    def identity(self) -> dict[str, Any]:
        """Beside the seed and the dataset, what decides the order: shares and epochs."""
        shares = shares_of([source.weight for source in self.sources])
        return {
            source.name: {"share": share / PARTS, "epochs": source.epochs}
            for source, share in zip(self.sources, shares, strict=True)
        }

    def epoch(self, position: int) -> int:
        """How often all of the source of `position` was read before."""
        s, before = self._at(position)
        return self._orders[s].epoch(before)

    def row(self, position: int) -> int:
        """The row at `position`. Raises ValueError where no source is left."""
        s, before = self._at(position)
        return self.sources[s].first_row + self._orders[s].row(before)

    def read(self, position: int) -> list[int]:
        """Sequences of each source before `position`."""
        stretch = self._stretch(max(position - 1, 0))
        read = list(stretch.read)
        for s, count in zip(stretch.left, stretch.deal.counts(position - stretch.first), strict=True):
            read[s] += count
        return read

    def source(self, position: int) -> int:
        """Which of `sources` the one at `position` is."""
        return self._at(position)[0]

    def move(self, position: int, weights: Sequence[float]) -> None:
        """These weights hold from `position` on, which is past all earlier ones. Of what lies before, no more than the
        last piece is known from here on."""
        last = self._stretch(position)
        deficits = last.deal.deficits(position - last.first)
        period = sum(last.deal.shares)
        scaled = [deficit * PARTS // period for deficit in deficits]  # whole: PARTS is a multiple of the period
        self.stretches = [last, self._stretch_of(Piece(position, shares_of(weights), self.read(position), scaled))]

    @property
    def piece(self) -> Piece:
        """The last."""
        last = self.stretches[-1]
        return Piece(last.first, last.deal.shares, last.read, last.deal.deficits(0))

    def go_on(self, piece: Piece) -> None:
        """From `piece` on, as an order that came to it by moves would."""
        self.stretches = [self._stretch_of(piece)]

    def _stretch_of(self, piece: Piece) -> Stretch:
        everyone = list(range(len(self.sources)))
        return Stretch(piece.first, everyone, piece.read, Deal(piece.shares, piece.deficits))

    def sources_of_rows(self, rows: np.ndarray) -> np.ndarray:
        """Which of `sources` each row is of."""
        return np.searchsorted([source.first_row for source in self.sources], rows, side="right") - 1

    def _at(self, position: int) -> tuple[int, int]:
        """Source at `position`, and how many of its sequences come before."""
        if self.end is not None and position >= self.end:
            raise ValueError(
                f"data.mixture: the sources' epochs end after {self.end:,} sequences, and position {position:,} was "
                "asked for; raise data.mixture.NAME.epochs"
            )
        stretch = self._stretch(position)
        index, before = stretch.deal.turn(position - stretch.first)
        s = stretch.left[index]
        return s, stretch.read[s] + before

    def _stretch(self, position: int) -> Stretch:
        return self.stretches[bisect_right(self.stretches, position, key=lambda stretch: stretch.first) - 1]


def plan(order: MixtureOrder, first: int, step: int, sequences: int, max_steps: int) -> list[str]:
    """What a run that goes on at position `first` after `step`, `sequences` a step, will read, in sentences.

    Raises ValueError where all sources end before `max_steps`.
    """
    end = first + (max_steps - step) * sequences
    if order.end is not None and order.end < end:
        raise ValueError(
            f"data.mixture: the sources' epochs end after {order.end:,} sequences, which is data for "
            f"{step + max((order.end - first) // sequences, 0)} steps of {sequences}, and max_steps is {max_steps}. "
            "Lower max_steps, or raise data.mixture.NAME.epochs"
        )
    read = order.read(end)
    said = [
        f"data.mixture: {source.name} is {count / end:.2%} of what is read up to step {max_steps}, "
        f"{count / source.rows:.2f} of its epochs"
        for source, count in zip(order.sources, read, strict=True)
    ]
    for before, after in zip([None, *order.stretches], order.stretches, strict=False):
        had = range(len(order.sources)) if before is None else before.left
        gone = " and ".join(order.sources[s].name for s in had if s not in after.left)
        if gone and after.first < end:
            total = sum(after.deal.shares)
            shares = zip(after.left, after.deal.shares, strict=True)
            rest = ", ".join(f"{order.sources[s].name} {share / total:.2%}" for s, share in shares)
            said.append(f"data.mixture: {gone} ends after {after.first:,} sequences, and all that follow are {rest}")
    return said
