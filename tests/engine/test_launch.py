"""What is said before ranks meet."""

import os
import subprocess
import sys
from pathlib import Path
from threading import Timer

import pytest

from pipeline.engine.launch import locks_of_builds
from tests.launcher import ROOT, environment


@pytest.mark.parametrize("place", ["op", "py311_cpu/op"])
def test_the_lock_of_a_killed_build_is_found_where_torch_puts_it(tmp_path, monkeypatch, place):
    """In a directory of its own, or below one for the version of Python and the device."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert locks_of_builds() == []
    (tmp_path / place).mkdir(parents=True)
    (tmp_path / place / "op.so").touch()
    assert locks_of_builds() == []
    lock = tmp_path / place / "lock"
    lock.touch()
    assert locks_of_builds() == []  # somebody loads it
    os.utime(lock, (1, 1))
    assert locks_of_builds() == [tmp_path / place / "lock"]


def test_a_run_that_will_wait_for_a_lock_says_so_before(tmp_path):
    """DeepSpeed's own op: without the words the process hangs in silence."""
    lock = Path(tmp_path, "deepspeed_shm_comm", "lock")
    lock.parent.mkdir()
    lock.touch()
    os.utime(lock, (1, 1))
    code = "from pipeline.engine import launch; launch.join_process_group()"
    settings = environment() | {"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=settings, stderr=subprocess.PIPE, text=True)
    limit = Timer(60, process.kill)
    limit.start()
    said = next((line for line in process.stderr or [] if str(lock) in line), None)
    assert said is not None
    assert process.poll() is None  # it waits
    process.kill()
    process.communicate()
    limit.cancel()
