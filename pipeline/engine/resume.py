"""What of a DeepSpeed JSON may change in a run, at a resume. The JSON of the resumed run rules, or it is refused."""

import math
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pipeline.config.differences import flat
from pipeline.engine.checkpoints import checkpoints_of
from pipeline.engine.schedule import rate_at

APPLIED = (
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    *(f"optimizer.params.{key}" for key in ("lr", "betas", "eps", "weight_decay", "momentum", "dampening", "nesterov")),
    "scheduler",
    "scheduler.*",
    "zero_optimization.*bucket_size",
    "zero_optimization.stage3_*",
    *(f"zero_optimization.{key}" for key in ("overlap_comm", "contiguous_gradients", "reduce_scatter")),
    "zero_optimization.allgather_partitions",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "activation_checkpointing*",
    "checkpoint*",
)
"""Keys, in patterns, whose values in the JSON of the resumed run hold from its first step on."""

NO_MATTER = (
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "log_level",
    "disable_python_gc",
    "managed_gradient_accumulation",  # follows from the estimator
    "zero_optimization.stage",  # `config_to_load` judges it
    *(
        f"{section}*"
        for section in ("flops_profiler", "comms_logger", "timers", "aio", "tensorboard", "wandb", "comet")
    ),
    "csv_monitor*",
)
"""Keys that change nothing of what is trained, or that are judged elsewhere."""


def changed_settings(checkpoint: Path, saved: dict[str, Any] | None, settings: dict[str, Any]) -> list[str]:
    """A sentence for each key of the DeepSpeed JSON that another value holds for from this resume on; `saved`: the
    settings that `checkpoint` was written under, None where it does not say (of an earlier version).

    Raises ValueError with the keys that cannot change in a run.
    """
    if saved is None:
        return []
    before, here = flat("", _alike(saved)), flat("", _alike(settings))
    differing = [key for key in {**before, **here} if before.get(key) != here.get(key)]
    differing = [key for key in differing if not _matches(key, NO_MATTER)]
    lines = {key: f"{key}: {before.get(key, 'absent')} -> {here.get(key, 'absent')}" for key in differing}
    if refused := [lines[key] for key in differing if not _matches(key, APPLIED)]:
        listed = "\n".join(f"  {line}" for line in refused)
        raise ValueError(
            f"resume: {checkpoint} was written under another DeepSpeed JSON, in keys that cannot change in a run "
            f"(there -> here):\n{listed}\nGive them back (deepspeed.step-*.json in the run's directory is the old "
            "one), or start anew from its weights: model.name_or_path = RUN_DIR/model"
        )
    found = [f"{line}, from here on" for line in lines.values()]
    step = int(checkpoint.name.removeprefix("step-")) + 1
    rates = rate_at(saved, step), rate_at(settings, step)
    if not math.isclose(*rates, rel_tol=1e-9):
        found.append(f"the learning rate of step {step} is {rates[1]:.4g}; it would have been {rates[0]:.4g}")
    return found


def refuse_earlier_end(checkpoint: Path, max_steps: int) -> None:
    """Raises ValueError where `checkpoint` is of a later step than the run is to end at."""
    step = int(checkpoint.name.removeprefix("step-"))
    if step <= max_steps:
        return
    steps = (int(name.removeprefix("step-")) for name in checkpoints_of(str(checkpoint.parent.parent)))
    earlier = [other for other in steps if other <= max_steps]
    back = f", or go back with --resume {checkpoint.parent / f'step-{earlier[-1]}'}" if earlier else ""
    raise ValueError(
        f"max_steps {max_steps} is below the step of the checkpoint to go on from, {checkpoint}; raise it to {step} or "
        f"more{back}"
    )


def _alike(settings: dict[str, Any]) -> dict[str, Any]:
    optimizer = settings["optimizer"]
    return settings | {"optimizer": optimizer | {"type": str(optimizer["type"]).lower()}}


def _matches(key: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)
