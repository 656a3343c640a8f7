"""The learning rate that a DeepSpeed JSON asks for at a step, and a scheduler brought to where it asks it to be."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.runtime import lr_schedules


def bring_to(scheduler: Any, updates: int) -> None:
    """Put a scheduler of DeepSpeed's, just made, after `updates` updates of the weights, its rate into the optimizer.

    Schedulers begin before their first iteration (-1) unless their `last_batch_iteration` says otherwise. There
    WarmupCosineLR trains at rate 0; from 0 on, at its `warmup_min_ratio`. DeepSpeed by itself would train the first
    step of a schedule that begins at 0 at the optimizer's own rate.
    """
    iteration = scheduler.last_batch_iteration + updates
    if iteration >= 0:
        scheduler.step(iteration)


def rate_at(settings: dict[str, Any], step: int) -> float:
    """The learning rate of optimizer step `step` (from 1), if no update before was skipped."""
    schedule = settings.get("scheduler")
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=settings["optimizer"]["params"]["lr"])
    if schedule:
        with _quiet():
            scheduler = getattr(lr_schedules, schedule["type"])(optimizer, **schedule["params"])
            bring_to(scheduler, step - 1)
    return float(optimizer.param_groups[0]["lr"])


@contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed warns wherever a rate is asked for before a schedule began."""
    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
