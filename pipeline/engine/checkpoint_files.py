"""What is inside DeepSpeed's checkpoints, of any ZeRO stage and world size: read without an engine."""

import math
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.engine import checkpoint_files
from pipeline.engine.checkpoints import identity_of

MOMENTS = ("exp_avg", "exp_avg_sq")


def _convert(checkpoint: Path) -> tuple[Path | None, str]:
    """The converted checkpoint, or what went wrong."""
    try:
        # A name of its own: several runs may go on from one checkpoint at the same time. What a killed one leaves there
        # is removed with the checkpoint.
        directory = Path(tempfile.mkdtemp(prefix="universal-", dir=checkpoint))
        # Links, because DeepSpeed would look into all folders below; relative names, because it takes its output
        # folder's for a regular expression.
        (directory / "parts").mkdir()
        for part in checkpoint.glob("*.pt"):
            (directory / "parts" / part.name).symlink_to(Path("..", "..", part.name))
        command = [sys.executable, "-P", "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
        folders = ["--input_folder", "parts", "--output_folder", "whole"]
        done = subprocess.run([*command, *folders], cwd=directory, capture_output=True, text=True)
    except OSError as error:
        return None, str(error)
    if done.returncode:
        shutil.rmtree(directory, ignore_errors=True)
        return None, "\n".join(done.stderr.splitlines()[-5:])
    return directory / "whole", ""


def checkpoint_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The weights in a checkpoint of any ZeRO stage and world size, on the CPU: in float32 where ZeRO kept them so.

    DeepSpeed unpickles checkpoints in full: load only what you trust.
    """
    whole = checkpoint / "mp_rank_00_model_states.pt"
    if not list(checkpoint.glob("*optim_states.pt")):
        return torch.load(whole, map_location="cpu", weights_only=False)["module"]
    weights = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    # Frozen weights, which ZeRO 1 keeps nowhere else.
    if left := set(identity_of(checkpoint)["engine"].get("frozen", [])) - weights.keys():
        module = torch.load(whole, map_location="cpu", weights_only=False)["module"]
        weights |= {name: module[name] for name in left}
    return weights


def checkpoint_adam(checkpoint: Path) -> dict[str, dict[str, Tensor]] | None:
    """Adam's state of what is trained in a checkpoint of any ZeRO stage and world size, on the CPU; None under another
    optimizer.

    {parameter: {"exp_avg", "exp_avg_sq": in the parameter's shape, "step": updates so far}}. From ZeRO 1 on DeepSpeed
    converts a copy inside of `checkpoint`, removed afterwards. Raises ValueError where that fails.

    DeepSpeed unpickles checkpoints in full: load only what you trust.
    """
    saved = identity_of(checkpoint)["engine"]
    if saved["optimizer"] not in ("adam", "adamw"):
        return None
    shapes = {name: shape for name, shape in saved["parameters"].items() if name not in saved.get("frozen", [])}
    optimizer = _saved_optimizer(checkpoint)
    step = _updates(optimizer)
    if not list(checkpoint.glob("*optim_states.pt")):
        sizes = [math.prod(shape) for shape in shapes.values()]
        # In the parameters' order: one state for each, or (bf16 and fp16) one flat state for all.
        flat = {key: torch.cat([state[key].flatten() for state in optimizer["state"].values()]) for key in MOMENTS}
        parts = {key: dict(zip(shapes, whole.split(sizes), strict=True)) for key, whole in flat.items()}
        return {
            name: {key: parts[key][name].view(shape) for key in MOMENTS} | {"step": step}
            for name, shape in shapes.items()
        }
    converted, trouble = _convert(checkpoint)
    if converted is None:
        raise ValueError(f"{checkpoint}: Adam's moments could not be put together: {trouble}")
    try:
        return {
            name: {key: _whole(converted / "zero" / name / f"{key}.pt").view(shape) for key in MOMENTS} | {"step": step}
            for name, shape in shapes.items()
        }
    finally:
        shutil.rmtree(converted.parent)


def checkpoint_evaluations(checkpoint: Path) -> dict[int, dict[str, Any]]:
    """Held-out figures of the run so far, by optimizer step (`Progress`).

    DeepSpeed unpickles checkpoints in full: load only what you trust.
    """
    path = next(checkpoint.glob("*mp_rank_00_model_states.pt"))
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)["evaluations"]


def checkpoint_learning_rate(checkpoint: Path) -> float:
    """The learning rate of the step that comes next: schedulers set it at the end of the step before.

    DeepSpeed unpickles checkpoints in full: load only what you trust.
    """
    return float(_saved_optimizer(checkpoint)["param_groups"][0]["lr"])


def _saved_optimizer(checkpoint: Path) -> dict[str, Any]:
    """What the optimizer itself saved; from ZeRO 1 on rank 0's part."""
    parts = sorted(checkpoint.glob("*optim_states.pt"))
    if not parts:
        whole = torch.load(checkpoint / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)
        saved = whole["optimizer"]
        return saved.get("optimizer_state_dict", saved)  # around it in bf16 and fp16: DeepSpeed's own
    zero = torch.load(parts[0], map_location="cpu", weights_only=False)["optimizer_state_dict"]
    return zero["base_optimizer_state"] if "base_optimizer_state" in zero else zero["optimizer_state_dict"]


def _whole(path: Path) -> Tensor:
    """A parameter's state in DeepSpeed's universal form; ZeRO-3's is the bare tensor, flat."""
    saved = torch.load(path, map_location="cpu", weights_only=False)
    return saved["param"] if isinstance(saved, dict) else saved


def _updates(optimizer: dict[str, Any]) -> Tensor:
    """Adam's step count, which some implementations keep once a group."""
    state, group = next(iter(optimizer["state"].values())), optimizer["param_groups"][0]
    return torch.as_tensor(state.get("step", group.get("step")))


def checkpoint_position(checkpoint: Path) -> int:
    """The position in the sample order at which the run goes on from `checkpoint`."""
    path = next(checkpoint.glob("*mp_rank_00_model_states.pt"))
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)["influence"]["position"]


def load_weights(model: PreTrainedModel, checkpoint: Path) -> None:
    """Raises ValueError where the weights in `checkpoint` are not this model's; tied ones may be there once."""
    weights = checkpoint_files.checkpoint_weights(checkpoint)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    named = dict(model.named_parameters(remove_duplicate=False))
    loaded = {id(parameter) for name, parameter in named.items() if name in weights}
    left = [name for name in missing if name not in named or id(named[name]) not in loaded] + unexpected
    if left:
        raise ValueError(
            f"{checkpoint} is of another model than {model.name_or_path}; they differ in {left[:5]}. Name the one that "
            "it was trained from in model.name_or_path, or another checkpoint"
        )
