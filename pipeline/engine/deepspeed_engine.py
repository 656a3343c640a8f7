"""The DeepSpeed engine: made, stepped, saved, loaded. Nothing in it is patched."""

import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.engine import collectives
from pipeline.engine.checkpoint_files import _convert
from pipeline.engine.checkpoints import checkpoint_not_written
from pipeline.engine.launch import device
from pipeline.engine.schedule import bring_to


def config_to_load(checkpoint: Path, saved: dict[str, Any], deepspeed_config: dict[str, Any]) -> dict[str, Any]:
    """`deepspeed_config` for an engine that is to load `checkpoint`, written by an engine of identity `saved`.

    Other ranks, or ZeRO 1 for 2 and back, need DeepSpeed's universal form, which an engine must expect from the start.
    Raises ValueError where there is none.
    """
    stage, ranks = deepspeed_config.get("zero_optimization", {}).get("stage", 0), collectives.world_size()
    if (saved["zero_stage"], saved["ranks"]) == (stage, ranks):
        return deepspeed_config
    if not any({saved["zero_stage"], stage} <= stages for stages in ({0}, {1, 2}, {3})):
        raise ValueError(
            f"resume: {checkpoint} was written under ZeRO {saved['zero_stage']} and cannot go on under ZeRO {stage} "
            f"(engine.zero_stage: {saved['zero_stage']} -> {stage}); only 1 and 2 can change places. Go back to it, or "
            "start anew from its weights: model.name_or_path = RUN_DIR/model, written at the end of a run (which is "
            f"here with --max_steps {checkpoint.name.removeprefix('step-')} and the old deepspeed_config)"
        )
    if stage == 0:  # every rank has all of it
        return deepspeed_config
    if saved["optimizer"] not in ("adam", "adamw"):
        raise ValueError(
            f"resume: {checkpoint} was written by {saved['ranks']} ranks under ZeRO {saved['zero_stage']}, this is "
            f"{ranks} under ZeRO {stage}. DeepSpeed's universal checkpoint knows Adam and AdamW, not "
            f"{saved['optimizer']}: go on with as many ranks under the same stage"
        )
    return deepspeed_config | {"checkpoint": deepspeed_config.get("checkpoint", {}) | {"load_universal": True}}


def initialize(model: PreTrainedModel, deepspeed_config: dict[str, Any]) -> DeepSpeedEngine:
    """The engine around `model`, with the optimizer, precision and ZeRO stage of `deepspeed_config`."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=trained, config=deepspeed_config, dist_init_required=False
    )
    if engine.lr_scheduler is not None:
        bring_to(engine.lr_scheduler, 0)
    return engine


def frozen(model: PreTrainedModel, like: DeepSpeedEngine, deepspeed_config: dict[str, Any]) -> torch.nn.Module:
    """`model` for forwards only, beside the engine `like`, in its precision: partitioned as it is under ZeRO-3, else
    whole on every rank."""
    model.requires_grad_(False).eval()
    if like.zero_optimization_stage() < 3:
        dtype = torch.bfloat16 if like.bfloat16_enabled() else torch.float16 if like.fp16_enabled() else torch.float32
        return model.to(like.device, dtype)
    kept = ("train_micro_batch_size_per_gpu", "bf16", "fp16", "zero_optimization")
    settings = {key: value for key, value in deepspeed_config.items() if key in kept}
    engine, *_ = deepspeed.initialize(model=model, config=settings, dist_init_required=False)
    engine.eval()
    return engine


def settings_of(engine: DeepSpeedEngine) -> dict[str, Any]:
    """What of its DeepSpeed JSON decides which estimators go with an engine, in the JSON's own form."""
    optimizer = engine.optimizer_name() or type(engine.basic_optimizer).__name__
    return {
        "optimizer": {"type": "adamw" if "adam" in optimizer.lower() else optimizer},
        "zero_optimization": {"stage": engine.zero_optimization_stage(), "overlap_comm": engine.zero_overlap_comm()},
    }


def refuse_shared_samples(engine: DeepSpeedEngine) -> None:
    """Raises ValueError where several ranks work on the same samples: scores and the all-reduced reference would count
    each of them several times, or each rank's part of a layer as the whole."""
    own, world = engine.dp_world_size, collectives.world_size()
    if own != world:
        raise ValueError(
            f"the DeepSpeed engine has samples of their own for {own} of {world} ranks (tensor, sequence or pipeline "
            "parallelism), and scores need them for all: make it with data parallelism and ZeRO alone"
        )


def save_checkpoint(engine: DeepSpeedEngine, checkpoint: Path, state: dict[str, Any]) -> None:
    """Write the directory `checkpoint` in DeepSpeed's own format, with `state` in it. Collective.

    When it returns, all ranks have written their parts; making it the newest is `checkpoint.publish`. Raises OSError
    where this rank could not write its own.
    """
    try:
        engine.save_checkpoint(str(checkpoint.parent), tag=checkpoint.name, client_state=state, save_latest=False)
    except (OSError, RuntimeError) as error:
        raise checkpoint_not_written(checkpoint, error) from error
    collectives.barrier()


def identity(engine: DeepSpeedEngine) -> dict[str, Any]:
    """What a checkpoint must have in common with the engine that loads it."""
    parameters = dict(engine.module.named_parameters())
    frozen = [name for name, parameter in parameters.items() if not parameter.requires_grad]
    return {
        "ranks": collectives.world_size(),
        "zero_stage": engine.zero_optimization_stage(),
        "bf16": engine.bfloat16_enabled(),
        "fp16": engine.fp16_enabled(),
        "optimizer": engine.optimizer_name(),
        "parameters": {name: list(getattr(p, "ds_shape", p.shape)) for name, p in parameters.items()},
    } | ({"frozen": frozen} if frozen else {})


