"""Arms of `launch/pools.sh` and `launch/mixtures.sh` beside one of them: bits per byte of the target and of other
held-out text, by paired seeds, and what a step took. Arms of other lengths (`lookahead,max_steps=16`) stand beside the
same one.

The target `all` is all held-out text; beside it stands what of the kept was not planted.

python launch/arms_table.py TARGET BASE_ARM OUT_DIR/ARM/seed-N ...
python launch/arms_table.py "PubMed Abstracts" random runs/pools/pubmed/*/seed-*
"""

import json
import math
import re
import statistics
import sys
from pathlib import Path

import pandas as pd
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.record import ledger

target, base, *runs = sys.argv[1:]
unsaid = r",(influence\.(reference|reference_model|oracle_subsets|passes)|policy\.rule|max_steps)=[^,]*"
rows = []
for run in map(Path, runs):
    if not (run / "summary.json").exists():
        print(f"{run} is not done and left out")
        continue
    summary = json.loads((run / "summary.json").read_text())
    figures = summary["evaluation_after"]
    # Other than everything there is nothing: the column is empty.
    others = [row for name, row in figures["subsets"].items() if target not in ("all", name)]
    tokens = sum(row["tokens"] for row in others) or math.nan
    kept = ledger.read(run).to_pandas().query("kept")["subset"]
    wanted = ~kept.str.startswith("planted/") if target == "all" else kept == target
    board = EventAccumulator(str(run / "tensorboard"), {"scalars": 0}).Reload()
    rows.append(
        {
            # runs/mixtures/uniform.yaml is `uniform`.
            "arm": re.sub(r"none,config=.*?(\w+)\.yaml", r"\1", re.sub(unsaid, "", run.parent.name)),
            "steps": summary["steps"],
            "seed": run.name,
            "target": (figures if target == "all" else figures["subsets"])[target]["bits_per_byte"],
            "other": sum(row["bits_per_byte"] * row["tokens"] for row in others) / tokens,
            "kept of target %": 100 * wanted.mean(),
            "seconds a step": statistics.median(event.value for event in board.Scalars("time/step")),
        }
    )
table = pd.DataFrame(rows).set_index(["arm", "steps", "seed"])
longest = table.loc[base].sort_index(level="steps", ascending=False).droplevel("steps")
paired = longest[~longest.index.duplicated()]
for metric in ("target", "other"):
    table[f"{metric} - {base}"] = table[metric] - paired[metric].reindex(table.index, level="seed")
summed = table.groupby(["arm", "steps"]).agg(["mean", "std", "count"])
shown = {name: summed[name]["mean"] for name in table.columns}
shown |= {f"{name}, spread": summed[name]["std"] for name in (f"target - {base}", f"other - {base}")}
print(
    table.round(3).to_string(),
    pd.DataFrame(shown).assign(seeds=summed["target"]["count"]).round(3).to_string(),
    sep="\n\n",
)
