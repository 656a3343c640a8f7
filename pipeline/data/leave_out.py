"""The documents that a run leaves out: `data.leave_out`, read and checked."""

import re
from collections.abc import Iterable
from pathlib import Path

from pipeline.config.schema import DataConfig


def left_out(data: DataConfig, documents: int) -> list[int]:
    """The ids in `data.leave_out`, sorted, each once; `documents`: how many the training split has.

    Raises ValueError where the file cannot be read or an id is none of theirs.
    """
    if data.leave_out is None:
        return []
    ids = _from_file(data.leave_out) if isinstance(data.leave_out, str) else data.leave_out
    if wrong := [number for number in ids if not 0 <= number < documents]:
        raise ValueError(
            f"data.leave_out: there is no training document {wrong[0]}; ids run from 0 to {documents - 1}, as the "
            "ledger (document_ids) and PREPARED_DIR/documents/ name them"
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
