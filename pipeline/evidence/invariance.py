"""Whether scores and decisions depend on where they are computed: the first steps of a config on other numbers of
ranks, ZeRO stages and launchers, through real `pipeline.train` processes, compared by their ledgers."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config.cli import to_yaml
from pipeline.config.deepspeed_json import read_deepspeed_config
from pipeline.config.schema import Config
from pipeline.config.schema_influence import PolicyConfig
from pipeline.data.prepared import ensure_prepared
from pipeline.engine.launch import get_accelerator
from pipeline.record import ledger

FLOAT32_TOLERANCE = 1e-4


HALF_TOLERANCE = 5e-2
"""For bf16, fp16 and autocast: partitions and ranks add up in other orders, and each order rounds to 8 or 11 bits."""


_MOST_MESSAGES = 10


def first_few(messages: Iterable[str]) -> list[str]:
    """The first of them, and a line in place of the rest."""
    found = list(islice(messages, _MOST_MESSAGES + 1))
    return [*found[:_MOST_MESSAGES], "... and more of the kind"] if len(found) > _MOST_MESSAGES else found


@dataclass
class Comparison:
    """Of a run with the first one. `loss`, `score`: largest differences, relative to the largest absolute loss and
    score of the micro-batch. `differing` decisions, among them those `too_close` to call; `close`: units that near
    the boundary, whatever became of them. `steps` compared; `violations`: what may not be."""

    loss: float = 0.0
    score: float = 0.0
    differing: int = 0
    close: int = 0
    steps: int = 0
    violations: list[str] = field(default_factory=list)


def compare(
    first: pa.Table, other: pa.Table, policy: PolicyConfig, tolerance: float, scope: str = "micro_step"
) -> Comparison:
    """Compare two ledgers of the same units, by the micro-batches (or steps: `influence.scope`) that they were scored
    and decided in.

    Violations are a loss or score that is off by more than `tolerance`, and a decision that differs although the
    first run's score is further than `tolerance` from the boundary, all relative to the micro-batch's largest. After a
    step in which a decision differs the runs train on different data, so that step is the last to be compared.
    """
    keys = ["step", "micro_step", "position", "document_ids"]
    result = Comparison()
    if not first.select(keys).equals(other.select(keys)):
        result.violations.append("other units were scored, or in another order")
        return result
    names = ["step", "micro_step", "position", "loss", "score", "kept", "reason"]
    ours, theirs = (table.select(names).to_pandas() for table in (first, other))
    for _, part in ours.groupby("step"):
        for _, mine in part.groupby(scope):
            _compare_batch(result, mine, theirs.loc[mine.index], _boundary(mine, policy), tolerance)
        result.steps += 1
        if result.differing:
            break
    return result


def _compare_batch(
    result: Comparison, mine: pd.DataFrame, theirs: pd.DataFrame, boundary: float, tolerance: float
) -> None:
    """Add what differs to `result`."""
    loss, score = (_differences(mine[name].to_numpy(), theirs[name].to_numpy()) for name in ("loss", "score"))
    result.loss, result.score = max(result.loss, loss.max()), max(result.score, score.max())
    scores = mine["score"].to_numpy().astype(np.float64)
    close = np.abs(scores - boundary) <= tolerance * _largest(scores)
    differing = (mine["kept"] != theirs["kept"]).to_numpy()
    result.close += int(close.sum())
    result.differing += int(differing.sum())
    for wrong, what in (
        (differing & ~close, "kept {m.kept} and {t.kept} at score {m.score:.6g}, boundary {boundary:.6g}"),
        (loss > tolerance, "loss {m.loss:.6g} and {t.loss:.6g}"),
        (score > tolerance, "score {m.score:.6g} and {t.score:.6g}"),
    ):
        for m, t in zip(mine[wrong].itertuples(), theirs[wrong].itertuples(), strict=True):
            where = f"step {m.step}, micro-step {m.micro_step}, position {m.position}: "
            result.violations.append(where + what.format(m=m, t=t, boundary=boundary))


def _largest(values: np.ndarray) -> float:
    """The largest absolute value, to divide by; units without a score do not count."""
    return max(np.abs(values[np.isfinite(values)]).max(initial=0.0), np.finfo(np.float64).tiny)


def _differences(mine: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Relative to the largest of mine; infinite where only one of the two is a number."""
    mine, theirs = mine.astype(np.float64), theirs.astype(np.float64)
    differences = np.abs(mine - theirs) / _largest(mine)
    return np.where(np.isnan(mine) & np.isnan(theirs), 0.0, np.nan_to_num(differences, nan=np.inf))


