"""Write a set of labelled texts as jsonl files, `text` and `label` each: DIR/train.jsonl, val.jsonl, test.jsonl.

python launch/labelled_texts.py emotion FOLDER DIR      FOLDER/train.txt, ..., lines `text;label` below a header
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path


def emotion(folder: Path, split: str) -> Iterator[dict[str, str]]:
    for line in (folder / f"{split}.txt").read_text(encoding="utf-8").splitlines()[1:]:
        text, label = line.rsplit(";", 1)
        yield {"text": text, "label": label}


SETS = {"emotion": emotion}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("name", choices=SETS)
parser.add_argument("folder", type=Path)
parser.add_argument("directory", type=Path)
arguments = parser.parse_args()
arguments.directory.mkdir(parents=True, exist_ok=True)
for split in ("train", "val", "test"):
    rows = list(SETS[arguments.name](arguments.folder, split))
    with open(arguments.directory / f"{split}.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    print(f"{split}: {len(rows)} texts")
