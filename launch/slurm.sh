#!/usr/bin/env bash
# The main job under Slurm, one task a rank. NOT RUN HERE: no Slurm was at hand (the mapping of SLURM_* to ranks is
# pipeline.engine.launch.join_process_group). srun starts the ranks itself; `deepspeed --launcher slurm` drops --module.
#   sbatch launch/slurm.sh launch/quickstart.yaml [--influence.estimator lli ...]     from the project's root
#SBATCH --job-name=lai
# Edit: hosts.
#SBATCH --nodes=2
# Edit: ranks a host, one for each accelerator.
#SBATCH --ntasks-per-node=8
# Edit: accelerators a host (leave out on CPUs).
#SBATCH --gpus-per-node=8
# Edit: CPU cores a rank.
#SBATCH --cpus-per-task=8
# Edit: the limit.
#SBATCH --time=24:00:00
# Two minutes before the limit (and before a preemption, where PreemptParameters has send_user_signal) all ranks get
# SIGTERM: a checkpoint, and exit code 0. Edit: longer where a step with its checkpoint takes longer.
#SBATCH --signal=TERM@120
# After a preemption or a failed host the job is queued again, after the limit submit it again: --resume auto goes on.
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
: "${1:?usage: sbatch launch/slurm.sh CONFIG.yaml [--section.key value ...]}"

export PATH="$PWD/.venv/bin:$PATH" # Edit: where the venv is not at the project's root, which all hosts see.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000)) # two jobs on one host do not meet
export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK
export DEEPSPEED_TIMEOUT=10 # whole minutes until a silent host ends the run
# Edit, where ranks do not find each other: the interface between the hosts, for gloo. NCCL finds the fastest by itself.
# export GLOO_SOCKET_IFNAME=eth0

# One failed rank ends the others. srun hands all of this environment over (NCCL_*, HF_HOME), but does not take over
# sbatch's --cpus-per-task by itself.
exec srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
  python -u -m pipeline.train --config "$1" --resume auto "${@:2}"
