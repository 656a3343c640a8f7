"""Scores of a global micro-batch -> what happens to each of its units. Pure, and the same on every rank."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.config import PolicyConfig


@dataclass(frozen=True)
class Decision:
    """One entry a unit of the global micro-batch.

    Weights multiply the unit's tokens in the loss and in its denominator (0: dropped). A reason says why a weight is
    not 1, or why a flagged unit was spared; it is empty where there is nothing to say.
    """

    weights: Tensor
    reasons: list[str]


def decide(scores: Tensor, tokens: Tensor, policy: PolicyConfig, step: int, seed: int, micro_batch: int) -> Decision:
    """Weights for the units of global micro-batch number `micro_batch`, in optimizer step `step` (from 1).

    Flagged are scores below `policy.threshold`, or the lowest `policy.rate` of the units: a fraction of a unit is
    rounded up or down at random, with a generator that all ranks share because it is seeded by (seed, micro_batch).
    Ties go by position, the earlier first. Units without labelled tokens or
    without a score are neither flagged nor counted. At most
    floor(max_drop_fraction * units) are dropped, worst first. `reweight` gives every unit the positive part of its
    score, scaled to mean 1, however many that makes 0; where no score is positive, the weights stay 1.
    """
    scores, labelled = scores.double(), (tokens > 0) & scores.isfinite()
    units = int(labelled.sum())
    place = torch.empty(len(scores), dtype=torch.long)
    order = scores.masked_fill(~labelled, torch.inf).argsort(stable=True)
    place[order] = torch.arange(len(scores))
    if policy.rule == "threshold":
        flagged = (scores < policy.threshold) & labelled
    else:
        flagged = (place < _stochastic_round(policy.rate * units, seed, micro_batch)) & labelled
    dropped = flagged & (place < int(policy.max_drop_fraction * units + 1e-9))

    ones = torch.ones_like(scores)
    if step <= policy.warmup_steps:
        return Decision(ones, _reasons({"warmup": flagged}))
    if policy.action == "observe":
        return Decision(ones, _reasons({"observe": flagged}))
    if policy.action == "drop":
        return Decision(
            ones.masked_fill(dropped, 0.0), _reasons({policy.rule: dropped, "max_drop_fraction": flagged & ~dropped})
        )
    positive = scores.clamp(min=0).masked_fill(~labelled, 0.0)
    if positive.sum() == 0:
        return Decision(ones, _reasons({"no positive score": labelled}))
    return Decision(positive * (units / positive.sum()), _reasons({"reweight": labelled}))


def _stochastic_round(expected: float, seed: int, micro_batch: int) -> int:
    whole = int(expected)
    return whole + int(np.random.default_rng([seed, micro_batch]).random() < expected - whole)


def _reasons(which: dict[str, Tensor]) -> list[str]:
    """The name of the mask that holds for each unit, or ''."""
    reasons = [""] * len(next(iter(which.values())))
    for name, mask in which.items():
        for index in mask.nonzero().flatten().tolist():
            reasons[index] = name
    return reasons
