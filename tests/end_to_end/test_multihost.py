"""The main job on two hosts: started over ssh in both ways, and what happens when one of them is lost."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pipeline.config.cli import to_yaml
from pipeline.config.schema import Config
from pipeline.record import ledger
from tests.end_to_end.test_launch import finish, job, wait_for_step
from tests.hosts import INTERFACE, Hosts, hosts, missing
from tests.launcher import ROOT, deepspeed, environment, rank_processes
from tests.runs import largest_difference, weights

pytestmark = pytest.mark.multihost

STEPS = 40
TIMEOUT_MINUTES = 1


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    if reason := missing():
        pytest.skip(reason)
    with hosts(tmp_path_factory.mktemp("hosts"), 2) as made:
        lines = [
            f"PATH={Path(sys.executable).parent}:$PATH",
            f"GLOO_SOCKET_IFNAME={INTERFACE}",
            "OMP_NUM_THREADS=1",
            f"DEEPSPEED_TIMEOUT={TIMEOUT_MINUTES}",
            # Built by now: in the default place two hosts of one machine would wait for each other's lock, or for that
            # of a build that was killed.
            f"TORCH_EXTENSIONS_DIR={environment().get('TORCH_EXTENSIONS_DIR', '')}",
        ]
        (made.directory / ".deepspeed_env").write_text("\n".join(lines))
        yield made


@pytest.fixture(scope="module")
def unbroken(corpus, tiny_model, tmp_path_factory) -> Config:
    """The job on one host with two ranks, finished."""
    config = job(
        corpus, tmp_path_factory.mktemp("unbroken"), tiny_model("gpt_neo_with_dropout"), "run", max_steps=STEPS
    )
    finish(deepspeed("pipeline.train", config, port=29650))
    return config


def start(pair: Hosts, command: list[str], settings: dict[str, str]) -> subprocess.Popen[str]:
    """A launcher on the first host, in a process group of its own."""
    return subprocess.Popen(
        pair.on(0, *command),
        cwd=pair.directory,
        env=environment() | {"PYTHONPATH": str(ROOT)} | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def over_pdsh(pair: Hosts, config: Config, *options: str) -> subprocess.Popen[str]:
    """The job, where `.deepspeed_env` lies."""
    file = Path(f"{config.run_dir}.yaml")
    file.write_text(to_yaml(config))
    # The launcher tries the hosts with an ssh of its own, which cannot be told of another ssh config.
    launcher = ["deepspeed", "--hostfile", str(pair.hostfile), "--master_addr", pair.address(0), "--no_ssh_check"]
    command = [*launcher, "--module", "pipeline.train", "--config", str(file), *options]
    return start(pair, command, {"PDSH_SSH_ARGS_APPEND": f"-F {pair.ssh_config}"})


def assert_same_run(config: Config, unbroken: Config) -> None:
    rows = ledger.read(Path(unbroken.run_dir))
    assert len(rows) == 8 * STEPS
    assert False in rows["kept"].to_pylist()
    assert ledger.read(Path(config.run_dir)).equals(rows)
    models = [weights(Path(each.run_dir, "model")) for each in (unbroken, config)]
    assert largest_difference(*models) == 0


def rank_on(host: int, config: Config) -> int:
    """Process id of a host's only rank: all hosts share this machine's processes."""
    ranks = rank_processes(config.run_dir)
    return next(process for process in ranks if psutil.Process(process).environ()["RANK"] == str(host))


def seconds_to_end(process: subprocess.Popen[str], limit: float) -> tuple[float, str]:
    started = time.monotonic()
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"still there after {limit} s:\n{process.communicate()[0]}") from None
    return time.monotonic() - started, output


def test_two_hosts_by_hostfile_decide_as_one_host_does(pair, unbroken, corpus, tiny_model, tmp_path):
    config = job(corpus, tmp_path, tiny_model("gpt_neo_with_dropout"), "pdsh", max_steps=STEPS)
    output = finish(over_pdsh(pair, config))
    assert f"{pair.address(1)}: " in output
    assert_same_run(config, unbroken)


def test_two_hosts_by_mpirun_decide_as_one_host_does(pair, unbroken, corpus, tiny_model, tmp_path):
    if not shutil.which("mpirun", path=environment()["PATH"]):
        pytest.skip("no mpirun")
    config = job(corpus, tmp_path, tiny_model("gpt_neo_with_dropout"), "mpi", max_steps=STEPS)
    file = Path(f"{config.run_dir}.yaml")
    file.write_text(to_yaml(config))
    settings = {
        "GLOO_SOCKET_IFNAME": INTERFACE,
        "PRTE_MCA_plm_ssh_args": f"-F {pair.ssh_config}",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    where = f"{pair.address(0)},{pair.address(1)}"
    finish(start(pair, ["bash", str(ROOT / "launch" / "mpi.sh"), where, str(file)], settings))
    assert_same_run(config, unbroken)


def test_a_killed_rank_ends_the_job_on_both_hosts(pair, corpus, tiny_model, tmp_path):
    config = job(corpus, tmp_path, tiny_model("llama"), "killed", max_steps=5000)
    process = over_pdsh(pair, config)
    wait_for_step(config, process, 5)
    os.kill(rank_on(1, config), signal.SIGKILL)
    seconds, output = seconds_to_end(process, 30)
    print(f"{seconds:.1f} s, exit code {process.returncode}\n{output}")
    assert process.returncode not in (0, None)
    assert f"rank 0 on host0 lost contact: rank 1 on host1 ({pair.address(1)}) has ended" in output
    assert "Traceback" not in output
    assert not rank_processes(config.run_dir)


def test_a_host_cut_off_the_network_is_named_and_the_run_goes_on_later(pair, unbroken, corpus, tiny_model, tmp_path):
    config = job(corpus, tmp_path, tiny_model("gpt_neo_with_dropout"), "cut", max_steps=STEPS)
    process = over_pdsh(pair, config)
    wait_for_step(config, process, 5)
    pair.cut(1)
    try:
        seconds, output = seconds_to_end(process, TIMEOUT_MINUTES * 60 + 30)
        print(f"{seconds:.1f} s, exit code {process.returncode}\n{output}")
    finally:
        pair.join(1)
    assert process.returncode not in (0, None)
    assert f"rank 0 on host0 lost contact: rank 1 on host1 ({pair.address(1)}) does not answer" in output
    assert "--resume auto" in output
    assert "Traceback" not in output
    deadline = time.monotonic() + 10
    while rank_processes(config.run_dir):  # the lost host's rank cannot reach the first host either
        assert time.monotonic() < deadline
        time.sleep(0.1)

    finish(over_pdsh(pair, config, "--resume", "auto"))
    assert_same_run(config, unbroken)
