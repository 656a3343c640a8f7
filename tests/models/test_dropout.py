"""Every dropout of a model is found and set, wherever it is read."""

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from pipeline.config.schema import ModelConfig
from pipeline.models.dropout import dropout_rates, noisy_forward, set_dropout
from pipeline.models.load import load_model
from tests.models.architectures import batch_of
from tests.models.tiny_configs import tiny_config
from tests.tiny_models import save_tiny

MODULES = ["gpt2", "gpt_neo", "gptj", "bloom", "gpt_neox", "falcon", "phi", "bert"]
ATTRIBUTES = ["llama", "opt", "mistral", "qwen2", "olmo", "cohere", "xglm", "bart", "moshi", "trocr"]
"""Rates that modules keep as numbers, or read from the config in the forward."""


def model_of(kind: str) -> nn.Module:
    torch.manual_seed(7)
    return AutoModelForCausalLM.from_config(tiny_config(kind)).train()


def logits(model: nn.Module, seed: int) -> Tensor:
    torch.manual_seed(seed)
    with torch.no_grad():
        return model(input_ids=batch_of().input_ids_BT, use_cache=False).logits


@pytest.mark.parametrize("kind", [*MODULES, *ATTRIBUTES])
def test_no_forward_is_noisy_at_rate_0_and_every_one_is_above(kind):
    """Catches a rate that is copied out of the config where a model is made, or read from it in the forward."""
    model = model_of(kind)
    set_dropout(model, 0.5)
    assert not torch.equal(logits(model, 1), logits(model, 2))
    assert set(dropout_rates(model).values()) == {0.5}
    set_dropout(model, 0.0)
    assert torch.equal(logits(model, 1), logits(model, 2))
    assert not dropout_rates(model)
    assert noisy_forward(model) == ""


def test_rates_are_named_and_layers_are_left_out_at_none_but_their_own():
    model = model_of("opt")
    model.model.decoder.layerdrop = 0.25
    set_dropout(model, 0.5)
    assert dropout_rates(model)["layerdrop"] == 0.25
    assert "layerdrop 0.25" in noisy_forward(model)
    set_dropout(model, 0.0)
    assert not dropout_rates(model)


def test_the_key_sets_the_rates_and_none_leaves_the_models_own(tmp_path):
    directory = str(save_tiny("gpt_neo_with_dropout", tmp_path / "model"))
    assert set(dropout_rates(load_model(ModelConfig(directory), 0)).values()) == {0.1}
    assert not dropout_rates(load_model(ModelConfig(directory, dropout=0.0), 0))
    assert set(dropout_rates(load_model(ModelConfig(directory, dropout=0.3), 0)).values()) == {0.3}
    with pytest.raises(ValueError, match=r"model\.dropout"):
        ModelConfig(directory, dropout=1.5)
