#!/usr/bin/env bash
# For a machine with an accelerator: the correctness tests that make sense there, then the benchmark in bf16 at context
# 1,024 for all estimators, in under 10 minutes. Prints the table; runs/gpu_check/benchmark.json has all figures.
#   bash launch/gpu_check.sh [benchmark options, such as --benchmark.peak_tflops 989]
# Written where no accelerator was at hand: never run as a whole.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/setup.sh "[test]"

if ! python -c 'import sys, torch; sys.exit(not torch.accelerator.is_available())'; then
  echo "gpu_check: torch sees no accelerator here; launch/benchmark_125m.yaml runs on CPUs" >&2
  exit 2
fi
# Those that need no ranks of their own: two ranks on one accelerator cannot meet.
timeout 240 python -m pytest -q tests/test_influence.py tests/test_loss.py tests/test_capture.py tests/test_residual.py \
  tests/test_benchmark.py -k "not rank and not beside and not sweep and not tokens and not formulas and not cannot"
exec timeout 330 deepspeed --num_accelerators 1 --module pipeline.benchmark --config launch/benchmark_125m.yaml \
  --run_dir runs/gpu_check --deepspeed_config ds_configs/benchmark_bf16.json --benchmark.warmup 5 \
  --benchmark.estimators '["none","lai","lli","residual","ghost","ghost/adam_state","ghost_exact"]' "$@"
