#!/usr/bin/env bash
# Install with the test extras and run the test suite, two files at a time, each with a pair of ranks of its own. `--all`
# adds the slow markers (faults, multihost, slow); other arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/setup.sh "[test]"

select=(-m "not faults and not multihost and not slow")
if [ "${1:-}" = --all ]; then
  select=()
  shift
fi
export OMP_NUM_THREADS=1
exec python -m pytest -n 2 --dist loadfile "${select[@]}" "$@"
