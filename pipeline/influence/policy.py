"""Scores of a global micro-batch -> what happens to each of its units. Pure, and the same on every rank."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.config.schema_influence import PolicyConfig


@dataclass(frozen=True)
class Decision:
    """One entry a unit of the global micro-batch.

    Weights multiply the unit's tokens in the loss and in its denominator (0: dropped). A reason says why a weight is
    not 1, or why a flagged unit was spared; it is empty where there is nothing to say.
    """

    weights: Tensor
    reasons: list[str]

    def of(self, mask: Tensor) -> "Decision":
        """The entries of some of the units."""
        return Decision(self.weights[mask], [self.reasons[index] for index in mask.nonzero().flatten().tolist()])


def decide(
    scores: Tensor, tokens: Tensor, finite: Tensor, policy: PolicyConfig, step: int, seed: int, batch: int
) -> Decision:
    """Weights for the units that are decided together, the `batch`-th such group, in optimizer step `step` (from 1).

    Flagged are scores below `policy.threshold`, or the lowest `policy.rate` of the units: a fraction of a unit is
    rounded up or down at random, with a generator that all ranks share because it is seeded by (seed, batch). Ties go
    by position, the earlier first. With `policy.flag: highest` it is the highest, or those above the threshold. At
    most floor(max_drop_fraction * units) are dropped, worst first. `reweight` gives every unit the positive part of its
    score, scaled to mean 1, however many that makes 0; where no score is positive, the weights stay 1. Units without
    labelled tokens or without a score are neither flagged nor counted. Units that are not `finite` (in loss or score)
    get weight 0 whatever the policy.

    `policy.rule: mixture` flags none.

    `policy.rule: top` keeps floor(units / pool), the best; while warming up, the first. With a temperature T it keeps
    those for which score / (T s) + z is highest, s being the standard deviation of the counted scores and z seeded
    Gumbel noise: a sample without replacement from softmax(score / (T s)) (Gumbel-top-k, arXiv 1903.06059). Units that
    do not count are kept last.
    """
    weights, flagged = _decide(scores, tokens, finite, policy, step, seed, batch)
    return Decision(weights, _reasons(flagged))


def decide_tokens(
    scores: Tensor, tokens_U: Tensor, finite_U: Tensor, policy: PolicyConfig, step: int, seed: int, batch: int
) -> tuple[Decision, Tensor]:
    """`decide` for single tokens: `scores` are those of every labelled token of the units, `tokens_U` of each, in
    order. Returns what becomes of the units, whose weight is the mean of their tokens' and whose reason that of any of
    these, and the tokens' weights."""
    unit = torch.arange(len(tokens_U)).repeat_interleave(tokens_U.long())
    weights, flagged = _decide(scores, torch.ones_like(scores), finite_U[unit], policy, step, seed, batch)
    of_tokens_U = torch.zeros_like(tokens_U, dtype=weights.dtype).index_add(0, unit, weights)
    weights_U = (of_tokens_U / tokens_U).where(tokens_U > 0, 1.0).masked_fill(~finite_U, 0.0)
    any_U = {name: torch.zeros_like(finite_U).index_fill(0, unit[mask], True) for name, mask in flagged.items()}
    return Decision(weights_U, _reasons({**any_U, "non_finite": ~finite_U})), weights


Flagged = dict[str, Tensor]
"""Reasons, and the units that each holds for; a later one is said in place of an earlier."""


def _decide(
    scores: Tensor, tokens: Tensor, finite: Tensor, policy: PolicyConfig, step: int, seed: int, batch: int
) -> tuple[Tensor, Flagged]:
    scores, counted = scores.double(), (tokens > 0) & scores.isfinite() & finite
    if policy.rule == "top":
        return _top(scores, counted, finite, policy, step <= policy.warmup_steps, np.random.default_rng([seed, batch]))
    sign = -1.0 if policy.flag == "highest" else 1.0
    units = int(counted.sum())
    place = torch.empty(len(scores), dtype=torch.long)
    order = (sign * scores).masked_fill(~counted, torch.inf).argsort(stable=True)
    place[order] = torch.arange(len(scores))
    if policy.rule == "mixture":
        flagged = torch.zeros_like(counted)
    elif policy.rule == "threshold":
        flagged = (sign * scores < sign * policy.threshold) & counted
    else:
        flagged = (place < _stochastic_round(policy.rate * units, seed, batch)) & counted
    dropped = flagged & (place < int(policy.max_drop_fraction * units + 1e-9))

    weights = torch.ones_like(scores)
    if step <= policy.warmup_steps:
        reasons = {"warmup": flagged}
    elif policy.action == "observe":
        reasons = {"observe": flagged}
    elif policy.action == "drop":
        weights = weights.masked_fill(dropped, 0.0)
        reasons = {policy.rule: dropped, "max_drop_fraction": flagged & ~dropped}
    elif (positive := scores.clamp(min=0).masked_fill(~counted, 0.0)).sum() == 0:
        reasons = {"no positive score": counted}
    else:
        weights = positive * (units / positive.sum())
        reasons = {"reweight": counted}
    return weights.masked_fill(~finite, 0.0), {**reasons, "non_finite": ~finite}


def _top(
    scores: Tensor,
    counted: Tensor,
    finite: Tensor,
    policy: PolicyConfig,
    warming_up: bool,
    generator: np.random.Generator,
) -> tuple[Tensor, Flagged]:
    assert policy.pool is not None
    worth = -scores if policy.flag == "highest" else scores
    if policy.temperature:
        scale = policy.temperature * float(scores[counted].std(correction=0)) if counted.any() else 0.0
        # Scores that are all equal give each the same chance.
        worth = (worth / scale if scale else worth * 0) + torch.from_numpy(generator.gumbel(size=len(scores)))
    if warming_up:
        worth = torch.zeros_like(scores)
    best_first = worth.masked_fill(~counted, -torch.inf).argsort(descending=True, stable=True)
    dropped = torch.ones_like(counted)
    dropped[best_first[: len(scores) // policy.pool]] = False
    weights = (~dropped & finite).to(scores.dtype)
    return weights, {"warmup" if warming_up else "top": dropped, "non_finite": ~finite}


def _stochastic_round(expected: float, seed: int, batch: int) -> int:
    whole = int(expected)
    return whole + int(np.random.default_rng([seed, batch]).random() < expected - whole)


def _reasons(which: Flagged) -> list[str]:
    """The name of the mask that holds for each unit, or ''."""
    reasons = [""] * len(next(iter(which.values())))
    for name, mask in which.items():
        for index in mask.nonzero().flatten().tolist():
            reasons[index] = name
    return reasons