def load_checkpoint(engine: DeepSpeedEngine, checkpoint: Path, keys: Iterable[str]) -> dict[str, Any]:
    """Put the engine, as `initialize` returned it, into the state saved in `checkpoint` and return `keys` of what was
    saved with it. Collective.

    Weights, moments, loss scale and counts of steps are the checkpoint's. The optimizer's settings, clipping and the
    schedule are the engine's own JSON's: DeepSpeed would take settings and clipping from the checkpoint, and of the
    schedule its place from there and its shape from here, so that the rate jumps one step late.

    DeepSpeed unpickles checkpoints in full: load only what you trust.
    """
    universal = engine.load_universal_checkpoint()
    source = _universal_form(checkpoint) if universal else checkpoint
    optimizer, clipping = engine.basic_optimizer, getattr(engine.optimizer, "clip_grad", None)
    # What an optimizer knows by itself (FusedAdam: its step count) is in its groups too, and not among its defaults.
    own = [{key: group[key] for key in optimizer.defaults if key in group} for group in optimizer.param_groups]
    path, state = engine.load_checkpoint(str(source.parent), tag=source.name, load_lr_scheduler_states=False)
    if path is None:
        raise ValueError(f"resume: DeepSpeed could not load {checkpoint}; its messages above say why")
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)
    if clipping is not None:
        engine.optimizer.clip_grad = clipping
    if engine.lr_scheduler is not None:
        bring_to(engine.lr_scheduler, engine.global_steps - engine.skipped_steps)
    if universal:
        # ZeRO-3 gives all its sub-groups one step counter, which torch's Adam would advance once for each of them.
        for adam in engine.basic_optimizer.state.values():
            if isinstance(adam.get("step"), Tensor):
                adam["step"] = adam["step"].clone()
        collectives.barrier()
        collectives.on_rank_0(lambda: shutil.rmtree(source.parent))
    return {key: state[key] for key in keys}


def _universal_form(checkpoint: Path) -> Path:
    """A copy of `checkpoint` with every parameter and its moments whole, in a new directory inside of it. Collective;
    rank 0 makes it.
    """
    if collectives.rank() == 0:
        print(
            f"resume: {checkpoint} was written by other ranks or under another ZeRO stage; converting a copy",
            flush=True,
        )
    converted, trouble = collectives.broadcast(collectives.on_rank_0(lambda: _convert(checkpoint)))
    if trouble:
        raise ValueError(f"resume: {checkpoint} could not be converted for other ranks: {trouble}")
    return converted


def take_step(engine: DeepSpeedEngine) -> float | None:
    """DeepSpeed's step: at the end of an optimizer step the update, and its global gradient norm before clipping.

    Where the accumulation is ours ("managed_gradient_accumulation": false) every call is the end of one. Returns None
    inside of the accumulation, and (accumulation ours) under ZeRO 0 in float32, where nobody knows the norm; inf where
    DeepSpeed skipped an update that was not finite. ZeRO 0 in float32 has no such skip: FloatingPointError is raised
    instead, on all ranks alike, before anything is updated.
    """
    norm: float | None = None
    managed = engine.managed_gradient_accumulation()
    boundary = engine.is_gradient_accumulation_boundary() or not managed
    plain = engine.zero_optimization_stage() == 0 and not (engine.bfloat16_enabled() or engine.fp16_enabled())
    if plain and boundary:  # where DeepSpeed keeps no norm either
        gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if not managed:  # not yet averaged: only good to know whether it is finite, of all ranks
            norm = float(collectives.all_reduce_sum(torch.tensor(norm, device=device())))
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"the gradient of step {engine.global_steps + 1} is not finite; nothing was updated"
            )
    engine.step()
    if boundary and norm is None and (kept := engine.get_global_grad_norm()) is not None:
        norm = float(kept)
    return norm if managed or not plain else None


def full_state_dict(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    """All weights, whole, on the CPU, on rank 0 (empty elsewhere); one parameter is gathered at a time. Collective."""
    state: dict[str, Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if collectives.rank() == 0:
                state[name] = parameter.detach().cpu().clone()
    if collectives.rank() == 0:
        saved = engine.module.state_dict().keys()
        state |= {name: buffer.cpu() for name, buffer in engine.module.named_buffers() if name in saved}
    return state


def monitor_of(engine: DeepSpeedEngine) -> Callable[[Mapping[str, float]], None] | None:
    """What takes scalars, by name, to where `wandb`, `comet` and `csv_monitor` of the DeepSpeed JSON send DeepSpeed's
    own figures, at the same place on their axis, the samples trained on; None where none is enabled, and on all ranks
    but the first. `tensorboard` gets nothing: RUN_DIR/tensorboard has it already."""
    every = engine.monitor
    monitors = [one for one in (every.wandb_monitor, every.comet_monitor, every.csv_monitor) if one is not None]

    def write(scalars: Mapping[str, float]) -> None:
        for monitor in monitors:
            monitor.write_events([(name, value, engine.global_samples) for name, value in scalars.items()])

    return write if monitors else None


def peak_memory() -> int:
    """Most bytes allocated on the accelerator so far; on the CPU, of the process's resident set as sampled here."""
    return get_accelerator().max_memory_allocated()


def held_memory() -> int:
    """Bytes allocated on the accelerator now; on the CPU, of the process's resident set. Grows where a step leaks."""
    return get_accelerator().memory_allocated()


def reset_peak_memory() -> None:
    """Let `peak_memory` begin anew with what is allocated now."""
    get_accelerator().reset_peak_memory_stats()
