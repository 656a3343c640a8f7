"""The real launchers, as a user calls them, from the project's root."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil

from pipeline.config.cli import to_yaml
from pipeline.config.schema import Config

ROOT = Path(__file__).parents[1]


def environment() -> dict[str, str]:
    """This process's, with the venv's programs first and one thread a rank."""
    return os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def deepspeed(module: str, config: Config, *options: str, port: int | None = None) -> subprocess.Popen[str]:
    """`deepspeed --num_accelerators 2 --module MODULE --config FILE`, started in a process group of its own."""
    file = Path(f"{config.run_dir}.yaml")
    file.write_text(to_yaml(config))
    launcher = ["deepspeed", "--num_accelerators", "2", "--master_port", str(port or free_port()), "--module", module]
    return subprocess.Popen(
        [*launcher, "--config", str(file), *options],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def rank_processes(run_dir: str | Path) -> list[int]:
    """Process ids of the ranks that train into `run_dir`."""
    commands = ((process.pid, process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"]))
    return sorted(
        pid
        for pid, command in commands
        if f"{run_dir}.yaml" in command and any(word.startswith("--local_rank") for word in command)
    )
