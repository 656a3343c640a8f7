"""The main job through the real `deepspeed` launcher."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.cli import to_dict, to_yaml
from pipeline.config.schema import Config
from pipeline.record import ledger
from tests.launcher import ROOT, deepspeed, environment, rank_processes
from tests.runs import ADAM, config_of, deepspeed_json, largest_difference, weights


def job(corpus: Path, tmp_path: Path, model: Path, name: str, **overrides: Any) -> Config:
    schedule = {"type": "WarmupCosineLR", "params": {"total_num_steps": "auto", "warmup_num_steps": 2}}
    deepspeed_config = deepspeed_json(tmp_path / "ds.json", 3, accumulation=2, optimizer=ADAM, scheduler=schedule)
    options = {
        "max_steps": 60,
        "checkpoint__every_steps": 5,
        "influence__include_self": False,
        "influence__precondition": "adam_ema",
        "policy__rule": "rate",
        "policy__rate": 0.3,
    } | overrides
    return config_of(corpus, tmp_path / name, model, deepspeed_config, **options)


def finish(process: subprocess.Popen[str]) -> str:
    try:
        output, _ = process.communicate(timeout=480)  # the first start on a host builds DeepSpeed's op
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"still there after 480 s:\n{process.communicate()[0]}") from None
    assert process.returncode == 0, output
    return output


def wait_for_step(config: Config, process: subprocess.Popen[str], step: int) -> None:
    """Until a checkpoint of `step` is whole."""
    latest = Path(config.run_dir, "checkpoints", "latest")
    deadline = time.monotonic() + 240
    while not (latest.is_file() and int(latest.read_text().removeprefix("step-")) >= step):
        assert process.poll() is None, process.communicate()[0]
        if time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGKILL)
            raise AssertionError(f"not at step {step} after 240 s:\n{process.communicate()[0]}")
        time.sleep(0.05)


@pytest.mark.slow
def test_killed_at_a_random_step_and_resumed_equals_an_unbroken_run(corpus, tiny_model, tmp_path):
    """Catches everything that a checkpoint forgets: losses, kept sets, ledger and weights are exactly equal."""
    unbroken = job(corpus, tmp_path, tiny_model("gpt_neo_with_dropout"), "unbroken")
    output = finish(deepspeed("pipeline.train", unbroken))
    assert re.search(r"all +│ +- │ +- │ +480 │ +1\d\d │", output), output

    killed = job(corpus, tmp_path, tiny_model("gpt_neo_with_dropout"), "killed")
    process = deepspeed("pipeline.train", killed)
    wait_for_step(killed, process, random.choice([5, 10, 20]))
    time.sleep(random.uniform(0, 0.5))
    victims = rank_processes(killed.run_dir)
    assert len(victims) == 2
    os.kill(random.choice(victims), signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0
    assert len(ledger.read(Path(killed.run_dir))) < 480

    finish(deepspeed("pipeline.train", killed, "--resume", "auto"))
    rows = ledger.read(Path(unbroken.run_dir))
    assert False in rows["kept"].to_pylist()
    assert ledger.read(Path(killed.run_dir)).equals(rows)
    models = [weights(Path(config.run_dir, "model")) for config in (unbroken, killed)]
    assert largest_difference(*models) == 0


@pytest.mark.slow
def test_sigterm_at_one_rank_becomes_a_checkpoint_at_all_of_them(corpus, tiny_model, tmp_path):
    config = job(corpus, tmp_path, tiny_model("llama"), "stopped", max_steps=5000, checkpoint__every_steps=5)
    process = deepspeed("pipeline.train", config)
    wait_for_step(config, process, 5)
    os.kill(rank_processes(config.run_dir)[-1], signal.SIGTERM)
    started = time.monotonic()
    output = finish(process)
    assert time.monotonic() - started < 30
    step = int(re.search(r"stopped by a signal after step (\d+)", output).group(1))
    assert Path(config.run_dir, "checkpoints", "latest").read_text() == f"step-{step}"
    assert ledger.read(Path(config.run_dir))["step"].to_pylist()[-1] == step


@pytest.mark.faults
def test_ctrl_c_at_the_launcher_becomes_a_checkpoint(corpus, tiny_model, tmp_path):
    """A terminal sends it to all processes at once; the launcher's traceback and exit code are its own."""
    config = job(corpus, tmp_path, tiny_model("llama"), "stopped", max_steps=5000, checkpoint__every_steps=5)
    process = deepspeed("pipeline.train", config)
    wait_for_step(config, process, 5)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    step = int(re.search(r"stopped by a signal after step (\d+); --resume auto goes on", output).group(1))
    assert Path(config.run_dir, "checkpoints", "latest").read_text() == f"step-{step}"
    assert ledger.read(Path(config.run_dir))["step"].to_pylist()[-1] == step
    assert not rank_processes(config.run_dir)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120
    )


@pytest.mark.faults
def test_a_dry_run_rehearses_everything_and_keeps_nothing(corpus, tiny_model, tmp_path):
    config = job(corpus, tmp_path, tiny_model("llama"), "dry", max_steps=1000)
    output = finish(deepspeed("pipeline.train", config, "--dry_run", "true"))
    assert "dry run: nothing was trained" in output
    assert re.search(r"checkpoint │ 0\.\d+ GB, written, checked and read", output), output
    assert re.search(r"memory +│ \d+\.\d+ GB at most", output)
    assert not list(tmp_path.glob("dry*/"))


@pytest.mark.slow
def test_help_explains_every_key_and_unknown_ones_are_refused_by_name(corpus, tiny_model, tmp_path):
    shown = command("pipeline.train", "--help", "all")
    assert shown.returncode == 0
    assert "Config(run_dir" not in shown.stdout, "a class in the place of words"
    keys = to_dict(job(corpus, tmp_path, tiny_model("llama"), "help"))
    for name, value in keys.items():
        for key in [f"{name}.{inner}" for inner in value] if isinstance(value, dict) else [name]:
            explained = shown.stdout.split(f"\n  --{key} ", 1)[1].split("(", 1)[0]
            assert len(explained.split()) > 3, key
    refused = command("pipeline.train", "--config", str(ROOT / "launch" / "stories260k_pile.yaml"), "--polcy.rate", "1")
    assert refused.returncode == 2
    assert "--polcy.rate" in refused.stderr


@pytest.mark.faults
def test_one_process_without_a_launcher_is_a_world_of_one(corpus, tiny_model, tmp_path):
    config = job(corpus, tmp_path, tiny_model("llama"), "alone", max_steps=2)
    file = tmp_path / "alone.yaml"
    file.write_text(to_yaml(config))
    result = command("pipeline.train", "--config", str(file))
    assert result.returncode == 0, result.stderr
    assert len(ledger.read(Path(config.run_dir))) == 8
