"""What messages about models tell a user to do, done: the refusal, then each remedy."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.config.schema import ModelConfig
from pipeline.influence.check_model import check_model, refuse_seeing_ahead
from pipeline.models.dropout import refuse_dropout
from pipeline.models.load import load_model
from tests.models.architectures import tiny_model
from tests.tiny_models import save_tiny, tiny

F32 = torch.float32


def refused(message: str, function: Callable[..., Any], *arguments: Any) -> None:
    with pytest.raises(ValueError, match=message):
        function(*arguments)


def test_weights_and_configs(tmp_path):
    directory = save_tiny("llama", tmp_path / "model")
    weights, settings = directory / "model.safetensors", directory / "config.json"
    whole, own = weights.read_bytes(), settings.read_text()
    load: Callable[[], Any] = lambda: load_model(ModelConfig(str(directory)), 0)  # noqa: E731
    for content, message in {
        b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n": "Fetch it with .*git lfs pull",
        whole[:-100]: "are cut or corrupt .*; fetch them again",
    }.items():
        weights.write_bytes(content)
        refused(message, load)
    weights.write_bytes(whole)
    assert load()

    settings.write_text(json.dumps(json.loads(own) | {"intermediate_size": 99}))
    refused("have other shapes .*; give the config that belongs to them", load)
    settings.write_text(own)
    assert load()

    tensors = load_file(weights)
    del tensors["model.norm.weight"]
    save_file(tensors, weights, {"format": "pt"})
    refused("Give the whole checkpoint of a causal LM; where it is meant, set model.allow_missing to true", load)
    assert load_model(ModelConfig(str(directory), allow_missing=True), 0)
    weights.write_bytes(whole)
    assert load()

    named = ModelConfig(str(tmp_path / "none"))
    refused("give a hub id, a directory with weights, or a model config", load_model, named, 0)
    assert load_model(ModelConfig(str(settings.rename(tmp_path / "config.json"))), 0)


def test_dropout_can_be_set_to_0(tmp_path):
    directory = str(save_tiny("gpt_neo_with_dropout", tmp_path / "model"))
    refused(
        "Set model.dropout to 0, or policy.action to observe", refuse_dropout, load_model(ModelConfig(directory), 0)
    )
    refuse_dropout(load_model(ModelConfig(directory, dropout=0.0), 0))


def test_an_encoder_needs_is_decoder_true():
    refused("needs is_decoder true in its config.json", refuse_seeing_ahead, tiny_model("bert, is_decoder false", F32))
    refuse_seeing_ahead(tiny_model("bert", F32))


def test_a_gradient_that_ghost_does_not_see_is_named_with_what_to_choose():
    """A weight that a module uses in a way of its own. (That the other estimators run: the table of architectures.)"""
    model = tiny("llama")
    layer = model.model.layers[0].mlp.down_proj
    forward = layer.forward
    layer.forward = lambda hidden: forward(hidden) + 0.5 * torch.nn.functional.linear(hidden.flip(1), layer.weight)
    refused(r"down_proj.weight \(.*% off\).*choose lai, residual or lli, or, to score all", check_model, model)
    layer.forward = forward
    check_model(model)
