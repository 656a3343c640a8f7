"""Arms of `launch/pools.sh` beside `random`: bits per byte of the target and of other held-out text, by paired seeds.

python launch/pool_table.py "PubMed Abstracts" OUT_DIR/ARM/seed-N ...
"""

import json
import re
import sys
from pathlib import Path

import pandas as pd

from pipeline.record import ledger

target, *runs = sys.argv[1:]
rows = []
for run in map(Path, runs):
    if not (run / "summary.json").exists():
        print(f"{run} is not done and left out")
        continue
    summary = json.loads((run / "summary.json").read_text())
    subsets = summary["evaluation_after"]["subsets"]
    others = [row for name, row in subsets.items() if name != target]
    tokens = sum(row["tokens"] for row in others)
    kept = ledger.read(run).to_pandas().query("kept")
    rows.append(
        {
            "arm": re.sub(",influence.reference(_model)?=[^,]*", "", run.parent.name),
            "seed": run.name,
            "target": subsets[target]["bits_per_byte"],
            "other": sum(row["bits_per_byte"] * row["tokens"] for row in others) / tokens,
            "kept of target %": 100 * (kept["subset"] == target).mean(),
            "scoring %": 100 * (summary["scoring_fraction"] or 0),
        }
    )
table = pd.DataFrame(rows).set_index(["arm", "seed"])
for metric in ("target", "other"):
    paired = table[metric] - table.loc["random", metric]
    table[f"{metric} - random"] = paired
summed = table.groupby("arm").agg(["mean", "std", "count"])
shown = {name: summed[name]["mean"] for name in table.columns}
shown |= {f"{name}, spread": summed[name]["std"] for name in ("target - random", "other - random")}
print(
    table.round(3).to_string(),
    pd.DataFrame(shown).assign(seeds=summed["target"]["count"]).round(3).to_string(),
    sep="\n\n",
)
