"""What all ranks would say is said by one of them."""

import os
import subprocess
import sys

import pytest

from pipeline.config import once
from tests.launcher import ROOT, environment

SAY = "import sys; from pipeline.config.once import say_once; say_once(sys.argv[1])"


def told_by(*words: str, **settings: str) -> str:
    """Standard error of one rank after another, all started by this process."""
    told = ""
    for rank, each in enumerate(words):
        own = environment() | {"RANK": str(rank)} | settings
        command = [sys.executable, "-c", SAY, each]
        told += subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True).stderr
    return told


def test_the_ranks_of_a_launcher_say_a_thing_once_and_another_thing_too(tmp_path):
    """Catches a rank whose own trouble is lost because another one spoke before."""
    told = told_by("no file", "no file", "other", "no file", WORLD_SIZE="3", TMPDIR=str(tmp_path))
    assert told == "no file\nother\n"


def test_a_process_of_its_own_always_speaks(tmp_path):
    """A shell starts the same command again."""
    assert told_by("no file", "no file", TMPDIR=str(tmp_path)) == "no file\nno file\n"
    assert told_by("no file", "no file", WORLD_SIZE="1", TMPDIR=str(tmp_path)) == "no file\nno file\n"
    assert told_by("no file", "no file", WORLD_SIZE="2", RANK="1", TMPDIR=str(tmp_path)) == "no file\nno file\n"


def test_an_old_mark_silences_nobody(tmp_path):
    settings = {"WORLD_SIZE": "2", "TMPDIR": str(tmp_path)}
    assert told_by("no file", "no file", **settings) == "no file\n"
    [mark] = tmp_path.iterdir()
    os.utime(mark, (1, 1))
    assert told_by("no file", RANK="1", **settings) == "no file\n"


def test_where_no_mark_can_be_left_everybody_speaks(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(once.tempfile, "gettempdir", lambda: str(tmp_path / "nowhere"))
    once.say_once("no file")
    once.say_once("no file")
    assert capsys.readouterr().err == "no file\nno file\n"


@pytest.mark.slow
def test_a_wrong_key_under_the_launcher_is_named_once():
    launcher = ["deepspeed", "--num_accelerators", "2", "--master_port", "29777", "--module", "pipeline.train"]
    ended = subprocess.run(
        [*launcher, "--config", "launch/quickstart.yaml", "--influence.estimater", "lai"],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ended.returncode != 0
    assert (ended.stdout + ended.stderr).count("error: unrecognized arguments: --influence.estimater") == 1
