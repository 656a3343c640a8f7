"""The model as it is made, on real ranks."""

import json
from pathlib import Path

import deepspeed
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.config.schema import ModelConfig
from pipeline.models.load import check_attention, load_model, model_without_weights, small_twin
from tests.runs import config_of, deepspeed_json
from tests.tiny_models import save_tiny, tiny


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


@pytest.mark.parametrize("how", ["eager", "sdpa"])
def test_attention_is_computed_as_asked_wherever_a_model_is_made(tmp_path, how):
    config = ModelConfig(str(save_tiny("llama", tmp_path / "llama")), attn_implementation=how)
    file = tmp_path / "model.json"
    file.write_text(json.dumps(tiny("llama").config.to_dict()))
    check_attention(config)
    models = [load_model(config, 0), load_model(ModelConfig(str(file), attn_implementation=how), 0)]
    models += [model_without_weights(config, torch.float32), small_twin(config, models[0])]
    assert {model.config._attn_implementation for model in models} == {how}


@pytest.mark.parametrize(
    ("kind", "how", "why"),
    [
        ("llama", "flash_attention_2", "doesn't seem to be installed"),
        ("gpt_neo", "sdpa", "does not support an attention implementation"),
        ("llama", "nope", 'Specified `attn_implementation="nope"` is not supported'),
    ],
)
def test_attention_that_is_not_to_be_had_is_one_sentence_before_any_rank_meets(
    corpus, tmp_path, capsys, kind, how, why
):
    """Catches a traceback, and one that comes after a process group was waited for."""
    model = save_tiny(kind, tmp_path / kind)
    with pytest.raises(SystemExit):
        config_of(corpus, tmp_path / "run", model, deepspeed_json(tmp_path / "ds.json"), model__attn_implementation=how)
    [said] = [line for line in capsys.readouterr().err.splitlines() if "model.attn_implementation: " in line]
    assert f"'{how}' is not to be had for {model} here (" in said
    assert why in said
    assert said.endswith("; choose eager or sdpa, or leave it out")


@pytest.mark.parametrize("stored", ["float16", "bfloat16", "mixed"])
def test_weights_are_loaded_in_float32_whatever_they_are_stored_in(tmp_path, stored):
    """Catches weights, or some of them, that stay in 16 bits."""
    directory = save_tiny("llama", tmp_path / "llama")
    exact = dict(load_model(ModelConfig(str(directory)), 0).named_parameters())
    types = {name: torch.bfloat16 if stored == "mixed" else getattr(torch, stored) for name in exact}
    if stored == "mixed":
        types |= {name: torch.float32 for name in exact if "norm" in name}
    file = directory / "model.safetensors"
    save_file({name: w.to(types[name]) for name, w in load_file(file).items()}, file, {"format": "pt"})
    settings = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(
        json.dumps(settings | {"dtype": "bfloat16" if stored == "mixed" else stored})
    )
    for name, weight in load_model(ModelConfig(str(directory)), 0).named_parameters():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, exact[name].to(types[name]).float()), name
