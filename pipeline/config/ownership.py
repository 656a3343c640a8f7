"""One owner at a time for every directory that is written: a lock file beside it says which process that is.

A lock whose process is gone, or whose id another process has by now, is taken over. Of a process elsewhere nobody can
see that, so every owner touches its lock again and again; one that was not touched for `SILENCE` seconds is taken over.
"""

import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BEAT = 15.0
SILENCE = 120.0

_held: dict[Path, int] = {}
"""Locks of this process, and how often it took them."""


def lock_of(directory: str | Path) -> Path:
    """The lock file of a directory: beside it, hidden, the same for every way to write its path."""
    path = Path(directory).resolve()
    return path.with_name(f".{path.name}.lock")


@contextmanager
def owned(directory: str | Path, key: str) -> Iterator[None]:
    """Inside, no other process can own `directory`, which the config's `key` names. Raises ValueError, naming the
    owner, where another one does, and where no lock can be written."""
    lock = lock_of(directory)
    if _held.get(lock):  # this process has it: a dry run trains, a training prepares
        _held[lock] += 1
        try:
            yield
        finally:
            _held[lock] -= 1
        return
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        _take(lock, directory, key)
    except OSError as error:
        raise ValueError(f"{key}: {directory} cannot be written ({error}); choose another directory") from error
    _held[lock] = 1
    done = threading.Event()
    threading.Thread(target=_beat, args=(lock, done), daemon=True).start()
    try:
        yield
    finally:
        done.set()
        del _held[lock]
        _release(lock)


def owner_of(directory: str | Path) -> str | None:
    """The living owner of a directory, in words; None where there is none, or it is this process."""
    lock = lock_of(directory)
    try:
        owner = json.loads(lock.read_text())
        silent = _now(lock) - lock.stat().st_mtime
    except (OSError, ValueError):
        return None
    return None if _ours(owner) or not _alive(owner, silent) else _words(owner)


def _take(lock: Path, directory: str | Path, key: str) -> None:
    while True:
        with open(os.open(lock, os.O_RDWR | os.O_CREAT, 0o664), "r+") as file:
            # Between reading the old owner and writing the new one, nobody else may; nobody holds this for long.
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                    raise
            try:
                if os.fstat(file.fileno()).st_ino != lock.stat().st_ino:
                    continue  # it was released, and made anew, meanwhile
            except FileNotFoundError:
                continue
            text = file.read()
            try:
                owner = json.loads(text) if text else None
            except ValueError:
                owner = None  # its writer was killed while it wrote
            silent = _now(lock) - os.fstat(file.fileno()).st_mtime
            if owner and not _ours(owner):
                if _alive(owner, silent):
                    raise ValueError(
                        f"{key}: {directory} is in use by {_words(owner)}. Wait until it is done, stop it, or choose "
                        f"another directory (its lock is {lock})"
                    )
                print(f"{key}: {directory} was left by {_words(owner)} and is gone; going on", flush=True)
            file.seek(0)
            file.truncate()
            json.dump(_self(), file)
            return


def _release(lock: Path) -> None:
    try:
        if _ours(json.loads(lock.read_text())):
            lock.unlink()
    except (OSError, ValueError):  # moved or removed with its directory
        return


def _beat(lock: Path, done: threading.Event) -> None:
    while not done.wait(BEAT):
        try:
            os.utime(lock)
        except OSError:
            return


def _self() -> dict[str, Any]:
    ticks = _ticks(os.getpid())
    return {"host": socket.gethostname(), "space": _space(), "pid": os.getpid(), "ticks": ticks, "since": time.time()}


def _ours(owner: dict[str, Any]) -> bool:
    return {**owner, "since": 0} == {**_self(), "since": 0}


def _alive(owner: dict[str, Any], silent: float) -> bool:
    if (owner.get("host"), owner.get("space")) != (socket.gethostname(), _space()):
        return silent < SILENCE
    ticks = _ticks(owner.get("pid", -1))
    return ticks is not None and ticks == owner.get("ticks")


def _space() -> str:
    """Where process ids mean the same: one boot of one machine, in one container."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _ticks(pid: int) -> int | None:
    """When a process of this host started, in clock ticks since the boot; None where it does not run."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])  # Z: dead, and nobody has asked how it ended


def _words(owner: dict[str, Any]) -> str:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner.get("since") or 0))
    return f"process {owner.get('pid')} on {owner.get('host')}, which took it at {when}"


def _now(lock: Path) -> float:
    """The time by the clock of the lock's file system, which may be another machine's."""
    probe = lock.with_name(f"{lock.name}.{socket.gethostname()}-{os.getpid()}")
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        probe.unlink(missing_ok=True)
