"""The DeepSpeed engine: the only importer of deepspeed. Nothing in it is patched."""

import itertools
import logging
import math
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, wait
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
from pipeline.checkpoint import identity_of, not_written
from pipeline.influence import SecondMoments

MOMENTS = ("exp_avg", "exp_avg_sq")


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
    # Under mpirun DeepSpeed would put its own default in the place of MASTER_PORT.
    deepspeed.init_distributed(verbose=False, distributed_port=int(os.environ.get("MASTER_PORT", 29500)))
    if get_accelerator().device_name() != "cpu":
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    collectives.introduce()  # with the device set: NCCL's collectives happen there
    return device()


def device() -> torch.device:
    """Of this rank."""
    return torch.device(get_accelerator().current_device_name())


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
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=list(model.parameters()), config=deepspeed_config, dist_init_required=False
    )
    return engine


def save_checkpoint(engine: DeepSpeedEngine, checkpoint: Path, state: dict[str, Any]) -> None:
    """Write the directory `checkpoint` in DeepSpeed's own format, with `state` in it. Collective.

    When it returns, all ranks have written their parts; making it the newest is `checkpoint.publish`. Raises OSError
    where this rank could not write its own.
    """
    try:
        engine.save_checkpoint(str(checkpoint.parent), tag=checkpoint.name, client_state=state, save_latest=False)
    except (OSError, RuntimeError) as error:
        raise not_written(checkpoint, error) from error
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
    universal = engine.load_universal_checkpoint()
    source = _universal_form(checkpoint) if universal else checkpoint
    path, state = engine.load_checkpoint(str(source.parent), tag=source.name)
    if path is None:
        raise ValueError(f"resume: DeepSpeed could not load {checkpoint}; its messages above say why")
    if universal:
        # ZeRO-3 gives all its sub-groups one step counter, which torch's Adam would advance once for each of them.
        for adam in engine.basic_optimizer.state.values():
            if isinstance(adam.get("step"), Tensor):
                adam["step"] = adam["step"].clone()
        collectives.barrier()
        if collectives.rank() == 0:
            shutil.rmtree(source.parent)
    return {key: state[key] for key in keys}


def _universal_form(checkpoint: Path) -> Path:
    """A copy of `checkpoint` with every parameter and its moments whole, in a new directory inside of it. Collective.

    Rank 0 makes it. The others hear from it every few seconds: in one long wait for it a collective would time out.
    """
    if collectives.rank() == 0:
        print(
            f"resume: {checkpoint} was written by other ranks or under another ZeRO stage; converting a copy",
            flush=True,
        )
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(_convert, checkpoint) if collectives.rank() == 0 else None
        while not collectives.broadcast(bool(work and wait([work], timeout=5).done)):
            pass
    converted, trouble = collectives.broadcast(work and work.result())
    if trouble:
        raise ValueError(f"resume: {checkpoint} could not be converted for other ranks: {trouble}")
    return converted


