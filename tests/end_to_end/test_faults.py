"""What clusters do to long runs, done for real. README's table of faults names the test of each row."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from pipeline.data.prepared import load_report
from pipeline.engine.checkpoints import damage_of
from pipeline.record import ledger
from tests.end_to_end.test_launch import finish, job, wait_for_step
from tests.launcher import ROOT, deepspeed, environment, rank_processes
from tests.runs import ADAM, config_of, deepspeed_json, largest_difference, run, weights


def verify_ledger(run_dir: str | Path) -> str:
    result = subprocess.run(
        [sys.executable, "-m", "pipeline.verify", "ledger", str(run_dir)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.faults
def test_killed_ten_times_at_random_moments_no_sample_is_lost_or_repeated(corpus, tiny_model, tmp_path):
    options = {"max_steps": 150, "checkpoint__every_steps": 3, "observe__every_steps": 50}
    unbroken = job(corpus, tmp_path, tiny_model("llama"), "unbroken", **options)
    finish(deepspeed("pipeline.train", unbroken))
    config = job(corpus, tmp_path, tiny_model("llama"), "killed", **options)
    seconds = random.Random(5)
    for _ in range(10):
        process = deepspeed("pipeline.train", config, "--resume", "auto")
        deadline = time.monotonic() + 120
        while len(rank_processes(config.run_dir)) < 2 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        # From before the ranks meet to well into training, or in the middle of a checkpoint.
        time.sleep(seconds.uniform(2, 16))
        for victim in rank_processes(config.run_dir)[: seconds.choice([1, 2])]:
            os.kill(victim, signal.SIGKILL)
        process.communicate(timeout=120)
    finish(deepspeed("pipeline.train", config, "--resume", "auto"))
    assert "1200 units" in verify_ledger(config.run_dir)
    assert ledger.read(Path(config.run_dir)).equals(ledger.read(Path(unbroken.run_dir)))
    models = [weights(Path(each.run_dir, "model")) for each in (unbroken, config)]
    assert largest_difference(*models) == 0


@pytest.mark.faults
def test_sigterm_to_launch_py_becomes_a_checkpoint(corpus, tiny_model, tmp_path):
    """launch.py passes it to its ranks and ends with a non-zero code of its own; the run is whole."""
    config = job(corpus, tmp_path, tiny_model("llama"), "stopped", max_steps=5000, checkpoint__every_steps=5)
    process = deepspeed("pipeline.train", config)
    wait_for_step(config, process, 5)
    (launch_py,) = {psutil.Process(pid).ppid() for pid in rank_processes(config.run_dir)}
    started = time.monotonic()
    os.kill(launch_py, signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert time.monotonic() - started < 30
    assert "stopped by a signal after step" in output
    newest = Path(config.run_dir, "checkpoints", Path(config.run_dir, "checkpoints", "latest").read_text())
    assert damage_of(newest) is None
    assert ledger.read(Path(config.run_dir))["step"].to_pylist()[-1] == int(newest.name.removeprefix("step-"))
    verify_ledger(config.run_dir)


@contextmanager
def small_disk(directory: Path, size: str) -> Iterator[None]:
    """A file system of `size` at `directory` for a while; needs root."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    directory.mkdir(exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", directory], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", directory], check=True)


@pytest.mark.faults
def test_a_full_disk_under_the_ledger_ends_the_run_and_no_row_is_lost(corpus, tiny_model, tmp_path):
    options = {"max_steps": 40, "checkpoint__every_steps": 4}
    unbroken = job(corpus, tmp_path, tiny_model("llama"), "unbroken", **options)
    finish(deepspeed("pipeline.train", unbroken))
    config = job(corpus, tmp_path, tiny_model("llama"), "run", **options)
    process = deepspeed("pipeline.train", config)
    wait_for_step(config, process, 4)
    os.kill(rank_processes(config.run_dir)[0], signal.SIGTERM)
    finish(process)
    directory, newest = Path(config.run_dir, "ledger"), Path(config.run_dir, "checkpoints", "latest").read_text()
    with small_disk(directory, "4k"):
        output, _ = (process := deepspeed("pipeline.train", config, "--resume", "auto")).communicate(timeout=120)
        assert process.returncode != 0
        assert re.search(r"ledger could not be written .* make room", output), output[-3000:]
        assert Path(config.run_dir, "checkpoints", "latest").read_text() == newest
    finish(deepspeed("pipeline.train", config, "--resume", "auto"))
    assert ledger.read(Path(config.run_dir)).equals(ledger.read(Path(unbroken.run_dir)))
    verify_ledger(config.run_dir)


