"""What the shell scripts hand over, and the check of a machine."""

import json
import os
import shutil
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from tests.launcher import ROOT, environment


def ranks_environment(tmp_path: Path, **settings: str) -> list[str]:
    """What launch/mpi.sh tells mpirun to hand over: its `exec` only prints."""
    (tmp_path / "printing").write_text("exec() { printf '%s\\n' \"$@\"; }")
    bare = {"PATH": os.environ["PATH"], "BASH_ENV": str(tmp_path / "printing")}
    script = ["bash", str(ROOT / "launch" / "mpi.sh"), "a:1,b:1", "run.yaml", "--max_steps", "2"]
    words = subprocess.run(script, env=bare | settings, capture_output=True, text=True, check=True).stdout.split()
    assert words[-5:] == ["pipeline.train", "--config", "run.yaml", "--max_steps", "2"]
    return sorted(name for option, name in pairwise(words) if option == "-x")


def test_mpi_leaves_nccl_alone_unless_told_and_hands_over_what_is_set(tmp_path):
    """Catches an interface that NCCL would not have chosen, and settings of the first host that stay there."""
    always = ["DEEPSPEED_TIMEOUT", "OMP_NUM_THREADS", "PATH"]
    if Path("/sys/class/net/eth0").exists():
        always.insert(1, "GLOO_SOCKET_IFNAME")
    assert ranks_environment(tmp_path) == always
    told = {"NCCL_IB_HCA": "mlx5", "HF_HOME": "/models", "LD_LIBRARY_PATH": "/cuda", "NCCLX": "", "OTHER": "1"}
    assert ranks_environment(tmp_path, **told) == sorted([*always, "NCCL_IB_HCA", "HF_HOME", "LD_LIBRARY_PATH"])


@pytest.mark.parametrize("name", ["mpi.sh", "slurm.sh", "deepspeed_env.example"])
def test_no_file_sets_anything_of_nccl(name):
    lines = (ROOT / "launch" / name).read_text().splitlines()
    assert not [line for line in lines if "NCCL_" in line.split("#")[0] and "grep" not in line]


@pytest.mark.slow
def test_the_check_of_a_machine_passes_in_its_small_form():
    """Catches stages that end at their first line, as they did where nobody had run them."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "launch" / "gpu_check.py"), "--cpu"],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=570)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    report = json.loads((ROOT / "runs" / "gpu_check" / "check.json").read_text())
    assert process.returncode == 0, output
    assert [stage["stage"] for stage in report["stages"]] == ["device", "decisions", "benchmark", "soak", "resume"]
    assert {"torch", "deepspeed"} <= report["versions"].keys()


@pytest.mark.slow
def test_the_check_installs_offline_beside_what_python_has(tmp_path):
    """Catches an install that asks an index, or for another torch than python3's: DIR is empty here."""
    project, wheels = tmp_path / "project", tmp_path / "wheels"
    shutil.copytree(ROOT, project, ignore=shutil.ignore_patterns(".*", "runs", "*.egg-info"))
    wheels.mkdir()
    command = ["bash", "launch/gpu_check.sh", "--offline", str(wheels)]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    bare = {"PATH": path, "HOME": str(tmp_path), "PIP_INDEX_URL": "http://127.0.0.1:1/", "PIP_RETRIES": "0"}
    done = subprocess.run([*command, "--cpu", "nosuch"], cwd=project, env=bare, capture_output=True, text=True)
    assert "no stage is called nosuch; there are device, decisions" in done.stderr
    where = "import pipeline, torch; print(pipeline.__file__, torch.__file__)"
    found = subprocess.run([".venv/bin/python", "-c", where], cwd=project, capture_output=True, text=True, check=True)
    assert found.stdout.split() == [str(project / "pipeline" / "__init__.py"), torch.__file__]


@pytest.mark.slow
def test_a_stage_that_fails_or_hangs_is_told_and_stops_no_other(tmp_path):
    sys.path.insert(0, str(ROOT / "launch"))
    try:
        from gpu_check import Stage, finished
    finally:
        sys.path.pop(0)
    assert finished(Stage("fine", 20, "true"), tmp_path / "log") == ""
    assert finished(Stage("fails", 20, "false"), tmp_path / "log") == "exit code 1"
    assert finished(Stage("hangs", 1, "sleep 60"), tmp_path / "log") == "no end after 1 s"
    missing = finished(Stage("wrong", 20, "true", (tmp_path / "no").read_text), tmp_path / "log")
    assert missing.startswith("FileNotFoundError: ")
