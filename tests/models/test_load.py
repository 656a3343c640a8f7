"""The model as it is made, on real ranks."""

import json
from pathlib import Path

import deepspeed
import pytest
import torch

from pipeline.config.schema import ModelConfig
from pipeline.models.load import load_model
from tests.tiny_models import tiny


def weights_from_scratch(file: Path, seed: int, stage: int) -> dict[str, torch.Tensor]:
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}}
    model = load_model(ModelConfig(str(file)), seed, settings)
    found = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            found[name] = parameter.detach().clone()
    return found


@pytest.mark.parametrize("kind", ["gpt_neo", "gpt2", "llama"])
def test_a_model_from_scratch_is_the_same_at_every_zero_stage(ranks, tmp_path, kind):
    """Catches draws that torch makes for each module at its construction, which ZeRO-3 leaves out."""
    file = tmp_path / "model.json"
    file.write_text(json.dumps(tiny(kind).config.to_dict()))
    whole, other = ranks(weights_from_scratch, file, 5, 0)
    for name, weight in ranks(weights_from_scratch, file, 5, 3)[1].items():
        assert torch.equal(weight, whole[name]), name
        assert torch.equal(weight, other[name]), name
    seeded_otherwise, _ = ranks(weights_from_scratch, file, 6, 0)
    for name, weight in whole.items():
        if weight.dim() > 1:
            assert 0.005 < float(weight.std()) < 0.05
            assert not torch.equal(weight, seeded_otherwise[name])