def _boundary(rows: pd.DataFrame, policy: PolicyConfig) -> float:
    """The score that separates dropped from kept in what was decided together, NaN where nothing was decided.

    `reweight` drops where the score is not positive; `threshold` below the threshold; `rate`, and a threshold whose
    drops `max_drop_fraction` cut short, between the last dropped and the first kept score.
    """
    if rows["step"].iloc[0] <= policy.warmup_steps:
        return np.nan
    if policy.action == "reweight":
        return 0.0
    if policy.rule == "threshold" and "max_drop_fraction" not in set(rows["reason"]):
        return policy.threshold
    decided = rows[rows["reason"] != "non_finite"]
    return (decided["score"][~decided["kept"]].max() + decided["score"][decided["kept"]].min()) / 2


@dataclass(frozen=True)
class Variant:
    """One way to run the same thing."""

    name: str
    ranks: int
    launcher: str
    zero: dict[str, Any]
    checkpointing: bool


def variants(config: Config, ranks: int) -> list[Variant]:
    """The first is what the others are compared with: `ranks` ranks, all else as in `config`."""
    zero = {"stage": 0} | read_deepspeed_config(config).get("zero_optimization", {})
    checkpointing = config.model.activation_checkpointing
    name = f"{ranks} rank{'s' * (ranks > 1)}, ZeRO {zero['stage']}, deepspeed"
    first = Variant(name, ranks, "deepspeed", zero, checkpointing)
    plain = {key: value for key, value in zero.items() if not key.startswith("offload_")}
    offload = {name: {"device": "cpu"} for name in ("offload_optimizer", "offload_param")}
    others = [replace(first, name=f"{n} rank{'s' * (n > 1)}", ranks=n) for n in (1, 2, 4)]
    others += [replace(first, name=f"ZeRO {stage}", zero=plain | {"stage": stage}) for stage in range(4)]
    others.append(replace(first, name="ZeRO 3, CPU offload", zero=plain | offload | {"stage": 3}))
    switched = "off" if checkpointing else "on"
    others.append(replace(first, name=f"activation checkpointing {switched}", checkpointing=not checkpointing))
    others += [replace(first, name=launcher, launcher=launcher) for launcher in ("torchrun", "mpirun")]
    return [first, *(other for other in others if replace(other, name=first.name) != first)]


def invariance(config: Config, steps: int, only: str, timeout: float) -> bool:
    """Run the first `steps` optimizer steps of `config` in every variant whose name contains `only`, print how each
    compares with the first, and return whether all agree. `timeout`: seconds for one run.

    Raises ValueError where the first does not run, or drops nothing, or what is dropped is not a row of the ledger.
    """
    if config.influence.unit == "token":
        raise ValueError(
            "influence.unit 'token' leaves no row for each decision in the ledger, so there is nothing to compare: set "
            "it to sequence or document"
        )
    half = any(read_deepspeed_config(config).get(k, {}).get("enabled") for k in ("bf16", "fp16", "torch_autocast"))
    tolerance = HALF_TOLERANCE if half else FLOAT32_TOLERANCE
    # On CPUs, any number of ranks can share the cores.
    accelerators = sys.maxsize if get_accelerator().device_name() == "cpu" else get_accelerator().device_count()
    first, *others = variants(config, min(2, accelerators))
    ensure_prepared(config)
    directory = Path(tempfile.mkdtemp(prefix="invariance-"))
    size = read_deepspeed_config(config)["train_micro_batch_size_per_gpu"] * first.ranks
    reference = run(config, first, steps, size, directory, timeout)
    dropped = reference.filter(~pc.field("kept") & (pc.field("reason") != "non_finite")).num_rows
    if not dropped:
        shutil.rmtree(directory)
        raise ValueError(
            f"nothing was dropped in {steps} steps, so there is no decision to compare: set a policy that drops "
            "(--policy.rule rate --policy.rate 0.3 --policy.warmup_steps 0) or more --steps"
        )
    print(f"{first.name}: {len(reference)} units, {dropped} dropped in {steps} steps of {size}; compared with it:")
    print(_ROW.format("", "loss", "score", "differing", "too close", "steps"), flush=True)
    agree, compared = True, 0
    for variant in (candidate for candidate in others if only in candidate.name):
        if obstacle := _obstacle(variant, size, accelerators):
            print(f"{variant.name:<30} skipped: {obstacle}", flush=True)
            continue
        try:
            other = run(config, variant, steps, size, directory, timeout)
            found = compare(reference, other, config.policy, tolerance, config.influence.scope)
        except ValueError as failure:
            found = Comparison(violations=[str(failure)])
        numbers = (f"{found.loss:.1e}", f"{found.score:.1e}", found.differing, found.close, found.steps)
        print(_ROW.format(variant.name, *numbers), *first_few(found.violations), sep="\n    ", flush=True)
        agree, compared = agree and not found.violations, compared + 1
    if not compared:
        raise ValueError(
            f"no configuration with '{only}' in its name runs here; there are {[other.name for other in others]}"
        )
    print(f"{'OK: all agree' if agree else f'FAILED; logs and ledgers are in {directory}'} (tolerance {tolerance:g})")
    if agree:
        shutil.rmtree(directory)
    return agree


