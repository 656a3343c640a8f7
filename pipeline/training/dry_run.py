"""`pipeline.train --dry_run`: all that a long run would find out too late, tried with two steps. Nothing is kept."""

import gc
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from pipeline.config.ownership import owned
from pipeline.config.schema import Config
from pipeline.data.prepared import load_report
from pipeline.engine import collectives, deepspeed_engine, launch
from pipeline.engine.checkpoints import find_checkpoint, refuse_foreign_run_dir


def dry_run(config: Config, train: Callable[..., object]) -> None:
    """Two steps of `train` at the real sizes on the real data, in a directory beside `run_dir`, with a checkpoint
    written after the first and read for the second; evaluation and export included. Prints what was found, removes it.

    Goes through config, files, dataset, hosts, agreement of the ranks, memory, disk; each fails with its own message.
    Raises ValueError where that directory is somebody's own, or in use, or the disk has no room for the checkpoints of
    the run. Collective.
    """
    place = f"{config.run_dir}.dry_run"
    once = replace(
        config,
        run_dir=place,
        resume="none",
        checkpoint=replace(config.checkpoint, every_steps=1, best_of=None),
        observe=replace(config.observe, eval_every_steps=None),
    )
    with ExitStack() as ownership:
        launch.join_process_group()

        def own() -> None:
            ownership.enter_context(owned(place, "run_dir"))
            refuse_foreign_run_dir(Path(place))
            shutil.rmtree(place, ignore_errors=True)  # of a dry run that was killed

        collectives.on_rank_0(own)
        _rehearse(config, once, place, train)


def _rehearse(config: Config, once: Config, place: str, train: Callable[..., object]) -> None:
    seconds = []
    try:
        for steps, resume in ((1, "none"), (2, "auto")):
            started = time.perf_counter()
            # A schedule that is as long as the run, and a run that is not.
            train(replace(once, resume=resume), until=steps)
            seconds.append(time.perf_counter() - started)
            gc.collect()
            if torch.accelerator.is_available():
                torch.accelerator.empty_cache()
        peaks = collectives.all_gather_rows(
            torch.tensor([[deepspeed_engine.peak_memory() / 1e9]], device=launch.device())
        )
        collectives.barrier()
        if collectives.rank() == 0:
            _report(config, Path(place), peaks.flatten().tolist(), seconds)
    finally:
        if collectives.rank() == 0:
            shutil.rmtree(place, ignore_errors=True)


def _report(config: Config, place: Path, peaks: list[float], seconds: list[float]) -> None:
    checkpoint = find_checkpoint(replace(config, run_dir=str(place), resume="auto"))
    assert checkpoint is not None
    bytes_each = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    most = config.checkpoint.keep + 1 + (config.checkpoint.best_of is not None)
    needed = bytes_each * most  # the newest is whole before the oldest goes
    free = shutil.disk_usage(place).free
    data = load_report(config.data.prepared_dir)["train"]
    table = Table(title="dry run: nothing was trained", title_justify="left", show_header=False)
    for name, value in {
        "ranks": f"{collectives.world_size()}, with the same config, code and versions",
        "data": f"{data['sequences']:,} sequences, {data['tokens']:,} tokens, {data['documents']:,} documents",
        "memory": f"{max(peaks):.2f} GB at most on a rank, {min(peaks):.2f} at least",
        "checkpoint": f"{bytes_each / 1e9:.3f} GB, written, checked and read",
        "disk": f"{needed / 1e9:.3f} GB for {most} checkpoints; {free / 1e9:.1f} GB are free",
        "time": f"{seconds[0]:.0f} s to start and take a step, {seconds[1]:.0f} s to resume and take one",
    }.items():
        table.add_row(name, value)
    Console().print(table)
    if free < needed:
        raise ValueError(
            f"run_dir: the checkpoints of this run take {needed / 1e9:.3f} GB and {free / 1e9:.3f} GB are free; make "
            "room, lower checkpoint.keep, or choose another run_dir"
        )
