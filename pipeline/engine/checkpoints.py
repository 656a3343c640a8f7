"""Which checkpoints a run has, whether they are whole and this run's. What is inside them is DeepSpeed's."""

import itertools
import json
import math
import os
import re
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.config.differences import changes
from pipeline.config.ownership import owner_of
from pipeline.config.schema import Config
from pipeline.config.writing import NotWritten, not_written

MANIFEST = "manifest.json"
BEST = "best"
"""File beside the checkpoints that names one of them."""


@dataclass
class Progress:
    """What a checkpoint holds beside DeepSpeed's own: enough to go on as if nothing had happened."""

    evaluations: dict[int, dict[str, Any]]
    """Held-out figures by optimizer step."""
    influence: dict[str, Any]
    """State of the influence engine: step, position in the sample order, what the scorer holds."""


def find_checkpoint(config: Config) -> Path | None:
    """The checkpoint directory that `resume` means; None for `none`, or for `auto` where there is none yet.

    `auto` falls back to an older checkpoint where the newest is damaged, and says so. Raises ValueError where a named
    one is missing or damaged, or where none of a run's is whole.
    """
    if config.resume == "none":
        return None
    directory = Path(config.run_dir, "checkpoints") if config.resume == "auto" else Path(config.resume)
    if directory.name.startswith("step-"):
        if damage := damage_of(directory):
            raise ValueError(f"resume: {directory} cannot be used: {damage}; name another checkpoint, or auto")
        return directory
    latest = directory / "latest"
    if not latest.is_file():
        if config.resume == "auto":
            return None
        raise ValueError(f"resume: {directory} holds no checkpoint; give RUN_DIR/checkpoints/step-N, or auto")
    newest = _step(directory / latest.read_text().strip())
    found = [path for path in reversed(_saved(directory)) if _step(path) <= newest]
    for checkpoint in found:
        damage = damage_of(checkpoint)
        if damage is None:
            return checkpoint
        print(f"resume: {checkpoint} cannot be used: {damage}; trying the one before", flush=True)
    raise ValueError(f"resume: none of the checkpoints in {directory} is whole; start anew with --resume none")


def checkpoints_of(run_dir: str) -> dict[str, Path]:
    """The run's whole checkpoints by name, oldest first."""
    return {path.name: path for path in _saved(Path(run_dir, "checkpoints")) if damage_of(path) is None}


def damage_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, None where they are as they were written: all there, of the same sizes,
    and every part of torch's archives with its checksum."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())["files"]
    except FileNotFoundError:
        return f"no {MANIFEST}, so it was never finished (or is not one of ours)"
    except (ValueError, KeyError):
        return f"{MANIFEST} is damaged"
    for name, size in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}"
        try:
            with zipfile.ZipFile(path) as archive:
                if part := archive.testzip():
                    return f"{name} is corrupt in {part}"
        except zipfile.BadZipFile as error:
            return f"{name} is corrupt ({error})"
    return None


def identity_of(checkpoint: Path) -> dict[str, Any]:
    """The identity of the run that wrote `checkpoint`."""
    return json.loads((checkpoint / MANIFEST).read_text())["identity"]


def settings_of(checkpoint: Path) -> dict[str, Any] | None:
    """The DeepSpeed settings that `checkpoint` was written under; None where it does not say."""
    return json.loads((checkpoint / MANIFEST).read_text()).get("settings")


def refuse_foreign(checkpoint: Path, identity: dict[str, Any]) -> None:
    """Raises ValueError, naming each key that differs, where `checkpoint` was not written by a run like this one.

    How it is partitioned (ranks, ZeRO stage) is not compared: `engine.config_to_load` judges that.
    """
    saved, here = identity_of(checkpoint), json.loads(json.dumps(identity))
    saved["engine"] |= {key: here["engine"][key] for key in ("ranks", "zero_stage")}
    if differences := changes(saved, here):
        raise ValueError(
            f"resume: {checkpoint} belongs to another run; it differs (there -> here) in\n{differences}\n"
            "Give it its own config and data back, or start anew from its weights: model.name_or_path = RUN_DIR/model"
        )


