#!/usr/bin/env bash
# Make .venv at the project's root and install the pinned versions, from whatever package index pip is configured with.
#   bash launch/setup.sh [EXTRAS]     EXTRAS: [test]
# Sourced by quickstart.sh and test.sh; safe to run again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ ! -x .venv/bin/python ]; then
  for python in python3 python3.11 python3.12 python3.13 ""; do
    if "${python:-false}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then break; fi
  done
  if [ -z "$python" ]; then
    echo "setup: needs Python 3.11 or newer; found $(python3 --version 2>&1 || true)" >&2
    exit 2
  fi
  "$python" -m venv .venv
fi
if ! command -v c++ >/dev/null; then
  echo "setup: needs a C++ compiler, with which DeepSpeed builds a small op at its first start" \
    "(Debian, Ubuntu: apt-get install g++)" >&2
  exit 2
fi
if ! .venv/bin/python -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))'; then
  echo "setup: needs Python's C headers for that op (Debian, Ubuntu: apt-get install python3-dev)" >&2
  exit 2
fi
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c launch/constraints.txt torch
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c launch/constraints.txt -e ".${1:-}"
export PATH="$PWD/.venv/bin:$PATH"
# What DeepSpeed builds belongs to this checkout: two of them would rebuild it under each other's feet.
export TORCH_EXTENSIONS_DIR="$PWD/.venv/torch_extensions"
