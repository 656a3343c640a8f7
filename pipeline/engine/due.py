"""When a checkpoint is due: after so many steps, after so many minutes, at the best held-out loss so far."""

import math
import time
from collections.abc import Mapping
from typing import Any

from pipeline.config.schema import CheckpointConfig
from pipeline.engine import collectives

clock = time.monotonic
"""Seconds; a test puts another one in its place."""

ALL = "all"
"""Value of `checkpoint.best_of` for the held-out text of all subsets together."""


class Due:
    """Asked after every step. All ranks hear the same: steps and held-out losses are the same on all of them, and of
    the time they are told by rank 0."""

    def __init__(self, checkpoint: CheckpointConfig) -> None:
        self._rules, self._last = checkpoint, clock()

    def __call__(self, step: int, evaluations: Mapping[int, dict[str, Any]]) -> bool:
        """Whether a checkpoint is due after `step`; `evaluations`: held-out figures by step, so far. The minutes count
        from the last one that was. Collective."""
        rules, losses = self._rules, held_out_losses(evaluations, self._rules.best_of)
        due = step % rules.every_steps == 0
        due = due or losses.get(step, math.inf) < min((losses[s] for s in losses if s < step), default=math.inf)
        if rules.every_minutes is not None and not due:
            due = collectives.broadcast(clock() - self._last >= 60 * rules.every_minutes)
        if due:
            self._last = clock()
        return due


def held_out_losses(evaluations: Mapping[int, dict[str, Any]], of: str | None) -> dict[int, float]:
    """The held-out loss of `of`, a subset or `ALL`, after each step that was evaluated, nats per token; infinite where
    it is no number. None of the model before the first step, of which there is no checkpoint; none at all for None."""
    parts = {step: {ALL: figures["all"]} | figures["subsets"] for step, figures in evaluations.items() if step and of}
    losses = {step: part[of]["loss"] if of in part else math.inf for step, part in parts.items()}
    return {step: math.inf if math.isnan(loss) else loss for step, loss in losses.items()}
