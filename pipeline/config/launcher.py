"""What the launcher told this process, known before there is a process group."""

import os
import sys

MPI_RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")
"""Where mpirun's implementations put the rank; the rest DeepSpeed finds out through mpi4py."""


MPI_WORLDS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
"""Where they put the number of ranks."""


def say(what: str) -> None:
    """On standard error, on the first rank alone."""
    ranks = (os.environ.get(name) for name in ("RANK", *MPI_RANKS, "SLURM_PROCID"))
    if next((rank for rank in ranks if rank), "0") == "0":
        print(what, file=sys.stderr, flush=True)


def rank_among_several() -> str | None:
    """This rank, where a launcher says that it started more than one."""
    worlds = (os.environ.get(name, "") for name in ("WORLD_SIZE", *MPI_WORLDS, "SLURM_STEP_NUM_TASKS"))
    ranks = (os.environ.get(name, "") for name in ("RANK", *MPI_RANKS, "SLURM_PROCID"))
    return next(filter(None, ranks), None) if any(world not in ("", "1") for world in worlds) else None


def check_environment() -> None:
    """Raises ValueError where a launcher has left half of what ranks need to meet, or two launchers contradict each
    other: every process would then train on its own, as a world of one, or wait for ever."""
    mpi = started_by_mpi()
    rank, world, local = (_number(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    slurm = rank is None and (_number("SLURM_STEP_NUM_TASKS") or 1) > 1
    names = ("WORLD_SIZE", *MPI_WORLDS, *(["SLURM_STEP_NUM_TASKS"] if slurm else []))
    said = {name: number for name in names if (number := _number(name)) is not None}
    if len(set(said.values())) > 1:
        both = " and ".join(f"{name}={number}" for name, number in said.items())
        raise ValueError(f"the environment says {both}: unset what an earlier launcher left, and start again")
    if rank is None and world is not None and world > 1 and not mpi and not slurm:
        raise ValueError(
            f"WORLD_SIZE is {world} and RANK is not set, so this process would train alone. Export RANK, LOCAL_RANK, "
            "MASTER_ADDR and MASTER_PORT for every process, start with deepspeed or torchrun, or unset WORLD_SIZE"
        )
    if rank is None or mpi:
        return
    if world is None:
        raise ValueError(f"RANK is {rank} and WORLD_SIZE is not set: export how many processes there are in all")
    if not 0 <= rank < world:
        raise ValueError(f"RANK is {rank} and WORLD_SIZE is {world}: ranks count from 0 to {world - 1}")
    if world > 1 and local is None:
        raise ValueError(
            f"RANK is {rank} and WORLD_SIZE is {world}, but LOCAL_RANK is not set, so this process would train alone. "
            "Export LOCAL_RANK: the number of this process on its host, 0 where each host or pod has one "
            "(under srun: $SLURM_LOCALID)"
        )
    if world > 1 and "MASTER_ADDR" not in os.environ:
        raise ValueError(
            f"RANK is {rank} and WORLD_SIZE is {world}, but MASTER_ADDR is not set, so this process would train "
            "alone. Export the name of rank 0's host"
        )


def started_by_mpi() -> bool:
    return bool({*MPI_RANKS} & os.environ.keys())


def expected_world() -> int | None:
    """How many ranks the launcher says there are; None where it says nothing."""
    names = ("WORLD_SIZE", *MPI_WORLDS)
    return next((number for name in names if (number := _number(name)) is not None), None)


def _number(name: str) -> int | None:
    """An environment variable. Raises ValueError where it is no whole number."""
    text = os.environ.get(name, "").strip()
    if not text:
        return None
    if not text.isdigit():
        raise ValueError(f"the environment says {name}={text!r}, which is no whole number; export the right one")
    return int(text)
