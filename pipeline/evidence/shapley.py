"""What samples do to a loss, measured: Shapley values of one optimizer step, and true gradient inner products.

The references that scores are held against. Pure: one process, one model, nothing partitioned. Slow by design: B
backwards a batch of B samples, and one forward for every coalition of them that is looked at.

A *game* maps a coalition of players to a vector with one value per target. Shapley values are linear in the game, so
they form a matrix: `effects[j, z]` is what player j does to target z. With samples as players and the same samples'
losses as targets, its row sums are the samples' values with self-influence, and less the diagonal those without it.
P: all trainable parameters, flattened; n: players; Z: targets.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Game = Callable[[Tensor], Tensor]
"""(n,) bool -> (Z,) float64: what the coalition of the marked players is worth to each target."""


_MOST_EXACT_PLAYERS = 12


_FEWEST_PAIRS = 8


# Values of any game


def row_sums(effects_nZ: Tensor, include_self: bool) -> Tensor:
    """What each player does to all targets; without `include_self`, to all but the one that is itself."""
    return effects_nZ.sum(1) if include_self else effects_nZ.sum(1) - effects_nZ.diagonal()


def exact_shapley(game: Game, players: int) -> Tensor:
    """Shapley values over all 2^n coalitions, (n, Z):

    effects_j = sum over C without j of |C|! (n - |C| - 1)! / n! * (game(C + j) - game(C)).

    Raises ValueError above 12 players.
    """
    if players > _MOST_EXACT_PLAYERS:
        raise ValueError(
            f"exact Shapley values of {players} players take 2^{players} coalitions; above {_MOST_EXACT_PLAYERS} "
            "players use permutation_shapley"
        )
    worth = _Memo(game, players)
    effects = []
    for player in range(players):
        others = set(range(players)) - {player}
        parts = [
            (worth({*members, player}) - worth(members)) / (players * math.comb(players - 1, size))
            for size in range(players)
            for members in itertools.combinations(others, size)
        ]
        effects.append(torch.stack(parts).sum(0))
    return torch.stack(effects)


@dataclass(frozen=True)
class Estimate:
    """Shapley values from permutations. `errors_Rn`: standard errors of `read(effects_nZ)`."""

    effects_nZ: Tensor
    errors_Rn: Tensor
    permutations: int


def permutation_shapley(
    game: Game,
    players: int,
    seed: int,
    permutations: int,
    standard_error: float,
    read: Callable[[Tensor], Tensor] = lambda effects_nZ: row_sums(effects_nZ, include_self=True)[None],
) -> Estimate:
    """Unbiased Shapley values: a player's mean gain on joining, over random orders of joining.

    An order and its reverse make a pair, whose errors partly cancel; standard errors are over pairs. Ends where, for
    each row of `read(effects_nZ)`, (R, n), the largest standard error is at most `standard_error` times the standard
    deviation between the players (looked at from 8 pairs on), or after `permutations` orders, rounded up to a pair.
    """
    worth = _Memo(game, players)
    generator = np.random.default_rng(seed)
    pairs: list[Tensor] = []
    readings: list[Tensor] = []
    while True:
        order = generator.permutation(players).tolist()
        pairs.append((_gains(worth, order) + _gains(worth, order[::-1])) / 2)
        readings.append(read(pairs[-1]))
        count = len(pairs)
        last = 2 * count >= permutations
        if count < _FEWEST_PAIRS and not last:
            continue
        stacked_MRn = torch.stack(readings)
        errors_Rn = stacked_MRn.std(0) / math.sqrt(count) if count > 1 else torch.full_like(readings[0], torch.nan)
        spread_R = stacked_MRn.mean(0).std(1)
        if last or bool((errors_Rn.amax(1) <= standard_error * spread_R).all()):
            return Estimate(torch.stack(pairs).mean(0), errors_Rn, 2 * count)


def _gains(worth: "_Memo", order: list[int]) -> Tensor:
    """What each player adds when they join one after the other, (n, Z)."""
    steps = [worth(order[:size]) for size in range(len(order) + 1)]
    gains_nZ = steps[0].new_empty(len(order), len(steps[0]))
    for player, before, after in zip(order, steps, steps[1:], strict=False):
        gains_nZ[player] = after - before
    return gains_nZ


class _Memo:
    """A game that plays every coalition once."""

    def __init__(self, game: Game, players: int) -> None:
        self._game, self._players = game, players
        self._known: dict[frozenset[int], Tensor] = {}

    def __call__(self, members: Iterable[int]) -> Tensor:
        coalition = frozenset(members)
        if coalition not in self._known:
            mask_n = torch.zeros(self._players, dtype=torch.bool)
            mask_n[list(coalition)] = True
            self._known[coalition] = self._game(mask_n)
        return self._known[coalition]
