"""What a run's steps ran under: at every start and resume its config, DeepSpeed JSON and batch sizes are kept.

RUN_DIR/config.yaml              of the last start
RUN_DIR/config.step-N.yaml       of the start that went on from step N (0: a new run), and so
RUN_DIR/deepspeed.step-N.json    of the ledger's rows from step N + 1 on, up to the next start
RUN_DIR/start.step-N.json        see `Start`; with what of it a resume changed
"""

import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pipeline.config.cli import to_yaml
from pipeline.config.schema import Config


@dataclass(frozen=True)
class Start:
    """One start of a run: the ledger's rows from step `step` + 1 on are its, up to the next start."""

    step: int
    """Optimizer step that it went on from."""
    position: int
    """In the sample order, of the first sequence that it read."""
    ranks: int
    sequences: int
    """Of a micro-batch, on all ranks together."""
    accumulation: int
    """Micro-batches that a step reads."""
    checkpoint: str | None = None
    """What it went on from."""
    changed: Sequence[str] = ()
    """What other value holds from here on, in sentences."""
    leave_out: Sequence[int] = field(default=())
    """Documents left out."""
    pool: int = 1
    """Sequences read for each that is trained on."""
    mixture: Sequence[str] = ()
    """What it was to read of each source of `data.mixture`, and which end before it does, in sentences."""


def keep_start(config: Config, start: Start) -> None:
    """Write the files of `start`, on rank 0. Those of later starts belong to a future that this one gave up."""
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    for kind, suffix, text in (
        ("config", "yaml", to_yaml(config)),
        ("deepspeed", "json", Path(config.deepspeed_config).read_text()),
        ("start", "json", json.dumps(asdict(start), indent=2)),
    ):
        for old in run_dir.glob(f"{kind}.step-*.{suffix}"):
            if _step(old) > start.step:
                old.unlink()
        (run_dir / f"{kind}.step-{start.step}.{suffix}").write_text(text)


def config_of_run(run_dir: Path) -> dict[str, Any]:
    """The config of its last start. Raises ValueError where `run_dir` is no run directory."""
    if not (run_dir / "config.yaml").is_file() or not (run_dir / "ledger").is_dir():
        raise ValueError(
            f"{run_dir} is no run directory (no config.yaml or no ledger/); name the run_dir of a training"
        )
    return dict(yaml.safe_load((run_dir / "config.yaml").read_text()))


def starts_of(run_dir: Path) -> list[Start]:
    """Every start of a run, the first one first; none where an earlier version wrote it."""
    found = sorted(run_dir.glob("start.step-*.json"), key=_step)
    return [Start(**json.loads(path.read_text())) for path in found]


def start_of(starts: Sequence[Start], step: int) -> Start:
    """The one under which `step` was trained."""
    return starts[max(bisect_left([start.step for start in starts], step) - 1, 0)]


def _step(path: Path) -> int:
    return int(path.name.split(".")[1].removeprefix("step-"))