@pytest.mark.faults
def test_a_full_disk_ends_the_run_and_the_checkpoint_before_is_whole(corpus, tiny_model, tmp_path):
    with small_disk(tmp_path / "small", "3m"):
        fill_up_and_go_on(corpus, tiny_model, tmp_path, tmp_path / "small")


def fill_up_and_go_on(corpus, tiny_model, tmp_path, directory):
    deepspeed_config = deepspeed_json(tmp_path / "ds.json", 3, optimizer=ADAM)
    config = config_of(
        corpus,
        directory / "run",
        tiny_model("llama"),
        deepspeed_config,
        max_steps=400,
        checkpoint__every_steps=2,
        checkpoint__keep=1000,
    )
    process = deepspeed("pipeline.train", config)
    output, _ = process.communicate(timeout=240)
    assert process.returncode != 0
    # Where the disk is full is a matter of sizes: in a checkpoint, or in the rows that are written before it is named.
    checkpoint, rows = r"step-\d+ could not be written .* The one before it is whole", r"ledger could not be written .*"
    assert re.search(f"{checkpoint}|{rows} the newest checkpoint and its rows", output), output[-3000:]
    found = sorted(Path(config.run_dir, "checkpoints").glob("step-*"), key=lambda p: int(p.name.removeprefix("step-")))
    latest = Path(config.run_dir, "checkpoints", "latest").read_text()
    assert damage_of(Path(config.run_dir, "checkpoints", latest)) is None
    assert len(found) >= 2
    for old in found[:-2]:
        if old.name != latest:
            subprocess.run(["rm", "-r", str(old)], check=True)
    end = int(latest.removeprefix("step-")) + 2
    finish(deepspeed("pipeline.train", config, "--resume", "auto", f"--max_steps={end}", "--checkpoint.keep=1"))
    assert f"positions 0..{end * 4 - 1}" in verify_ledger(config.run_dir)


@pytest.mark.faults
def test_a_dataset_replaced_under_a_running_job_does_not_change_what_it_reads(corpus, tiny_model, tmp_path):
    """The job keeps the files that it opened; a resume of it is refused by the keys that differ."""
    options = {"data__prepared_dir": tmp_path / "prepared", "max_steps": 60}
    unbroken = job(corpus, tmp_path, tiny_model("llama"), "unbroken", **options)
    finish(deepspeed("pipeline.train", unbroken))
    config = job(corpus, tmp_path, tiny_model("llama"), "running", **options)
    process = deepspeed("pipeline.train", config)
    wait_for_step(config, process, 5)
    replaced = subprocess.run(
        [sys.executable, "-m", "pipeline.prepare", "--config", f"{config.run_dir}.yaml", "--data.sequence_length", "8"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert replaced.returncode == 0, replaced.stderr
    assert load_report(tmp_path / "prepared")["train"]["sequences"] > 0
    finish(process)
    assert ledger.read(Path(config.run_dir)).equals(ledger.read(Path(unbroken.run_dir)))
    process = deepspeed("pipeline.train", config, "--resume", "auto")
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "sequence_length: 8 -> 16" in output


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("stage", [0, 3])
def test_denominators_are_right_with_uneven_drops_at_any_accumulation(
    ranks, corpus, tiny_model, tmp_path, stage, accumulation
):
    """Documents of different lengths, so that ranks and micro-batches keep different numbers of tokens."""
    from tests.end_to_end.test_train import pc, plain_training

    config = config_of(
        corpus,
        tmp_path / "run",
        tiny_model("gpt_neo"),
        deepspeed_json(tmp_path / "ds.json", stage, accumulation=accumulation),
        max_steps=2,
        data__prepared_dir=tmp_path / "prepared",
        seed=4,  # with which some of these sequences hold two documents
        policy__rule="rate",
        policy__rate=0.35,
        influence__include_self=False,
        influence__unit="document",
    )
    ranks(run, config)
    rows = ledger.read(tmp_path / "run")
    kept = rows.filter(pc.field("kept")).to_pandas()
    assert len(kept) < len(rows)
    if accumulation > 1:
        assert kept.groupby(["step", "micro_step"])["tokens"].sum().nunique() > 1
    assert kept.groupby(["step", "micro_step", "rank"])["tokens"].sum().nunique() > 1
    after = weights(tmp_path / "run" / "model")
    assert largest_difference(plain_training(config, rows, accumulation), after) < 1e-5
