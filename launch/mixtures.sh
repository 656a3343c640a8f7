#!/usr/bin/env bash
# Does moving the weights of sources pay? launch/mixture_pile.yaml under several arms, each at several seeds. Ends with a
# table of each arm beside `natural`. See launch/arms.sh.
#   bash launch/mixtures.sh "TARGET SUBSET" OUT_DIR "ARM ..." "SEED ..." [--section.key value ...]
#   bash launch/mixtures.sh "PubMed Abstracts" runs/mixtures/pubmed "natural uniform static loss lai lookahead,influence.passes=score_first" "0 1 2"
# ARM: `natural`, every source by its tokens; `uniform`, all alike; `static`, half of all for TARGET, the others alike;
# or an estimator, whose influence on TARGET's documents among the third training file moves natural weights. Runs that
# are done are left alone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
usage='usage: bash launch/mixtures.sh "TARGET SUBSET" OUT_DIR "ARM ..." "SEED ..." [--section.key value ...]'
target=${1:?$usage}
out=${2:?$usage}
read -ra arms <<<"${3:?$usage}"
read -ra seeds <<<"${4:?$usage}"
export PATH="$PWD/.venv/bin:$PATH"
config=launch/mixture_pile.yaml
pile=../shared/data/pile
subsets=runs/data/subsets

[ -f "$subsets/sources/$target.jsonl" ] || python launch/by_subset.py $subsets/sources $pile/train/01.jsonl.zst
[ -f "$subsets/train/$target.jsonl" ] || python launch/by_subset.py $subsets/train $pile/train/02.jsonl.zst
[ -f "$subsets/val/$target.jsonl" ] || python launch/by_subset.py $subsets/val $pile/val.jsonl.zst
mkdir -p "$out"
# Only what differs, since it is read after $config and what each run sets.
sed -n -e '1i data:\n  mixture:' -e 's/\.jsonl}$/.jsonl, weight: 1}/p' $config >"$out/uniform.yaml"
sed "/^    $target:/s/weight: 1}/weight: 8}/" "$out/uniform.yaml" >"$out/static.yaml"
still=influence.reference=batch,policy.rule=threshold
named=()
for arm in "${arms[@]}"; do
  case "$arm" in
    natural) arm=none,$still ;;
    uniform | static) arm=none,config=$out/$arm.yaml,$still ;;
    loss*) arm+=,influence.reference=batch ;;
  esac
  named+=("$arm")
done
bash launch/arms.sh $config "$out" "${named[*]}" "${seeds[*]}" \
  --data.reference_files "$subsets/train/$target.jsonl" "${@:5}"
python launch/arms_table.py "$target" none "$out"/*/seed-*
