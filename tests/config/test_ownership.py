"""One owner of a directory at a time: the second is refused and told whose it is; the dead own nothing."""

import json
import os
import signal
import time

import pytest

from pipeline.config import ownership
from pipeline.config.ownership import lock_of, owned, owner_of


def test_a_second_owner_is_refused_and_told_who_the_first_is(tmp_path, other):
    with (
        pytest.raises(ValueError, match=rf"run_dir: .*run is in use by process {other.pid} on .*, which took it at 2"),
        owned(tmp_path / "run", "run_dir"),
    ):
        pass
    os.symlink(tmp_path, tmp_path / "same")
    with pytest.raises(ValueError, match="in use"), owned(tmp_path / "same" / "run", "run_dir"):
        pass
    assert owner_of(tmp_path / "run") is not None
    with owned(tmp_path / "run.1", "run_dir"):
        pass


def test_what_a_killed_owner_left_is_taken_over(tmp_path, other, capsys):
    other.send_signal(signal.SIGKILL)
    other.wait()
    with owned(tmp_path / "run", "run_dir"):
        assert f"was left by process {other.pid}" in capsys.readouterr().out
    assert not lock_of(tmp_path / "run").exists()


def test_a_reused_process_id_owns_nothing(tmp_path, other):
    """Catches a test for the process id alone."""
    lock = lock_of(tmp_path / "run")
    owner = json.loads(lock.read_text())
    lock.write_text(json.dumps(owner | {"ticks": owner["ticks"] - 1}))
    with owned(tmp_path / "run", "run_dir"):
        pass


@pytest.mark.parametrize("field", ["host", "space"])
def test_an_owner_elsewhere_is_alive_as_long_as_it_touches_its_lock(tmp_path, field):
    """Catches process ids of another host, or another container, being looked up here."""
    lock = lock_of(tmp_path / "run")
    with owned(tmp_path / "run", "run_dir"):
        owner = json.loads(lock.read_text())
    lock.write_text(json.dumps(owner | {field: "elsewhere", "pid": os.getpid()}))
    with pytest.raises(ValueError, match="in use"), owned(tmp_path / "run", "run_dir"):
        pass
    long_ago = time.time() - ownership.SILENCE - 5
    os.utime(lock, (long_ago, long_ago))
    with owned(tmp_path / "run", "run_dir"):
        pass


def test_an_owner_may_own_again_and_lets_go_at_the_end_only(tmp_path):
    with owned(tmp_path / "run", "run_dir"):
        with owned(tmp_path / "run", "run_dir"):
            pass
        assert lock_of(tmp_path / "run").exists()
    assert [path.name for path in tmp_path.iterdir()] == []


def test_a_half_written_lock_is_no_owner(tmp_path):
    lock_of(tmp_path / "run").write_text('{"host')
    with owned(tmp_path / "run", "run_dir"):
        pass


def test_an_owner_touches_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(ownership, "BEAT", 0.05)
    with owned(tmp_path / "run", "run_dir"):
        os.utime(lock_of(tmp_path / "run"), (1, 1))
        deadline = time.monotonic() + 10
        while lock_of(tmp_path / "run").stat().st_mtime == 1:
            assert time.monotonic() < deadline
            time.sleep(0.02)
