"""`policy.rule: mixture`: the weights of a mixture's sources, moved by the influence of what was read of each.

Pure numbers: no ranks, no order of samples.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

DECAY = 0.9
"""Of a source's mean influence, per step in which it has a unit with a score."""


class MixtureWeights:
    """Exponentiated gradient (Kivinen & Warmuth 1997, doi:10.1006/inco.1996.2612), as DoReMi (arXiv 2305.10429), ODM
    (arXiv 2312.02406) and Aioli (arXiv 2411.05735) use it on mixtures. After every step, for the sources s with units

        a_s <- DECAY a_s + (1 - DECAY) (token-weighted mean of the step's scores),  the mean itself the first time
        u_s  = w_s exp(rate (a_s - mean a) / spread) / sum;  mean and spread (standard deviation) over the a there are
        w_s <- floor p_s + (1 - floor) e_s / sum e,  e_s = max(u_s - floor p_s, 0),  p_s its prior weight

    so that a source that helps more than others is read more, none less than `floor` of its prior share, and the unit
    of the scores is of no matter. A source without an average yet counts as the mean; where all averages are equal,
    nothing moves. `weights` sum to one; `influence` holds the averages, None where there is none.
    """

    def __init__(self, prior: Sequence[float], rate: float, floor: float) -> None:
        self._prior = [weight / math.fsum(prior) for weight in prior]
        self._rate, self._floor = rate, floor
        self.weights = list(self._prior)
        self.influence: list[float | None] = [None] * len(prior)

    def move(self, scores_U: Tensor, tokens_U: Tensor, sources_U: Sequence[int]) -> None:
        """By the units of a step: their scores, labelled tokens and sources. Those without a finite score or a token
        do not count."""
        sums, tokens = [0.0] * len(self.weights), [0.0] * len(self.weights)
        for score, count, s in zip(scores_U.tolist(), tokens_U.tolist(), sources_U, strict=True):
            if math.isfinite(score) and count:
                sums[s] += score * count
                tokens[s] += count
        for s, before in enumerate(self.influence):
            if tokens[s]:
                mean = sums[s] / tokens[s]
                self.influence[s] = mean if before is None else DECAY * before + (1 - DECAY) * mean
        known = [average for average in self.influence if average is not None]
        mean = math.fsum(known) / max(len(known), 1)
        spread = math.sqrt(math.fsum((average - mean) ** 2 for average in known) / max(len(known), 1))
        if spread == 0:
            return
        steps = [0.0 if average is None else (average - mean) / spread for average in self.influence]
        moved = [weight * math.exp(self._rate * step) for weight, step in zip(self.weights, steps, strict=True)]
        least = [self._floor * prior for prior in self._prior]
        above = [max(weight / math.fsum(moved) - low, 0.0) for weight, low in zip(moved, least, strict=True)]
        self.weights = [
            low + (1 - self._floor) * more / math.fsum(above) for low, more in zip(least, above, strict=True)
        ]

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights, "influence": self.influence}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.weights, self.influence = list(state["weights"]), list(state["influence"])
