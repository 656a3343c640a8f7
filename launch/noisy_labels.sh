#!/usr/bin/env bash
# Does dropping help where labels are wrong? launch/emotion.yaml under several arms, each at several seeds: held-out
# accuracy, and how many of the wrong labels were dropped. Ends with the report of launch/arms.sh.
#   bash launch/noisy_labels.sh OUT_DIR "ARM ..." "SEED ..." [--section.key value ...]
#   bash launch/noisy_labels.sh runs/emotion/arms "none random lai oracle" "0 1 2" --model.name_or_path DIR
# ARM: an estimator, and what else to set, after commas. `random` drops 40 % of every batch, as many as are wrong;
# `loss` the 40 % with the highest loss; `oracle` knows which labels are wrong. Wants the shared data beside the checkout.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
usage='usage: bash launch/noisy_labels.sh OUT_DIR "ARM ..." "SEED ..." [--section.key value ...]'
out=${1:?$usage}
read -ra arms <<<"${2:?$usage}"
seeds=${3:?$usage}
export PATH="$PWD/.venv/bin:$PATH"

[ -f runs/data/emotion_texts/test.jsonl ] ||
  python launch/emotion_texts.py ../shared/data/emotion runs/data/emotion_texts
named=()
for arm in "${arms[@]}"; do
  case "$arm" in
    none*) arm+=,influence.reference=batch ;;
    random* | loss*) arm+=,influence.reference=batch,policy.rule=rate,policy.rate=0.4 ;;
    oracle*) arm+=",influence.reference=batch,influence.oracle_subsets=[!p]*,policy.threshold=0.5" ;;
  esac
  named+=("$arm")
done
bash launch/arms.sh launch/emotion.yaml "$out" "${named[*]}" "$seeds" "${@:4}"
