"""What every rank of a host would say, said by the first of them."""

import os
import sys
import tempfile
import time
import zlib
from pathlib import Path

from pipeline.config.launcher import rank_among_several

_FRESH = 60.0
"""Seconds for which a launcher's ranks say a thing once. Process ids come again."""


def say_once(what: str) -> None:
    """On standard error. Of the ranks that one launcher started on this host the first leaves a mark for the others, by
    its process id and the words; where it cannot be left, each of them speaks."""
    rank = rank_among_several()
    if rank and _said(f"{os.getppid()}-{zlib.crc32(what.encode()):08x}", rank):
        return
    print(what, file=sys.stderr, flush=True)


def _said(name: str, rank: str) -> bool:
    """Whether another rank was here first. The same one speaks again: somebody may start it by hand twice."""
    mark = Path(tempfile.gettempdir(), f"lai-{os.getuid()}-{name}")
    try:
        if mark.exists() and time.time() - mark.stat().st_mtime > _FRESH:
            mark.unlink()
        with open(mark, "x") as file:
            file.write(rank)
    except FileExistsError:
        return mark.read_text() != rank
    except OSError:
        return False
    return False
