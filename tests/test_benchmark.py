"""What the benchmark counts, on tiny models: no timed assertion anywhere."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.benchmark import RandomTokens, measure, run, variants
from tests.runs import ADAM, config_of, deepspeed_json

CPU = torch.device("cpu")


def bench(tmp_path: Path, model: Path, stage: int = 1, micro: int = 2, accumulation: int = 1, **options: Any):
    """The config of two measured pairs; nothing of the corpus exists."""
    ds = deepspeed_json(tmp_path / f"ds{micro}{accumulation}.json", stage, micro, accumulation, optimizer=ADAM)
    options = {"benchmark__pairs": 2, "benchmark__warmup": 1, "influence__sketch__inputs": 8} | options
    return config_of(tmp_path / "none", tmp_path / "run", model, ds, **{"influence__sketch__gradients": 32, **options})


def test_both_ranks(ranks, tiny_model, tmp_path):
    found, _ = ranks(run, bench(tmp_path, tiny_model("gpt_neo")))
    print(json.dumps(found, indent=1))
