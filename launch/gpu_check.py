"""What a machine with an accelerator has to show, stage by stage; launch/gpu_check.sh installs and calls this.

python launch/gpu_check.py          on one accelerator, with 125M parameters, in about 10 minutes
python launch/gpu_check.py --cpu    small, on two CPU ranks, in 3 minutes
python launch/gpu_check.py soak resume    these stages alone

A stage that fails, or takes longer than it may, stops none of the others. runs/gpu_check/check.json says of each stage
whether it passed, what was wrong, its seconds and its log. Exit code 1 where one failed, 2 without an accelerator.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.config.schema_influence import PolicyConfig
from pipeline.evidence.invariance import HALF_TOLERANCE, compare, first_few
from pipeline.record import ledger

RUNS, SOAK, UNBROKEN, LARGE = (Path("runs/gpu_check", name) for name in ("", "soak", "unbroken", "large"))
RATE = 0.25


class Stage(NamedTuple):
    name: str
    limit: int
    """Seconds."""
    command: str
    trouble: Callable[[], str] = lambda: ""
    """What is wrong with what the command left; empty where nothing is."""


def stages(cpu: bool) -> list[Stage]:
    """In their order: `resume` goes on from what `soak` wrote."""
    steps = 30 if cpu else 300
    half = steps // 2
    start = f"deepspeed --num_accelerators {2 if cpu else 1} --module"
    model = f"--model.name_or_path launch/models/gpt_neo_{'tiny' if cpu else '125m'}.json"
    data = f"--data.prepared_dir runs/data/gpu_check --data.sequence_length {64 if cpu else 256}"
    lai = f"--config launch/quickstart_pretrain.yaml {data} --influence.estimator lai"
    lai += f" --policy.rule rate --policy.rate {RATE}"
    decisions = f"python -m pipeline.verify invariance {lai} --run_dir {RUNS}/invariance"
    decisions += " --only 'ZeRO 2'" if cpu else " --only ZeRO"
    benchmark = f"{start} pipeline.benchmark --config launch/benchmark_125m.yaml {model} --run_dir {RUNS}"
    benchmark += ' --benchmark.estimators \'["bare","none","lai","ghost","ghost/adam_state"]\''
    small = " --data.sequence_length 64 --benchmark.pairs 2 --benchmark.warmup 1"
    benchmark += small if cpu else " --deepspeed_config ds_configs/benchmark_bf16.json"
    wide = f"{start} pipeline.benchmark --config launch/benchmark_125m.yaml --run_dir {RUNS}/8x2048"
    wide += " --model.name_or_path launch/models/llama_125m.json --model.attn_implementation sdpa"
    wide += " --data.sequence_length 2048 --deepspeed_config ds_configs/benchmark_batch8_bf16.json"
    wide += ' --benchmark.estimators \'["bare","lai","ghost","ghost/adam_state"]\' --benchmark.pairs 10'
    large = f"--config launch/benchmark_125m.yaml --run_dir {LARGE} --model.name_or_path launch/models/llama_1b.json"
    large += " --model.activation_checkpointing true --data.sequence_length 8192 --benchmark.pairs 3"
    large += " --benchmark.ranks 1 --deepspeed_config ds_configs/benchmark_zero3_bf16.json"
    fp16 = f"{start} pipeline.train {lai} {model} --run_dir {RUNS}/fp16 --max_steps 20"
    fp16 += " --deepspeed_config ds_configs/zero2_fp16.json"
    accelerator = [
        Stage("8x2048", 120, wide),
        Stage("plan", 60, f"python -m pipeline.benchmark {large} --plan"),
        Stage("memory", 120, f"{start} pipeline.benchmark {large}", memory_is_not_as_planned),
        Stage("fp16", 60, fp16),
    ]
    soak = f"{start} pipeline.train {lai} {model} --run_dir {SOAK} --max_steps {steps}"
    soak += f" --checkpoint.every_steps {half} --deepspeed_config ds_configs/{'zero1' if cpu else 'zero2_bf16'}.json"
    return [
        Stage("device", 100, "python -m pytest -q tests/kernels tests/end_to_end/test_device.py"),
        Stage("decisions", 300, decisions),
        Stage("benchmark", 120, benchmark),
        *([] if cpu else accelerator),
        Stage("soak", 120, soak, memory_grew),
        Stage("resume", 90, f"{soak} --resume {SOAK}/checkpoints/step-{half}", lambda: went_elsewhere(half)),
    ]


def memory_grew() -> str:
    """What is allocated after late steps of the soak, beside early ones."""
    shutil.copytree(SOAK / "ledger", UNBROKEN / "ledger")
    curve = EventAccumulator(str(SOAK / "tensorboard")).Reload().Scalars("train/memory_held_gb")
    fifth = len(curve) // 5
    early, late = (np.median([point.value for point in part]) for part in (curve[fifth : 2 * fifth], curve[-fifth:]))
    # 50 MB: what the resident set of CPU ranks moves by anyway.
    return f"steps left {early:.3f} GB early and {late:.3f} GB late" if late > 1.01 * early + 0.05 else ""


def memory_is_not_as_planned() -> str:
    """The peaks of a plain and a scored step beside what was planned."""
    planned, measured = (json.loads((LARGE / name).read_text()) for name in ("plan.json", "benchmark.json"))
    pairs = [(planned["plain"], measured["plain"]), (planned["estimators"]["lai"], measured["estimators"]["lai"])]
    peaks = [tuple(one["peak_memory_bytes"] / 1e9 for one in pair) for pair in pairs]
    far = any(abs(found / expected - 1) > 0.1 for expected, found in peaks)
    return "; ".join(f"planned {expected:.1f} GB, measured {found:.1f}" for expected, found in peaks) if far else ""


def went_elsewhere(half: int) -> str:
    """The first steps after the resume beside those of the unbroken run."""
    few = (pc.field("step") > half) & (pc.field("step") <= half + 5)
    first, again = (ledger.read(run).filter(few) for run in (UNBROKEN, SOAK))
    found = compare(first, again, PolicyConfig(rule="rate", rate=RATE), HALF_TOLERANCE)
    return "; ".join(first_few(found.violations))


def finished(stage: Stage, log: Path) -> str:
    """Run the stage into its log; what is wrong, empty where nothing is. Nothing of it goes on behind its limit."""
    with log.open("w") as output:
        command = shlex.split(stage.command)
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(stage.limit)
        except subprocess.TimeoutExpired:
            for number in (signal.SIGTERM, signal.SIGKILL):
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
                time.sleep(5)
            return f"no end after {stage.limit} s"
    if code:
        return f"exit code {code}"
    try:
        return stage.trouble()
    except Exception as error:  # of files that are not what they should be: the stage failed, the others go on
        return f"{type(error).__name__}: {error}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="small, on two CPU ranks")
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="by name; all where none is named")
    arguments = parser.parse_args()
    cpu, named = arguments.cpu, arguments.stages
    known = [stage.name for stage in stages(cpu)]
    if unknown := sorted(set(named) - set(known)):
        parser.error(f"no stage is called {', '.join(unknown)}; there are {', '.join(known)}")
    if not cpu and not torch.accelerator.is_available():
        print("gpu_check: torch sees no accelerator here; --cpu runs a small form of this on CPUs", file=sys.stderr)
        sys.exit(2)
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    shutil.rmtree(RUNS, ignore_errors=True)
    RUNS.mkdir(parents=True)
    report: dict[str, Any] = {"versions": versions(), "stages": []}
    print(*(f"{name} {found}" for name, found in report["versions"].items()), sep="\n", flush=True)
    for stage in stages(cpu):
        if named and stage.name not in named:
            continue
        started, log = time.monotonic(), RUNS / f"{stage.name}.log"
        trouble = finished(stage, log)
        seconds = round(time.monotonic() - started, 1)
        said = {"stage": stage.name, "ok": not trouble, "trouble": trouble, "seconds": seconds, "log": str(log)}
        report["stages"].append(said)
        (RUNS / "check.json").write_text(json.dumps(report, indent=2))
        print(f"{stage.name:<10} {f'FAILED: {trouble}' if trouble else 'ok'}, {seconds:g} s, {log}", flush=True)
    sys.exit(not all(said["ok"] for said in report["stages"]))


def versions() -> dict[str, str]:
    """Of what a failure may depend on."""
    found = {name: version(name) for name in ("torch", "deepspeed", "transformers")} | {
        "python": sys.version.split()[0]
    }
    if torch.cuda.is_available():
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        found |= {"cuda": str(torch.version.cuda), "nccl": nccl, "device": torch.cuda.get_device_name()}
    return found


if __name__ == "__main__":
    main()
