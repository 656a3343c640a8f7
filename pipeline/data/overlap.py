"""The same text in training and in what is held out: by file refused, by document counted."""

from typing import Any

from pipeline.config.schema_data import BUILTIN, DataConfig
from pipeline.data.corpus import resolve, same_source
from pipeline.data.held_out import digest


def refuse_shared_files(data: DataConfig) -> None:
    """Raises ValueError where two of the splits, or two sources of a mixture, read one file, by whatever name (links,
    globs), or one hub corpus. Says so where one reads it twice."""
    seen: dict[object, tuple[str, str]] = {}
    for key in (*data.train_sources, "eval_files", "reference_files"):
        for source in resolve(data.raw_files[key] or BUILTIN):
            if source == BUILTIN and key not in data.train_sources:  # holds out its own part
                continue
            identity = same_source(source)
            other, name = seen.setdefault(identity, (key, source))
            if other != key and not data.allow_overlap:
                names = source if source == name else f"{source}, which is {name},"
                if key in data.train_sources:
                    raise ValueError(
                        f"data.{key}: {names} is among data.{other} too, so it would be read as both. Leave it out of "
                        "one of them; where it is meant, set data.allow_overlap to true"
                    )
                raise ValueError(
                    f"data.{key}: {names} is among data.{other} too, so what is held out would be trained on, or "
                    "judged by itself. Leave it out of one of them; where it is meant, set data.allow_overlap to true"
                )
            if other == key and (other, name) != (key, source):
                print(f"data.{key}: {source} and {name} are one file, which is read twice", flush=True)


class Texts:
    """Which documents of the held-out splits are in another split too, by the hash of their text.

    Held-out splits are seen before `train`, and kept: 100 bytes or so a document.
    """

    def __init__(self) -> None:
        self._held: dict[str, set[bytes]] = {}
        self._found: dict[tuple[str, str], set[bytes]] = {}

    def see(self, split: str, text: str) -> None:
        if split == "train" and not self._held:
            return
        found = digest(text)
        for other, digests in self._held.items():
            if other != split and found in digests:
                self._found.setdefault((other, split), set()).add(found)
        if split != "train":
            self._held.setdefault(split, set()).add(found)

    def add_to(self, report: dict[str, Any]) -> None:
        """Each held-out part of a report gets `overlap`: how many of its texts are in each split seen after it."""
        splits = list(report)
        for split in self._held:
            others = [other for other in splits if other == "train" or splits.index(other) > splits.index(split)]
            counts = {other: len(self._found.get((split, other), ())) for other in others if other != split}
            report[split]["overlap"] = counts


def in_words(report: dict[str, Any]) -> list[str]:
    """A line for every overlap in a report of `pipeline.prepare`."""
    return [
        f"{split:5} in common with {other}: {count:,} of {part['documents']:,} documents have the same text as one of "
        f"data.{other}_files; remove them from one of the two, or held-out figures flatter"
        for split, part in report.items()
        for other, count in part.get("overlap", {}).items()
        if count
    ]
