#!/usr/bin/env bash
# For a machine with an accelerator, in about 10 minutes: installs, then launch/gpu_check.py compares scores with the
# CPU's, decisions under every ZeRO stage, and times, memory and a resume at 125M parameters. runs/gpu_check/check.json
# has what became of each stage, runs/gpu_check/benchmark.json the figures.
#   bash launch/gpu_check.sh [--offline DIR] [--cpu]
# --offline: wheels of everything in launch/constraints.txt and of setuptools lie in DIR, and no package index is asked
# (`pip download -d DIR -c launch/constraints.txt '.[test]' setuptools`, on a machine of the kind that has one).
# --cpu: a small form on two CPU ranks.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ "${1:-}" = --offline ]; then
  PIP_FIND_LINKS=$(realpath "${2:?usage: bash launch/gpu_check.sh [--offline DIR] [--cpu]}")
  export PIP_FIND_LINKS PIP_NO_INDEX=1 HF_HUB_OFFLINE=1
  shift 2
fi
. launch/setup.sh "[test]"
exec python launch/gpu_check.py "$@"