def _convert(checkpoint: Path) -> tuple[Path | None, str]:
    """The converted checkpoint, or what went wrong."""
    try:
        # A name of its own: several runs may go on from one checkpoint at the same time. What a killed one leaves there
        # is removed with the checkpoint.
        directory = Path(tempfile.mkdtemp(prefix="universal-", dir=checkpoint))
        # Links, because DeepSpeed would look into all folders below; relative names, because it takes its output
        # folder's for a regular expression.
        (directory / "parts").mkdir()
        for part in checkpoint.glob("*.pt"):
            (directory / "parts" / part.name).symlink_to(Path("..", "..", part.name))
        command = [sys.executable, "-P", "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
        folders = ["--input_folder", "parts", "--output_folder", "whole"]
        done = subprocess.run([*command, *folders], cwd=directory, capture_output=True, text=True)
    except OSError as error:
        return None, str(error)
    if done.returncode:
        shutil.rmtree(directory, ignore_errors=True)
        return None, "\n".join(done.stderr.splitlines()[-5:])
    return directory / "whole", ""


def checkpoint_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The weights in a checkpoint of any ZeRO stage and world size, on the CPU: in float32 where ZeRO kept them so.

    DeepSpeed unpickles checkpoints in full: load only what you trust.
    """
    if list(checkpoint.glob("*optim_states.pt")):
        return get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    saved = torch.load(checkpoint / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)
    return saved["module"]


def checkpoint_adam(checkpoint: Path) -> dict[str, dict[str, Tensor]] | None:
    """Adam's state in a checkpoint of any ZeRO stage and world size, on the CPU; None under another optimizer.

    {parameter: {"exp_avg", "exp_avg_sq": in the parameter's shape, "step": updates so far}}. From ZeRO 1 on DeepSpeed
    converts a copy inside of `checkpoint`, removed afterwards. Raises ValueError where that fails.

    DeepSpeed unpickles checkpoints in full: load only what you trust.
    """
    saved = identity_of(checkpoint)["engine"]
    if saved["optimizer"] not in ("adam", "adamw"):
        return None
    shapes: dict[str, list[int]] = saved["parameters"]
    optimizer = _saved_optimizer(checkpoint)
    step = _updates(optimizer)
    if not list(checkpoint.glob("*optim_states.pt")):
        sizes = [math.prod(shape) for shape in shapes.values()]
        # In the parameters' order: one state for each, or (bf16 and fp16) one flat state for all.
        flat = {key: torch.cat([state[key].flatten() for state in optimizer["state"].values()]) for key in MOMENTS}
        parts = {key: dict(zip(shapes, whole.split(sizes), strict=True)) for key, whole in flat.items()}
        return {
            name: {key: parts[key][name].view(shape) for key in MOMENTS} | {"step": step}
            for name, shape in shapes.items()
        }
    converted, trouble = _convert(checkpoint)
    if converted is None:
        raise ValueError(f"{checkpoint}: Adam's moments could not be put together: {trouble}")
    try:
        return {
            name: {key: _whole(converted / "zero" / name / f"{key}.pt").view(shape) for key in MOMENTS} | {"step": step}
            for name, shape in shapes.items()
        }
    finally:
        shutil.rmtree(converted.parent)


def checkpoint_learning_rate(checkpoint: Path) -> float:
    """The learning rate of the step that comes next: schedulers set it at the end of the step before.

    DeepSpeed unpickles checkpoints in full: load only what you trust.
    """
    return float(_saved_optimizer(checkpoint)["param_groups"][0]["lr"])


def _saved_optimizer(checkpoint: Path) -> dict[str, Any]:
    """What the optimizer itself saved; from ZeRO 1 on rank 0's part."""
    parts = sorted(checkpoint.glob("*optim_states.pt"))
    if not parts:
        whole = torch.load(checkpoint / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)
        saved = whole["optimizer"]
        return saved.get("optimizer_state_dict", saved)  # around it in bf16 and fp16: DeepSpeed's own
    zero = torch.load(parts[0], map_location="cpu", weights_only=False)["optimizer_state_dict"]
    return zero["base_optimizer_state"] if "base_optimizer_state" in zero else zero["optimizer_state_dict"]


def _whole(path: Path) -> Tensor:
    """A parameter's state in DeepSpeed's universal form; ZeRO-3's is the bare tensor, flat."""
    saved = torch.load(path, map_location="cpu", weights_only=False)
    return saved["param"] if isinstance(saved, dict) else saved


def _updates(optimizer: dict[str, Any]) -> Tensor:
    """Adam's step count, which some implementations keep once a group."""
    state, group = next(iter(optimizer["state"].values())), optimizer["param_groups"][0]
    return torch.as_tensor(state.get("step", group.get("step")))


def checkpoint_position(checkpoint: Path) -> int:
    """The position in the sample order at which the run goes on from `checkpoint`."""
    path = next(checkpoint.glob("*mp_rank_00_model_states.pt"))
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)["position"]


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
                f"the gradient of step {engine.global_steps + 1} is not finite; nothing was updated. The newest "
                "checkpoint is from before: lower the learning rate, look at the documents, resume"
            )
    engine.step()
    if boundary and norm is None and (kept := engine.get_global_grad_norm()) is not None:
        norm = float(kept)
    return norm if managed or not plain else None


def second_moments(engine: DeepSpeedEngine) -> SecondMoments | None:
    """What Adam's second moments are now; None before the first update. Collective: one all-reduce of all rows and
    columns.

    Each rank adds up its own slice of every matrix; what several ranks hold (ZeRO 0) counts once.
    """
    updates = engine.global_steps - engine.skipped_steps
    if updates == 0:
        return None
    matrices = {name: p for name, p in engine.module.named_parameters() if getattr(p, "ds_shape", p.shape).numel()}
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in matrices.items()}
    shapes = {name: shape for name, shape in shapes.items() if len(shape) == 2}
    sums = []
    for name, (rows, columns) in shapes.items():
        start, values = _own_second_moment(engine, matrices[name])
        # Whole rows around this rank's slice.
        first, offset = divmod(start, columns)
        filled = values.new_zeros(-(-(offset + len(values)) // columns) * columns)
        filled[offset : offset + len(values)] = values
        filled_RC = filled.view(-1, columns)
        row_sums = values.new_zeros(rows)
        row_sums[first : first + len(filled_RC)] = filled_RC.sum(1)
        sums += [row_sums, filled_RC.sum(0), values.new_full((1,), len(values))]
    summed = iter(collectives.all_reduce_sum(torch.cat(sums)).split([len(part) for part in sums]))
    betas = engine.basic_optimizer.param_groups[0]["betas"]
    means = {}
    for name, (rows, columns) in shapes.items():
        row_sums, column_sums, held = next(summed), next(summed), next(summed)
        times = held / (rows * columns) * (1 - betas[1] ** updates)
        means[name] = (row_sums / columns / times, column_sums / rows / times)
    return SecondMoments(means, betas[1], updates)


def _own_second_moment(engine: DeepSpeedEngine, parameter: Any) -> tuple[int, Tensor]:
    """This rank's slice of the flattened second moment of `parameter`, and where it starts."""
    if hasattr(parameter, "ds_id"):
        values = parameter._z3_optimizer.get_local_fp32_param(parameter, "exp_avg_sq")
        start = min(collectives.rank() * len(values), parameter.ds_numel)
        return start, values[: parameter.ds_numel - start]  # the last partition is padded
    if not hasattr(parameter, "_hp_mapping"):  # ZeRO 0
        return 0, _unpartitioned_second_moment(engine, parameter)
    mapping = parameter._hp_mapping
    if mapping is None:
        return 0, torch.zeros(0, device=device())
    # Not through the mapping's own copy of the state, which is of the last step, not of a checkpoint just loaded. Each
    # group is one flat tensor to the optimizer inside: this rank's part of it.
    (part,) = engine.basic_optimizer.param_groups[mapping.param_group_index]["params"]
    where = mapping.hp_fragment_address
    values = engine.basic_optimizer.state[part]["exp_avg_sq"].narrow(0, where.start, where.numel)
    return mapping.lp_fragment_address.start, values.to(device())


def _unpartitioned_second_moment(engine: DeepSpeedEngine, parameter: Any) -> Tensor:
    """At ZeRO 0, flattened: every rank has it. Of bf16 and fp16 the optimizer inside sees copies in float32: one flat
    tensor for each group, or (torch_adam) one for each parameter."""
    state = engine.basic_optimizer.state
    if parameter in state:
        return state[parameter]["exp_avg_sq"].flatten()
    groups = zip(engine.optimizer.fp16_groups, engine.basic_optimizer.param_groups, strict=True)
    members, copies = next((low, group["params"]) for low, group in groups if any(p is parameter for p in low))
    before = list(itertools.takewhile(lambda member: member is not parameter, members))
    if len(copies) == len(members):
        return state[copies[len(before)]]["exp_avg_sq"].flatten()
    (flat,) = copies
    return state[flat]["exp_avg_sq"].narrow(0, sum(member.numel() for member in before), parameter.numel())


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


def reset_peak_memory() -> None:
    """Let `peak_memory` begin anew with what is allocated now."""
    get_accelerator().reset_peak_memory_stats()
