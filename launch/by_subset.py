"""Write each subset of Pile-like documents into a file of its own, DIR/SUBSET.jsonl, to be a target or held out.

python launch/by_subset.py DIR FILE.jsonl.zst ... [--only "PubMed Abstracts" Github]
"""

import argparse
import json
from pathlib import Path

import datasets

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("directory", type=Path)
parser.add_argument("files", nargs="+")
parser.add_argument("--only", nargs="+")
arguments = parser.parse_args()
arguments.directory.mkdir(parents=True, exist_ok=True)
rows = datasets.load_dataset("json", data_files=arguments.files, split="train")
subsets = [row["pile_set_name"] for row in rows["meta"]]
for subset in sorted(set(arguments.only or subsets)):
    chosen = [index for index, name in enumerate(subsets) if name == subset]
    with open(arguments.directory / f"{subset}.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows.select(chosen))
    print(f"{subset}: {len(chosen)} documents")
