"""What is said where something of a run cannot be written."""

import errno
import shutil
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)

_LITTLE = 1 << 20
"""Bytes that are free on a disk that is full: less than a block that somebody wanted to write."""


class NotWritten(OSError):
    """A file or directory of a run could not be written; the message says which, why and what to do."""


def not_written(path: Path, error: Exception, newest: str) -> NotWritten:
    """What to raise where `path` could not be written; `newest`: what a resume goes on from, "" where there is nothing.

    Only a disk that is full is called so. torch's archives say of none of their errors what it was.
    """
    number, place = getattr(error, "errno", None), path
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if number in FULL or (number is None and free < _LITTLE):
        why = f"the disk is full, {free / 1e6:.0f} MB are free there; make room"
    elif number in (errno.EACCES, errno.EPERM, errno.EROFS):
        why = "this user may not write there; change its owner or its mode, or the mount"
    else:
        why = "mend that"
    go_on = f"{newest}; go on with --resume auto" if newest else "There is no checkpoint yet: start anew after that"
    return NotWritten(f"{path} could not be written ({error}): {why}. {go_on}")
