#!/usr/bin/env bash
# Does dropping help? The same training under several arms, each at several seeds, and the report that compares them.
#   bash launch/arms.sh CONFIG.yaml OUT_DIR "ARM ..." "SEED ..." [--section.key value ...]
#   bash launch/arms.sh launch/arms_pile.yaml runs/arms_pile "none random loss lai lai,policy.flag=highest" "0 1 2"
# ARM: an estimator, and what else to set, after commas: lai,influence.precondition=adam_ema. `none`, plain training, is
# what the others are compared with. A seed decides the order of the samples, the weights of a model made from scratch
# and all else that is random, except the prepared data, which all runs share: OUT_DIR/data, of the first seed.
# Runs that are done are left alone, one that was cut short goes on. At the end: OUT_DIR/report.html and report.json.
# From the environment:
#   LAUNCHER   what starts a run; default `python -m`, one process: LAUNCHER="deepspeed --num_accelerators 2 --module"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
usage='usage: bash launch/arms.sh CONFIG.yaml OUT_DIR "ARM ..." "SEED ..." [--section.key value ...]'
config=${1:?$usage}
out=${2:?$usage}
read -ra arms <<<"${3:?$usage}"
read -ra seeds <<<"${4:?$usage}"
read -ra launcher <<<"${LAUNCHER:-python -m}"

# Edit: where the venv is not at the project's root.
export PATH="$PWD/.venv/bin:$PATH"

shared=(--data.prepared_dir "$out/data" --data.seed "${seeds[0]}")
python -m pipeline.prepare --config "$config" "${shared[@]}" "${@:5}"
runs=()
for seed in "${seeds[@]}"; do
  for arm in "${arms[@]}"; do
    IFS=, read -ra settings <<<"influence.estimator=$arm"
    run="$out/${arm//\//.}/seed-$seed"
    runs+=("$run")
    if [ -f "$run/summary.json" ]; then
      echo "$run is done"
      continue
    fi
    echo "$run"
    "${launcher[@]}" pipeline.train --config "$config" "${shared[@]}" --run_dir "$run" --seed "$seed" --resume auto \
      "${settings[@]/#/--}" "${@:5}"
  done
done
python -m pipeline.report "${runs[@]}" --output "$out/report.html"
