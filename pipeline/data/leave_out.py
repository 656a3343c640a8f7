"""The documents that a run leaves out: `data.leave_out`, read and checked."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from pipeline.config.schema_data import DataConfig


def left_out(data: DataConfig, there: Sequence[range]) -> list[int]:
    """The ids in `data.leave_out`, sorted, each once; `there`: those of the training split.

    Raises ValueError where the file cannot be read or an id is none of theirs.
    """
    if data.leave_out is None:
        return []
    ids = _from_file(data.leave_out) if isinstance(data.leave_out, str) else data.leave_out
    if wrong := [number for number in ids if not any(number in part for part in there)]:
        known = ", ".join(f"from {part[0]} to {part[-1]}" for part in there)
        raise ValueError(
            f"data.leave_out: there is no training document {wrong[0]}; ids run {known}, as the ledger "
            "(document_ids) and PREPARED_DIR/documents/ name them"
        )
    return sorted(set(ids))


def _from_file(file: str) -> Iterable[int]:
    try:
        words = re.split(r"[\s,]+", Path(file).read_text().strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"data.leave_out: {file} cannot be read ({error}); give a text file of ids, or a list"
        ) from None
    for word in words:
        if word and not word.isdecimal():
            raise ValueError(f"data.leave_out: {file} holds `{word[:40]}`, which is no document id (0, 1, ...)")
    return [int(word) for word in words if word]
