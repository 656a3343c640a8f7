"""A prepared dataset appears whole, in place of what was there before, or not at all."""

import glob
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.config.differences import changes

SHARDS = "shards"
"""Of a fingerprint: how many parts the dataset was put together from. It is no difference: the rows are of the same
files."""


def made_of(directory: Path) -> dict[str, Any]:
    """The fingerprint in `directory`, less `SHARDS`."""
    found = json.loads((directory / "fingerprint.json").read_text())
    return {key: value for key, value in found.items() if key != SHARDS}


def refuse_other_things(target: Path) -> None:
    """Raises ValueError where `target` is something and no prepared dataset."""
    empty = target.is_dir() and not any(target.iterdir())
    if target.exists() and not empty and not (target / "fingerprint.json").exists():
        raise ValueError(
            f"data.prepared_dir: {target} exists and is no prepared dataset; remove it or choose another directory"
        )


def is_made_of(target: Path, new: dict[str, Any]) -> bool:
    """Whether `target` was prepared from the inputs of fingerprint `new`; says so. Raises ValueError where it was
    prepared from others and holds what would be lost with it."""
    if not (target / "fingerprint.json").exists():
        return False
    differences = changes(made_of(target), new)
    if not differences:
        print(f"{target} is already prepared from the same inputs")
        return True
    if strangers := _strangers(target):
        raise ValueError(
            f"data.prepared_dir: {target} was prepared from something else, and replacing it would delete "
            f"{', '.join(strangers[:5])}, which is not part of a prepared dataset. Move that away, or choose "
            f"another directory. What differs:\n{differences}"
        )
    print(f"{target} was prepared from something else and will be replaced:\n{differences}")
    return False


@contextmanager
def replaced(target: Path) -> Iterator[Path]:
    """A directory to fill, which takes the place of `target` at the end, by a rename. Where something is raised inside,
    it is removed, and nothing has happened; what killed processes left is removed."""
    # The host is part of the name: on a shared file system, another node's process ids say nothing here.
    prefix = f"{target.name}.tmp-{socket.gethostname()}-"
    for stale in target.parent.glob(f"{glob.escape(prefix)}*"):
        if not _others_alive(stale.name.removeprefix(prefix).split(".")[0]):
            shutil.rmtree(stale)
    temporary = target.with_name(f"{prefix}{os.getpid()}")
    before = temporary.with_name(f"{temporary.name}.replaced")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if target.exists():
            target.rename(before)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(before, ignore_errors=True)


def _strangers(directory: Path) -> list[str]:
    """What lies in a prepared dataset and is not of it."""
    ours = re.compile(
        r"(train|eval|reference)(/\d+)?(/([\w-]+\.arrow|state\.json|dataset_info\.json))?"
        r"|documents(/\w+\.parquet(/\d+\.parquet)?)?"
        r"|tokenizer(/[^/]+\.(json|model|txt|jinja))?|(fingerprint|report|files)\.json"
    )
    names = (path.relative_to(directory).as_posix() for path in sorted(directory.rglob("*")))
    return [name for name in names if not ours.fullmatch(name)]


def _others_alive(pid: str) -> bool:
    """Whether another process with this id runs on this host."""
    if not pid.isdigit() or int(pid) == os.getpid():  # our own id: a container's processes get the same ones again
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
