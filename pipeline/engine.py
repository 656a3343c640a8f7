"""The DeepSpeed engine: the only importer of deepspeed. Nothing in it is patched."""

import logging
import math
import os
import socket
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import get_accelerator
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor
from transformers import PreTrainedModel

from pipeline import collectives


def join_process_group() -> torch.device:
    """Meet the other ranks, started by deepspeed, mpirun, torchrun or srun, and return this rank's device.

    A process started on its own, by plain python, is a world of one.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls collectives by names that newer torch deprecates: nothing that a user could mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
    if "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        if "MASTER_ADDR" not in os.environ:
            raise ValueError(
                "started by srun without MASTER_ADDR: export the first host's name (launch/ has an example)"
            )
        names = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS"}
        os.environ |= {name: os.environ[slurm] for name, slurm in names.items()}
        os.environ.setdefault("MASTER_PORT", "29500")
    elif not {"RANK", *collectives.MPI_RANKS} & os.environ.keys():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.setdefault("MASTER_PORT", port)
    deepspeed.init_distributed(verbose=False)
    collectives.introduce()
    accelerator = get_accelerator()
    local_rank = int(os.environ["LOCAL_RANK"])
    if accelerator.device_name() == "cpu":
        return torch.device("cpu")
    accelerator.set_device(local_rank)
    return torch.device(accelerator.device_name(local_rank))


def initialize(model: PreTrainedModel, deepspeed_config: dict[str, Any]) -> DeepSpeedEngine:
    """The engine around `model`, with the optimizer, precision and ZeRO stage of `deepspeed_config`."""
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=list(model.parameters()), config=deepspeed_config, dist_init_required=False
    )
    return engine


def save_checkpoint(engine: DeepSpeedEngine, checkpoint: Path, state: dict[str, Any]) -> None:
    """Write the directory `checkpoint` in DeepSpeed's own format, with `state` in it. Collective.

    When it returns, all ranks have written their parts; making it the newest is `checkpoint.publish`.
    """
    engine.save_checkpoint(str(checkpoint.parent), tag=checkpoint.name, client_state=state, save_latest=False)
    collectives.barrier()


def identity(engine: DeepSpeedEngine) -> dict[str, Any]:
    """What a checkpoint must have in common with the engine that loads it."""
    parameters = engine.module.named_parameters()
    return {
        "ranks": collectives.world_size(),
        "zero_stage": engine.zero_optimization_stage(),
        "bf16": engine.bfloat16_enabled(),
        "fp16": engine.fp16_enabled(),
        "optimizer": engine.optimizer_name(),
        "parameters": {name: list(getattr(p, "ds_shape", p.shape)) for name, p in parameters},
    }


def load_checkpoint(engine: DeepSpeedEngine, checkpoint: Path, keys: Iterable[str]) -> dict[str, Any]:
    """Put the engine into the state saved in `checkpoint` and return `keys` of what was saved with it. Collective.

    DeepSpeed unpickles checkpoints in full: load only what you trust.
    """
    path, state = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    if path is None:
        raise ValueError(f"resume: DeepSpeed could not load {checkpoint}; its messages above say why")
    return {key: state[key] for key in keys}


def checkpoint_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The weights in a checkpoint of any ZeRO stage and world size, on the CPU: in float32 where ZeRO kept them so.

    DeepSpeed unpickles checkpoints in full: load only what you trust.
    """
    if list(checkpoint.glob("*optim_states.pt")):
        return get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    saved = torch.load(checkpoint / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)
    return saved["module"]


def take_step(engine: DeepSpeedEngine) -> float | None:
    """DeepSpeed's step: at the end of an optimizer step the update, and its global gradient norm before clipping.

    Returns None inside of the accumulation, and inf where DeepSpeed skipped an update that was not finite. ZeRO 0 in
    float32 has no such skip: FloatingPointError is raised instead, on all ranks alike, before anything is updated.
    """
    norm: float | None = None
    plain = engine.zero_optimization_stage() == 0 and not (engine.bfloat16_enabled() or engine.fp16_enabled())
    if plain and engine.is_gradient_accumulation_boundary():  # where DeepSpeed keeps no norm either
        gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"the gradient of step {engine.global_steps + 1} is not finite; nothing was updated. The newest "
                "checkpoint is from before: lower the learning rate, look at the documents, resume"
            )
    boundary = engine.is_gradient_accumulation_boundary()
    engine.step()
    if boundary and norm is None and (kept := engine.get_global_grad_norm()) is not None:
        norm = float(kept)
    return norm


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


def peak_memory() -> int:
    """Most bytes allocated on the accelerator so far; on the CPU, of the process's resident set as sampled here."""
    return get_accelerator().max_memory_allocated()
