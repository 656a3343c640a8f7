"""Which checkpoints a run has: found, published whole, pruned. What is inside them is DeepSpeed's (engine.py)."""

import os
import shutil
from pathlib import Path

from pipeline.config import Config


def find_checkpoint(config: Config) -> Path | None:
    """The checkpoint directory that `resume` means; None for `none`, or for `auto` where there is none yet.

    Raises ValueError where a named one is not there.
    """
    if config.resume == "none":
        return None
    directory = Path(config.run_dir, "checkpoints") if config.resume == "auto" else Path(config.resume)
    latest = directory / "latest"
    if latest.is_file():
        return directory / latest.read_text().strip()
    if config.resume == "auto":
        return None
    if not list(directory.glob("*model_states.pt")):
        raise ValueError(f"resume: {directory} holds no DeepSpeed checkpoint; give RUN_DIR/checkpoints/step-N, or auto")
    return directory


def publish(checkpoint: Path, keep: int) -> None:
    """Make `checkpoint`, of which every rank has written its part, the newest; keep `keep` and remove the others.

    `latest` is replaced by a rename, after everything that it promises is on disk: killed at any moment, a run
    resumes from a whole checkpoint. Later ones than this belong to a future that an older resume gave up.
    """
    directory = checkpoint.parent
    new = directory / "latest.new"
    new.write_text(checkpoint.name)
    os.replace(new, directory / "latest")
    saved = sorted(directory.glob("step-*"), key=_step)
    kept = [path for path in saved if _step(path) <= _step(checkpoint)][-keep:]
    for old in set(saved) - set(kept):
        shutil.rmtree(old)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))
