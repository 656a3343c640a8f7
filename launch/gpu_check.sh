#!/usr/bin/env bash
# For a machine with an accelerator, in about 10 minutes: installs, then launch/gpu_check.py compares scores with the
# CPU's, decisions under every ZeRO stage, and times, memory and a resume at 125M parameters. runs/gpu_check/check.json
# has what became of each stage, runs/gpu_check/benchmark.json the figures.
#   bash launch/gpu_check.sh [--offline DIR] [--cpu] [STAGE ...]
# --offline: no package index is asked. What python3 has already is used, its torch for CUDA above all; wheels of the
# rest lie in DIR. pip says what is missing; on a machine of the kind that has an index, `pip download -d DIR --no-deps
# NAME==VERSION` fetches it, and `pip wheel -w DIR --no-deps --no-build-isolation deepspeed==0.19.8` builds DeepSpeed's.
# --cpu: a small form on two CPU ranks.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ "${1:-}" = --offline ]; then
  wheels=$(realpath "${2:?usage: bash launch/gpu_check.sh [--offline DIR] [--cpu] [STAGE ...]}")
  shift 2
  packages='import sysconfig; print(sysconfig.get_path("purelib"))'
  [ -x .venv/bin/python ] || python3 -m venv --without-pip .venv
  # Not --system-site-packages: python3 may be a virtual environment itself, which that would pass over.
  python3 -c "$packages" >"$(.venv/bin/python -c "$packages")/of_python3.pth"
  pip=(python3 -m pip --python .venv/bin/python --disable-pip-version-check install --quiet --no-index
    --find-links "$wheels")
  "${pip[@]}" "setuptools>=77"  # what builds the project, as in pyproject.toml
  "${pip[@]}" --no-build-isolation -e .
  export PATH="$PWD/.venv/bin:$PATH" TORCH_EXTENSIONS_DIR="$PWD/.venv/torch_extensions" HF_HUB_OFFLINE=1
else
  . launch/setup.sh "[test]"
fi
exec python launch/gpu_check.py "$@"
