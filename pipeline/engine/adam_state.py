"""Adam's second moments out of a running engine, at any ZeRO stage."""

from typing import Any

import torch
from deepspeed import DeepSpeedEngine

from pipeline.engine import collectives
from pipeline.engine.own_parts import own_part
from pipeline.models.second_moments import SecondMoments


def second_moments(engine: DeepSpeedEngine) -> SecondMoments | None:
    """What Adam's second moments are now; None before the first update. Of fused experts those of every expert, as
    `PARAMETER[EXPERT]`. Collective: one all-reduce of all rows and columns.

    Each rank adds up its own slice of every matrix; what several ranks hold (ZeRO 0) counts once.
    """
    updates = engine.global_steps - engine.skipped_steps
    if updates == 0:
        return None
    matrices = {
        name: p
        for name, p in engine.module.named_parameters()
        if len(_shape(p)) in (2, 3) and all(_shape(p)) and p.requires_grad
    }
    sums = []
    for parameter in matrices.values():
        experts, rows, columns = (1, *_shape(parameter))[-3:]
        own = own_part(engine, parameter)
        start, values = own.start, own.state(engine, "exp_avg_sq")
        # Whole rows around this rank's slice.
        first, offset = divmod(start, columns)
        filled = values.new_zeros(-(-(offset + len(values)) // columns) * columns)
        filled[offset : offset + len(values)] = values
        filled_RC = filled.view(-1, columns)
        row_sums = values.new_zeros(experts * rows)
        row_sums[first : first + len(filled_RC)] = filled_RC.sum(1)
        column_sums = filled_RC.sum(0)
        if experts > 1:
            expert_R = torch.arange(first, first + len(filled_RC), device=values.device) // rows
            column_sums = values.new_zeros(experts, columns).index_add_(0, expert_R, filled_RC)
        sums += [row_sums, column_sums.flatten(), values.new_full((1,), len(values))]
    summed = iter(collectives.all_reduce_sum(torch.cat(sums)).split([len(part) for part in sums]))
    betas = engine.basic_optimizer.param_groups[0]["betas"]
    means = {}
    for name, parameter in matrices.items():
        experts, rows, columns = (1, *_shape(parameter))[-3:]
        row_sums, column_sums, held = next(summed), next(summed), next(summed)
        times = held / (experts * rows * columns) * (1 - betas[1] ** updates)
        row_means, column_means = row_sums / columns / times, column_sums / rows / times
        names = [name] if len(_shape(parameter)) == 2 else [f"{name}[{expert}]" for expert in range(experts)]
        for key, *pair in zip(names, row_means.split(rows), column_means.split(columns), strict=True):
            means[key] = (pair[0], pair[1])
    return SecondMoments(means, betas[1], updates)


def _shape(parameter: Any) -> tuple[int, ...]:
    """Of the whole parameter."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
