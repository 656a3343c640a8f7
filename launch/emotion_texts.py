"""Write the Emotion set as jsonl files of `text` and `label`: DIR/train.jsonl, val.jsonl, test.jsonl.

python launch/emotion_texts.py FOLDER DIR      FOLDER/train.txt, val.txt, test.txt: lines `text;label` below a header
"""

import argparse
import json
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", type=Path)
parser.add_argument("directory", type=Path)
arguments = parser.parse_args()
arguments.directory.mkdir(parents=True, exist_ok=True)
for split in ("train", "val", "test"):
    lines = (arguments.folder / f"{split}.txt").read_text(encoding="utf-8").splitlines()[1:]
    rows = [dict(zip(("text", "label"), line.rsplit(";", 1), strict=True)) for line in lines]
    with open(arguments.directory / f"{split}.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    print(f"{split}: {len(rows)} texts")
