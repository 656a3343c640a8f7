"""What samples do to a loss, measured: Shapley values of one optimizer step, and true gradient inner products.

The references that scores are held against. Pure: one process, one model, nothing partitioned. Slow by design: B
backwards a batch of B samples, and one forward for every coalition of them that is looked at.

A *game* maps a coalition of players to a vector with one value per target. Shapley values are linear in the game, so
they form a matrix: `effects[j, z]` is what player j does to target z. With samples as players and the same samples'
losses as targets, its row sums are the samples' values with the own term in, and less the diagonal those without it.
P: all trainable parameters, flattened; n: players; Z: targets.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.data import Batch
from pipeline.loss import IGNORE, token_losses

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


# One optimizer step


@dataclass(frozen=True)
class SGD:
    """weights - lr * gradient."""

    learning_rate: float

    def __call__(self, weights_P: Tensor, gradient_P: Tensor) -> Tensor:
        return weights_P - self.learning_rate * gradient_P


@dataclass(frozen=True)
class Adam:
    """torch's Adam (AdamW where `decoupled`) from the moments after `step` updates, which stay as they are:

    m' = b1 m + (1 - b1) g,  v' = b2 v + (1 - b2) g^2,  t = step + 1,
    weights - lr * (m' / (1 - b1^t)) / (sqrt(v' / (1 - b2^t)) + eps), after the weight decay.
    """

    learning_rate: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    decoupled: bool
    exp_avg_P: Tensor
    exp_avg_sq_P: Tensor
    step: int

    def __call__(self, weights_P: Tensor, gradient_P: Tensor) -> Tensor:
        first, second = self.betas
        if self.decoupled:
            weights_P = weights_P * (1 - self.learning_rate * self.weight_decay)
        else:
            gradient_P = gradient_P + self.weight_decay * weights_P
        mean_P = self.exp_avg_P.lerp(gradient_P, 1 - first) / (1 - first ** (self.step + 1))
        square_P = self.exp_avg_sq_P * second + gradient_P.square() * (1 - second)
        root_P = (square_P / (1 - second ** (self.step + 1))).sqrt_()
        return weights_P - self.learning_rate * mean_P / (root_P + self.eps)

    @property
    def denominator_P(self) -> Tensor:
        """sqrt(v / (1 - b2^step)) + eps: the geometry of the last step. Needs at least one update."""
        return (self.exp_avg_sq_P / (1 - self.betas[1] ** self.step)).sqrt() + self.eps


# Samples as players


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that P runs over, by name, tied ones once; in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def sample_gradients(model: nn.Module, batch: Batch) -> Tensor:
    """The gradient of each sequence's summed loss, (B, P), in the model's precision: one backward a sequence."""
    parameters = list(trainable(model).values())
    gradients_BP = parameters[0].new_zeros(len(batch.input_ids_BT), sum(p.numel() for p in parameters))
    for gradient_P, ids_T, labels_T in zip(gradients_BP, batch.input_ids_BT, batch.labels_BT, strict=True):
        logits_1TV = model(input_ids=ids_T[None], use_cache=False).logits
        losses_1T, _ = token_losses(logits_1TV, labels_T[None])
        parts = torch.autograd.grad(losses_1T.sum(), parameters, allow_unused=True)
        for slot, part in zip(gradient_P.split([p.numel() for p in parameters]), parts, strict=True):
            if part is not None:
                slot.copy_(part.flatten())
    return gradients_BP


def inner_products(gradients_BP: Tensor, denominator_P: Tensor | None = None) -> Tensor:
    """<g_j, g_z>, or in Adam's geometry <g_j / denominator, g_z>, (B, B) float64; symmetric, positive helps.

    Of gradients of summed losses. Times lr / tokens^2 (under Adam also (1 - b1) / (1 - b1^t)) it is, to first order in
    the step, what `StepEffect` measures.
    """
    scaled_BP = gradients_BP if denominator_P is None else gradients_BP / denominator_P
    return (scaled_BP @ gradients_BP.T).double()


class FirstOrderEffect:
    """The game of `StepEffect` in the limit of a small learning rate: losses fall along their gradients, by the update
    that the coalition's gradient makes, whatever the optimizer makes of it.

    game(C)_z = <gradient of target z's loss, weights after nobody's step - weights after C's>, to first order the same
    units. No forward is run. Under SGD its Shapley values are `inner_products`; under Adam they are so up to what a
    coalition's gradient does to its own second moment. Targets are the sequences of the batch.
    """

    def __init__(
        self, model: nn.Module, batch: Batch, gradients_BP: Tensor, step: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        self._step = step
        self._weights_P = nn.utils.parameters_to_vector(trainable(model).values()).detach()
        self._gradients_BP = gradients_BP / (batch.labels_BT != IGNORE).sum()
        self._nobody_P = step(self._weights_P, torch.zeros_like(self._weights_P))

    def __call__(self, coalition_B: Tensor) -> Tensor:
        gradient_P = coalition_B.to(self._gradients_BP) @ self._gradients_BP
        moved_P = self._nobody_P - self._step(self._weights_P, gradient_P)
        return (self._gradients_BP @ moved_P).double().cpu()


class StepEffect:
    """The game of one optimizer step: by how much do the samples that take part lower the loss of the targets?

    game(C)_z = loss of target z after a step that nobody takes part in, minus its loss after a step with the gradient
    sum over j in C of g_j / tokens, `tokens` being those of the whole batch, so that coalitions add up. Nobody's step
    is still a step: momentum and weight decay are the same for all coalitions and count for none. Losses are sums over
    a target's labelled tokens, over the tokens of all targets (nats): summed over targets, the mean loss. Positive
    helps. Targets are the sequences of `target`, by default the batch's own. There is no gradient clipping, which would
    make the coalitions' gradients not add up.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Batch,
        gradients_BP: Tensor,
        step: Callable[[Tensor, Tensor], Tensor],
        target: Batch | None = None,
    ) -> None:
        self._model, self._step, self._target = model, step, target or batch
        self._parameters = trainable(model)
        self._weights_P = nn.utils.parameters_to_vector(self._parameters.values()).detach()
        self._gradients_BP = gradients_BP / (batch.labels_BT != IGNORE).sum()
        self._nobody_Z = self._losses(torch.zeros(len(gradients_BP), dtype=torch.bool))

    def __call__(self, coalition_B: Tensor) -> Tensor:
        return self._nobody_Z - self._losses(coalition_B)

    @torch.no_grad()
    def _losses(self, coalition_B: Tensor) -> Tensor:
        gradient_P = coalition_B.to(self._gradients_BP) @ self._gradients_BP
        stepped_P = self._step(self._weights_P, gradient_P)
        parts = stepped_P.split([parameter.numel() for parameter in self._parameters.values()])
        weights = {
            name: part.view_as(parameter)
            for (name, parameter), part in zip(self._parameters.items(), parts, strict=True)
        }
        inputs = {"input_ids": self._target.input_ids_BT, "use_cache": False}
        # Tied weights are tied in it, too, and the model's own stay as they are.
        logits_ZTV = torch.func.functional_call(self._model, weights, kwargs=inputs).logits
        losses_ZT, _ = token_losses(logits_ZTV, self._target.labels_BT)
        return (losses_ZT.double().sum(1) / (self._target.labels_BT != IGNORE).sum()).cpu()
