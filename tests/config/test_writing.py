import errno
from pathlib import Path

import pytest

from pipeline.config import writing
from pipeline.config.cli import exit_on_refused_file
from pipeline.config.writing import not_written


def test_only_a_full_disk_is_called_full(tmp_path, monkeypatch):
    """Catches "make room" for a file that belongs to somebody else."""
    full = not_written(tmp_path / "x" / "y", OSError(errno.ENOSPC, "No space left on device"), "It is whole")
    assert "the disk is full" in str(full)
    assert str(full).endswith("make room. It is whole; go on with --resume auto")
    denied = not_written(tmp_path, PermissionError(errno.EACCES, "Permission denied"), "")
    assert "this user may not write there" in str(denied)
    assert "There is no checkpoint yet: start anew" in str(denied)
    torchs = RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
    assert "disk is full" not in str(not_written(tmp_path, torchs, ""))
    monkeypatch.setattr(writing, "_LITTLE", 1 << 62)
    assert "the disk is full" in str(not_written(tmp_path, torchs, ""))


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "runs/x"), 2, "'runs/x': Permission denied; this user may"),
        (OSError(errno.EROFS, "Read-only file system", "runs/x"), 2, "mounted for reading only"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/x"), 2, "make room"),
        (not_written(Path("/"), OSError(errno.ENOSPC, "No space left"), ""), 1, "/ could not be written"),
    ],
)
def test_what_the_system_refuses_a_user_is_one_sentence(capsys, error, code, message):
    with pytest.raises(SystemExit) as stopped, exit_on_refused_file("pipeline.train"):
        raise error
    assert stopped.value.code == code
    assert message in capsys.readouterr().err


def test_other_errors_keep_their_trace(tmp_path):
    with pytest.raises(FileNotFoundError), exit_on_refused_file("pipeline.train"):
        (tmp_path / "none").read_text()
    with pytest.raises(OSError, match="something else"), exit_on_refused_file("pipeline.train"):
        raise OSError("something else")
