#!/usr/bin/env bash
# From nothing to a model whose training data was judged while it trained, on all local accelerators or on 2 CPU ranks:
# install, pre-train a small GPT-Neo plainly, continue from it with layer-aware influence under ZeRO-3.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/setup.sh

ranks=()
if ! python -c 'import sys, torch; sys.exit(not torch.accelerator.is_available())'; then
  ranks=(--num_accelerators 2)
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + 1) / 2))}
fi
train() { deepspeed "${ranks[@]}" --module pipeline.train --config "$1"; }

if [ ! -f runs/quickstart_pretrained/summary.json ]; then
  python -m pipeline.prepare --config launch/quickstart_pretrain.yaml
  train launch/quickstart_pretrain.yaml
fi
python -m pipeline.prepare --config launch/quickstart.yaml
train launch/quickstart.yaml
