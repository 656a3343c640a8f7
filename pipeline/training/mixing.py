"""`policy.rule: mixture` at work: after every step the weights move, and with them the order of what is read next."""

from collections.abc import Mapping
from typing import Any

import torch

from pipeline.data.mixture import MixtureOrder, Piece
from pipeline.influence.mixture_weights import MixtureWeights
from pipeline.record.outcome import Outcome


class Mixing:
    """The same on every rank: all of them see all units of a step. `warmup_steps`: in which nothing moves."""

    def __init__(self, order: MixtureOrder, rate: float, floor: float, warmup_steps: int) -> None:
        self._order, self._warmup_steps = order, warmup_steps
        self._weights = MixtureWeights([source.weight for source in order.sources], rate, floor)

    def move(self, outcome: Outcome, position: int) -> None:
        """By what a step scored; the new weights hold from `position` on."""
        if outcome.step > self._warmup_steps:
            units = [part.units for part in outcome.micro_batches]
            scores_U, tokens_U = (torch.cat([getattr(part, name) for part in units]) for name in ("scores", "tokens"))
            positions = [place for part in units for place in part.positions.tolist()]
            self._weights.move(scores_U, tokens_U, [self._order.source(place) for place in positions])
        self._order.move(position, self._weights.weights)

    @property
    def piece(self) -> Piece:
        """Of the order, that which holds from here on."""
        return self._order.piece

    @property
    def sources(self) -> dict[str, dict[str, float | None]]:
        """The weight and the average influence of each source."""
        values = zip(self._order.sources, self._weights.weights, self._weights.influence, strict=True)
        return {source.name: {"weight": weight, "influence": influence} for source, weight, influence in values}

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self._weights.state_dict(), "piece": vars(self.piece)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._weights.load_state_dict(state["weights"])
        self._order.go_on(Piece(**state["piece"]))
