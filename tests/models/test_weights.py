"""Weights that are not there are not made up, at any ZeRO stage; what is wrong with the files is one sentence."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.config.schema import ModelConfig
from pipeline.models.load import load_model
from tests.tiny_models import save_tiny

DEEPSPEED = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}


@pytest.fixture
def model(tmp_path) -> Path:
    return save_tiny("llama", tmp_path / "model")


def rewrite(model: Path, **changes: torch.Tensor | None) -> None:
    weights = load_file(model / "model.safetensors") | {name.replace("__", "."): new for name, new in changes.items()}
    save_file({n: w for n, w in weights.items() if w is not None}, model / "model.safetensors", {"format": "pt"})


DOWN = "model__layers__0__mlp__down_proj__weight"


def refusal(config: ModelConfig) -> str:
    """On a rank, under ZeRO-3."""
    try:
        load_model(config, 0, DEEPSPEED)
    except ValueError as error:
        return str(error)
    return "loaded"


def test_missing_weights_are_named_and_not_drawn_at_random(model, ranks, capsys):
    rewrite(model, **{DOWN: None})
    with pytest.raises(ValueError, match=r"missing, so random: model\.layers\.0\.mlp\.down_proj\.weight\. Give"):
        load_model(ModelConfig(str(model)), 0)
    for said in ranks(refusal, ModelConfig(str(model))):
        assert "missing, so random: model.layers.0.mlp.down_proj.weight" in said
    assert load_model(ModelConfig(str(model), allow_missing=True), 0)
    assert "model.layers.0.mlp.down_proj.weight (model.allow_missing)" in capsys.readouterr().out


def test_weights_without_a_place_are_named_at_every_zero_stage(model, ranks):
    """Catches a loading that says nothing of them where it partitions."""
    rewrite(model, score__weight=torch.zeros(2, 16))
    for said in [refusal_here(model), *ranks(refusal, ModelConfig(str(model)))]:
        assert "without a place in the model: score.weight" in said


def refusal_here(model: Path) -> str:
    with pytest.raises(ValueError, match=r"model\.name_or_path") as raised:
        load_model(ModelConfig(str(model)), 0)
    return str(raised.value)


def test_other_shapes_are_one_sentence_on_every_rank(model, ranks):
    rewrite(model, **{DOWN: torch.zeros(5, 5)})
    for said in [refusal_here(model), *ranks(refusal, ModelConfig(str(model)))]:
        assert "have other shapes than its config.json says" in said


@pytest.mark.parametrize("kind", ["gpt_neo", "gpt2", "llama_tied"])
def test_a_head_that_is_tied_is_not_missing(tmp_path, kind):
    directory = save_tiny(kind, tmp_path / kind)
    assert "lm_head.weight" not in load_file(directory / "model.safetensors")
    assert load_model(ModelConfig(str(directory)), 0)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("damage", ["pointer", "cut", "empty", "garbage"])
def test_weights_that_cannot_be_read_are_one_sentence(model, name, damage):
    path = model / name
    if name.endswith(".bin"):
        torch.save(load_file(model / "model.safetensors"), path)
        os.remove(model / "model.safetensors")
    whole = path.read_bytes()
    path.write_bytes(
        {
            "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n",
            "cut": whole[:-100],
            "empty": b"",
            "garbage": b"x" * 1000,
        }[damage]
    )
    said = refusal_here(model)
    assert "git lfs pull" in said if damage == "pointer" else "cut" in said
    assert "\n" not in said
