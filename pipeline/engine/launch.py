"""Meeting the other ranks, and this rank's device."""

import contextlib
import os
import socket
import time
from pathlib import Path

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch.utils import cpp_extension

from pipeline.config import launcher
from pipeline.engine import collectives, lost_contact, quiet

_TO_LOAD = 5.0
"""Seconds."""


def join_process_group() -> torch.device:
    """Meet the other ranks, started by deepspeed, mpirun, torchrun or srun, and return this rank's device.

    A process started on its own, by plain python, is a world of one. Raises ValueError where the environment is not
    whole, or the world that came together is not what it says.
    """
    launcher.check_environment()
    if "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        if "MASTER_ADDR" not in os.environ:
            raise ValueError(
                "started by srun without MASTER_ADDR: export the first host's name (launch/ has an example)"
            )
        names = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS"}
        os.environ |= {name: os.environ[slurm] for name, slurm in names.items()}
        os.environ.setdefault("MASTER_PORT", "29500")
    elif "RANK" not in os.environ and not launcher.started_by_mpi():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            free_port = str(free.getsockname()[1])
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.setdefault("MASTER_PORT", free_port)
    elif not launcher.started_by_mpi():
        os.environ.setdefault("LOCAL_RANK", "0")  # of a world of one: without it DeepSpeed asks MPI, whatever RANK says
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29500")
    expected = launcher.expected_world()
    # Under mpirun DeepSpeed would put its own default in the place of MASTER_PORT.
    port = int(os.environ.get("MASTER_PORT", 29500))
    for lock in locks_of_builds():
        launcher.say(
            f"{lock}: another process is building DeepSpeed's op, or was killed while it did. The run waits until the "
            "file is gone; delete it if nothing is being built"
        )
    try:
        with quiet.silent_meeting():
            deepspeed.init_distributed(verbose=False, distributed_port=port)
    except RuntimeError as error:
        if not ("EADDRINUSE" in str(error) or "address already in use" in str(error).lower()):
            raise
        raise ValueError(
            f"port {port} on this host is taken, perhaps by another job: choose another one with --master_port of the "
            "launcher (deepspeed, torchrun), or export MASTER_PORT (plain python, srun, mpirun)"
        ) from None
    if expected not in (None, collectives.world_size()):
        raise ValueError(
            f"the environment says that there are {expected} ranks, and {collectives.world_size()} came together. "
            "Under mpirun, use the MPI that mpi4py was built with; else start with deepspeed or torchrun"
        )
    quiet.silence_load_report()
    if collectives.rank() > 0:
        quiet.silence_bars()
    if get_accelerator().device_name() != "cpu":
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    lost_contact.introduce()  # with the device set: NCCL's collectives happen there
    return device()


def locks_of_builds() -> list[Path]:
    """The locks of PyTorch's extension builder that are older than it takes to load an op that is built. Processes wait
    for each other's without end or word, and that of one that was killed stays."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    with contextlib.suppress(FileNotFoundError):  # gone in between
        locks = [*root.glob("*/lock"), *root.glob("*/*/lock")]
        return sorted(lock for lock in locks if time.time() - lock.stat().st_mtime > _TO_LOAD)
    return []


def device() -> torch.device:
    """Of this rank."""
    return torch.device(get_accelerator().current_device_name())
