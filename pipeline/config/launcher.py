"""What the launcher told this process, known before there is a process group."""

import os

MPI_RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")
"""Where mpirun's implementations put the rank; the rest DeepSpeed finds out through mpi4py."""


def launched_rank() -> int:
    """The rank that the launcher gave this process, known before there is a process group; 0 without a launcher."""
    names = ("RANK", *MPI_RANKS) if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) == 1 else ("RANK", "SLURM_PROCID")
    return next((int(os.environ[name]) for name in names if name in os.environ), 0)
