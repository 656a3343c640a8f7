"""RUN_DIR/mixture.jsonl: the weights of a mixture's sources from every step on, and the influence that moved them."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.data.mixture import Piece

NAME = "mixture.jsonl"


class MixtureLog:
    """A line for every step, by one process, rank 0: `step` after which the weights hold, `piece` of the order, and of
    each source `weight` and `influence` (its average, null before its first unit)."""

    def __init__(self, run_dir: Path, step: int) -> None:
        """Go on after `step`: lines of later steps belong to a future that did not happen; discard them."""
        self._path = run_dir / NAME
        kept = [line for line in _lines(run_dir) if line["step"] < step]
        new = self._path.with_name(f"{NAME}.new")
        new.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(new, self._path)
        self._file = open(self._path, "a")  # noqa: SIM115 (closed at the end of the run)

    def append(self, step: int, piece: Piece, sources: dict[str, dict[str, float | None]]) -> None:
        self._file.write(json.dumps({"step": step, "piece": asdict(piece), "sources": sources}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def pieces_of(run_dir: Path) -> list[Piece] | None:
    """Of the order of a run whose weights move; None of any other."""
    return [Piece(**line["piece"]) for line in _lines(run_dir)] or None


def _lines(run_dir: Path) -> list[dict[str, Any]]:
    """All that are whole: a kill may have cut the last one."""
    path = run_dir / NAME
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}}}")]
