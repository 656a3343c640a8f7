#!/usr/bin/env bash
# Does choosing pay? Candidate pools under several arms, each at several seeds: arms of one seed read the same sequences
# in the same order and differ in what they keep. Ends with a table of each arm beside `random`. See launch/arms.sh.
#   bash launch/pools.sh "TARGET SUBSET" OUT_DIR "ARM ..." "SEED ..." [--section.key value ...]
#   bash launch/pools.sh "PubMed Abstracts" runs/pools/pubmed "random lai rho lookahead" "0 1 2" --policy.pool 4
#   bash launch/pools.sh all runs/junk/40 "random oracle lai lookahead" "0 1 2" --data.planted_noise 0.4 --policy.pool 2
# ARM: an estimator, and what else to set, after commas. Estimators that compare do so with TARGET's documents among the
# third training file, with all of these for the target `all`; `rho` with the base model trained on them for 60 steps;
# `oracle` knows the subsets, and for `all` which were planted. Runs that are done are left alone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
usage='usage: bash launch/pools.sh "TARGET SUBSET" OUT_DIR "ARM ..." "SEED ..." [--section.key value ...]'
target=${1:?$usage}
out=${2:?$usage}
read -ra arms <<<"${3:?$usage}"
read -ra seeds <<<"${4:?$usage}"
export PATH="$PWD/.venv/bin:$PATH"
config=launch/pool_pile.yaml
pile=../shared/data/pile
subsets=runs/data/subsets

if [ "$target" = all ]; then
  reference=$pile/train/02.jsonl.zst good='[!p]*' # all but planted/KIND
  set -- "${@:1:4}" --data.eval_files $pile/val.jsonl.zst --data.max_eval_sequences 512 "${@:5}"
else
  reference=$subsets/train/$target.jsonl good=${target// /?}
fi
[ -d $subsets/train ] || python launch/by_subset.py $subsets/train $pile/train/02.jsonl.zst
[ -d $subsets/val ] || python launch/by_subset.py $subsets/val $pile/val.jsonl.zst
if [[ "${arms[*]}" == *rho* ]] && [ ! -f "$out/reference/summary.json" ]; then
  python -m pipeline.train --config $config --run_dir "$out/reference" --data.prepared_dir "$out/reference_data" \
    --data.train_files "$reference" --data.reference_files null --data.max_sequences null \
    --influence.estimator none --influence.reference batch --policy.rule threshold --policy.pool null --max_steps 60
fi
named=()
for arm in "${arms[@]}"; do
  case "$arm" in
    random* | loss*) arm+=,influence.reference=batch ;;
    oracle*) arm+=",influence.reference=batch,influence.oracle_subsets=$good" ;;
    rho*) arm+=,influence.reference=batch,influence.reference_model=$out/reference/model ;;
  esac
  named+=("$arm")
done
bash launch/arms.sh $config "$out" "${named[*]}" "${seeds[*]}" \
  --data.reference_files "$reference" "${@:5}"
python launch/arms_table.py "$target" random "$out"/*/seed-*
