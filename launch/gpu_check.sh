#!/usr/bin/env bash
# For a machine with an accelerator, in under 10 minutes: scores and counts against the CPU's, the same decisions under
# every ZeRO stage, then the benchmark of all estimators in bf16 at context 1,024. Prints the tables;
# runs/gpu_check/benchmark.json has all figures.
#   bash launch/gpu_check.sh [benchmark options, such as --benchmark.peak_tflops 989]
# Written where no accelerator was at hand: not run yet.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/setup.sh "[test]"

if ! python -c 'import sys, torch; sys.exit(not torch.accelerator.is_available())'; then
  echo "gpu_check: torch sees no accelerator here; launch/benchmark_125m.yaml runs on CPUs" >&2
  exit 2
fi
timeout 100 python -m pytest -q tests/end_to_end/test_device.py
timeout 240 python -m pipeline.verify invariance --config launch/quickstart_pretrain.yaml --steps 2 --only ZeRO \
  --influence.estimator lai --run_dir runs/gpu_check/invariance
exec timeout 240 deepspeed --num_accelerators 1 --module pipeline.benchmark --config launch/benchmark_125m.yaml \
  --run_dir runs/gpu_check --deepspeed_config ds_configs/benchmark_bf16.json --benchmark.warmup 5 \
  --benchmark.estimators '["none","lai","lli","residual","ghost","ghost/adam_state","ghost_exact"]' "$@"
