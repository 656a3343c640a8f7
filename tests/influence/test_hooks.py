import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from pipeline.influence.hooks import LayerInputs
from pipeline.models.heads import head_layer
from pipeline.models.layers import linear_layers
from tests.tiny_models import VOCABULARY, tiny

IDS = torch.randint(0, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(0))


def inputs_by_hand(model, layers):
    """The input of every layer, each module for itself."""
    seen = {}
    hooks = [
        layer.register_forward_hook(lambda _m, args, _o, name=name: seen.update({name: args[0].flatten(0, 1)}))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        model(input_ids=IDS)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("kind", ["gpt_neo", "gpt2", "llama"])
def test_exact_keys_count_every_module_that_reads_an_input(kind):
    """Catches a shared q, k, v input that counts once, or sqrt(3) times, instead of three times."""
    model = tiny(kind)
    layers = linear_layers(model)
    inputs = LayerInputs(layers, None, seed=0, device=torch.device("cpu"))
    with inputs:
        model(input_ids=IDS)
    keys = inputs.take_keys()
    expected = sum(x @ x.T for x in inputs_by_hand(model, layers).values())
    torch.testing.assert_close(keys @ keys.T, expected)


def test_fused_layers_count_once_and_conv1d_is_a_layer():
    layers = linear_layers(tiny("gpt2"))
    assert sum(isinstance(layer, Conv1D) for layer in layers.values()) == 8
    assert "lm_head" in layers


def test_sketched_keys_estimate_the_exact_ones():
    """Catches layers that share one sketch: their cross terms would not cancel."""
    model = tiny("llama")
    layers = linear_layers(model)
    expected = sum(x @ x.T for x in inputs_by_hand(model, layers).values())
    estimates = []
    for seed in range(300):
        inputs = LayerInputs(layers, 32, seed=seed, device=torch.device("cpu"))
        with inputs, torch.no_grad():
            model(input_ids=IDS)
        keys = inputs.take_keys()
        estimates.append(keys @ keys.T)
    estimates = torch.stack(estimates)
    error = estimates.std(0) / len(estimates) ** 0.5
    assert ((estimates.mean(0) - expected).abs() < 5 * error).all()


def test_recomputation_under_activation_checkpointing_is_not_recorded_again():
    model = tiny("llama").train()
    plain = LayerInputs(linear_layers(model), 32, seed=0, device=torch.device("cpu"))
    with plain:
        model(input_ids=IDS)
    model.activation_checkpointing_enable({"use_reentrant": False})
    checkpointed = LayerInputs(linear_layers(model), 32, seed=0, device=torch.device("cpu"))
    with checkpointed:
        logits = model(input_ids=IDS).logits
    keys = checkpointed.take_keys()
    before = keys.clone()
    logits.sum().backward()
    assert torch.equal(keys, before)
    torch.testing.assert_close(keys, plain.take_keys())


def test_nothing_is_left_on_the_model_even_after_an_error():
    model = tiny("llama")
    inputs = LayerInputs(linear_layers(model), None, seed=0, device=torch.device("cpu"))
    with pytest.raises(RuntimeError, match="boom"), inputs:
        raise RuntimeError("boom")
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_norms_are_root_mean_squares_over_tokens():
    model = tiny("llama")
    layers = linear_layers(model)
    inputs = LayerInputs(layers, None, seed=0, device=torch.device("cpu"))
    with inputs:
        model(input_ids=IDS)
    for name, x in inputs_by_hand(model, layers).items():
        torch.testing.assert_close(inputs.norms()[name], x.square().sum(1).mean().sqrt())


def test_head_layer_is_the_lm_head_alone():
    model = tiny("gpt_neo")
    assert head_layer(model) == ("lm_head", model.lm_head)
    headless = nn.Module()
    headless.get_output_embeddings = lambda: None  # type: ignore[assignment]
    with pytest.raises(ValueError, match="no linear LM head"):
        head_layer(headless)