def publish(
    checkpoint: Path,
    identity: dict[str, Any],
    keep: int,
    settings: dict[str, Any] | None = None,
    losses: Mapping[int, float] | None = None,
) -> None:
    """Make `checkpoint`, of which every rank has written its part, the newest; keep `keep` and remove the others.
    `settings`: DeepSpeed's, which a resume holds its own against. `losses`: held-out ones by step, of which the
    checkpoint with the lowest, the first of equals, is kept as well and named by `best`.

    The manifest says that it is whole, and `latest`, replaced by a rename, comes after it: killed at any moment, a run
    resumes from a whole checkpoint. Later ones than this belong to a future that an older resume gave up. Raises
    OSError where they cannot be written.
    """
    files = {path.name: path.stat().st_size for path in sorted(checkpoint.glob("*.pt"))}
    manifest = {"files": files, "identity": identity} | ({"settings": settings} if settings else {})
    try:
        _write(checkpoint / MANIFEST, json.dumps(manifest, indent=2))
        _write(checkpoint.parent / "latest", checkpoint.name)
    except OSError as error:
        raise checkpoint_not_written(checkpoint, error) from error
    saved = _saved(checkpoint.parent)
    so_far = [path for path in saved if _step(path) <= _step(checkpoint)]
    kept = so_far[-keep:]
    judged = {path: loss for path in so_far if (loss := (losses or {}).get(_step(path), math.inf)) < math.inf}
    if judged:
        kept.append(min(judged, key=lambda path: judged[path]))
        _write(checkpoint.parent / BEST, kept[-1].name)
    else:
        (checkpoint.parent / BEST).unlink(missing_ok=True)
    for old in set(saved) - set(kept):
        shutil.rmtree(old)


def best_checkpoint(run_dir: str | Path) -> Path | None:
    """The one with the lowest held-out loss, where the run keeps it."""
    best = Path(run_dir, "checkpoints", BEST)
    return best.with_name(best.read_text()) if best.is_file() else None


def checkpoint_not_written(checkpoint: Path, error: Exception) -> NotWritten:
    """What to raise where a part of `checkpoint` could not be written."""
    before = (checkpoint.parent / "latest").is_file()
    return not_written(checkpoint, error, "The one before it is whole" if before else "")


OURS = frozenset(
    ("config.yaml", "checkpoints", "ledger", "tensorboard", "model", "summary.json", "benchmark.json", "plan.json",
     "fidelity.json", "fidelity.png", "report.html", "report.json", "mixture.jsonl")
)  # fmt: skip
"""What the commands write into a run directory."""


def refuse_foreign_run_dir(run_dir: Path) -> None:
    """Raises ValueError where `run_dir` holds something, and is no run directory of ours: it would be moved aside or
    mixed with a run. Hidden files do not count."""
    if run_dir.exists() and not run_dir.is_dir():
        raise ValueError(f"run_dir: {run_dir} is a file; choose another directory")
    found = [path.name for path in _visible(run_dir)]
    if not found or _is_run_config(run_dir / "config.yaml"):
        return
    if strangers := sorted(set(found) - OURS) or sorted({"config.yaml"} & set(found)):
        raise ValueError(
            f"run_dir: {run_dir} holds {', '.join(strangers[:5])} and no config.yaml of a run, so it was not made by "
            "an earlier run. Choose another run_dir, or empty this one"
        )


def move_aside(run_dir: Path) -> None:
    """Make room for a new run: nothing of an earlier one is deleted, or mixed into it.

    Raises ValueError where it is not a run directory, or another run lives inside it.
    """
    if _visible(run_dir):
        refuse_foreign_run_dir(run_dir)
        for lock in run_dir.rglob(".*.lock"):
            inside = lock.with_name(lock.name[1:].removesuffix(".lock"))
            if owner := owner_of(inside):
                raise ValueError(
                    f"run_dir: {run_dir} would be moved aside, and {inside} in it is in use by {owner}. Wait until it "
                    "is done, or choose another run_dir"
                )
        number = next(n for n in itertools.count(1) if not Path(f"{run_dir}.{n}").exists())
        run_dir.rename(f"{run_dir}.{number}")
        print(f"{run_dir} held an earlier run, moved to {run_dir}.{number} (--resume auto goes on)", flush=True)


def _visible(directory: Path) -> list[Path]:
    return [path for path in directory.glob("*") if not path.name.startswith(".")]


def _is_run_config(path: Path) -> bool:
    try:
        keys = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False
    return isinstance(keys, dict) and keys.keys() >= {"run_dir", "deepspeed_config", "model", "data"}


def _write(path: Path, text: str) -> None:
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    os.replace(new, path)


def _saved(directory: Path) -> list[Path]:
    """The checkpoints in a directory, oldest first: of exactly our names, so that copies that people make stay."""
    return sorted((path for path in directory.glob("step-*") if re.fullmatch(r"step-\d+", path.name)), key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))