_ROW = "{:<30} {:>9} {:>9} {:>10} {:>10} {:>6}"


def _obstacle(variant: Variant, size: int, accelerators: int) -> str:
    """Why this variant cannot run here; empty where it can."""
    if size % variant.ranks:
        return f"a global micro-batch of {size} sequences does not divide by {variant.ranks}"
    if variant.ranks > accelerators:
        return f"only {accelerators} accelerator here"
    if variant.launcher == "mpirun":
        if not shutil.which("mpirun", path=_environment(0)["PATH"]):
            return "no mpirun on PATH"
        version = subprocess.run(["mpirun", "--version"], env=_environment(0), capture_output=True, text=True)
        if "Open MPI" not in version.stdout:
            return "mpirun is not Open MPI's"
    return ""


def run(config: Config, variant: Variant, steps: int, size: int, directory: Path, timeout: float) -> pa.Table:
    """The ledger of the first `steps` steps of `config` in this variant, with `size` sequences a global micro-batch.

    Leaves log and ledger in `directory`. Raises ValueError with the end of the log where the run fails.
    """
    path = directory / re.sub(r"\W+", "-", variant.name)
    settings = read_deepspeed_config(config) | {
        "train_micro_batch_size_per_gpu": size // variant.ranks,
        "zero_optimization": variant.zero,
    }
    # Whatever optimizer the config's own stage accepts is fine for the others.
    settings = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False} | settings
    path.with_suffix(".json").write_text(json.dumps(settings))
    derived = replace(
        config,
        run_dir=str(path),
        deepspeed_config=str(path.with_suffix(".json")),
        max_steps=steps,
        resume="none",
        model=replace(config.model, activation_checkpointing=variant.checkpointing),
        data=replace(config.data, eval_files=None),
        checkpoint=replace(config.checkpoint, every_steps=steps, best_of=None),
        observe=replace(config.observe, eval_every_steps=None),
    )
    path.with_suffix(".yaml").write_text(to_yaml(derived))
    port = _free_port()
    log = path.with_suffix(".log")
    try:
        code = _finish(_command(variant, path.with_suffix(".yaml"), port), _environment(port), log, timeout)
    finally:
        for large in ("checkpoints", "model"):
            shutil.rmtree(path / large, ignore_errors=True)
    if code != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        raise ValueError(f"'{variant.name}' ended with exit code {code}; the end of {log}:\n{tail}")
    return ledger.read(path)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _environment(port: int) -> dict[str, str]:
    """This process's, with the programs that belong to this Python first; MASTER_PORT is for mpirun."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    threads = {"OMP_NUM_THREADS": "1"} if get_accelerator().device_name() == "cpu" else {}
    return os.environ | threads | {"PATH": path, "MASTER_PORT": str(port)}


def _command(variant: Variant, file: Path, port: int) -> list[str]:
    ranks = str(variant.ranks)
    job = ["pipeline.train", "--config", str(file)]
    if variant.launcher == "mpirun":
        places = ["--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]
        return ["mpirun", *places, "-n", ranks, sys.executable, "-m", *job]
    if variant.launcher == "torchrun":
        torchrun = [sys.executable, "-m", "torch.distributed.run"]
        return [*torchrun, "--nproc_per_node", ranks, "--master_port", str(port), "--module", *job]
    return ["deepspeed", "--num_accelerators", ranks, "--master_port", str(port), "--module", *job]


def _finish(command: Sequence[str], environment: dict[str, str], log: Path, timeout: float) -> int:
    """Run a launcher into `log`; returns its exit code. After `timeout` seconds, or Ctrl-C, nothing of it is left."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(timeout)
        except BaseException as error:
            # First the polite way: torchrun and mpirun put their ranks into sessions that only they know.
            os.killpg(process.pid, signal.SIGTERM)
            time.sleep(10)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                raise ValueError(f"no end after {timeout:g} s; the log is {log}") from None
            raise
