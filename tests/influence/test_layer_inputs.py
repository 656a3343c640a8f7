import pytest
import torch

from pipeline.influence.layer_inputs import LayerInputs
from pipeline.models.layers import layers_of
from tests.tiny_models import VOCABULARY, tiny

CPU = torch.device("cpu")
IDS = torch.randint(0, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(0))


def inputs_by_hand(model):
    """The input of every layer, each module for itself."""
    seen = {}
    hooks = [
        layer.module.register_forward_hook(lambda _m, args, _o, name=name: seen.update({name: args[0].flatten(0, 1)}))
        for name, layer in layers_of(model).linear.items()
    ]
    with torch.no_grad():
        model(input_ids=IDS)
    for hook in hooks:
        hook.remove()
    return seen


def watched(model, width=None, seed=0, norms=False):
    """What was seen of one forward, and its logits."""
    watch = LayerInputs(layers_of(model).linear, width, seed, CPU).watch(norms)
    with watch:
        logits = model(input_ids=IDS).logits
    return watch, logits


@pytest.mark.parametrize("kind", ["gpt_neo", "gpt2", "llama"])
def test_exact_inputs_count_every_module_that_reads_them(kind):
    """Catches a shared q, k, v input that counts once, or sqrt(3) times, instead of three times."""
    model = tiny(kind)
    inputs = watched(model)[0].take(IDS.numel())
    expected = sum(x @ x.T for x in inputs_by_hand(model).values())
    torch.testing.assert_close(inputs @ inputs.T, expected)


@pytest.mark.parametrize("kind", ["gpt_neo", "llama"])
def test_layers_with_scales_of_their_own_share_nothing(kind):
    """Catches q's scale on what k and v read, too."""
    model = tiny(kind)
    seen = inputs_by_hand(model)
    how = LayerInputs(layers_of(model).linear, None, 0, CPU)
    how.scales = {name: torch.rand(x.shape[1]) + 0.5 for name, x in seen.items()}
    with how.watch() as watch:
        model(input_ids=IDS)
    inputs = watch.take(IDS.numel())
    expected = sum((x * how.scales[name]) @ (x * how.scales[name]).T for name, x in seen.items())
    torch.testing.assert_close(inputs @ inputs.T, expected)


def test_sketched_inputs_estimate_the_exact_ones():
    """Catches layers that share one sketch: their cross terms would not cancel."""
    model = tiny("llama")
    expected = sum(x @ x.T for x in inputs_by_hand(model).values())
    estimates = []
    for seed in range(300):
        with torch.no_grad():
            inputs = watched(model, 32, seed)[0].take(IDS.numel())
        estimates.append(inputs @ inputs.T)
    estimates = torch.stack(estimates)
    error = estimates.std(0) / len(estimates) ** 0.5
    assert ((estimates.mean(0) - expected).abs() < 5 * error).all()


def test_recomputation_under_activation_checkpointing_is_not_recorded_again():
    model = tiny("llama").train()
    plain = watched(model, 32)[0].take(IDS.numel())
    model.activation_checkpointing_enable({"use_reentrant": False})
    first, logits = watched(model, 32)
    second, others = watched(model, 32)
    inputs = first.take(IDS.numel())
    before = inputs.clone()
    logits.sum().backward()
    others.sum().backward()
    assert torch.equal(inputs, before)
    torch.testing.assert_close(inputs, plain)
    # Nor where the backward comes before the inputs are taken.
    torch.testing.assert_close(second.take(IDS.numel()), plain)


def test_nothing_is_left_on_the_model_even_after_an_error():
    model = tiny("llama")
    inputs = LayerInputs(layers_of(model).linear, None, 0, CPU)
    with pytest.raises(RuntimeError, match="boom"), inputs.watch():
        raise RuntimeError("boom")
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_each_forward_has_a_watch_of_its_own_that_is_taken_once():
    """Catches inputs of one micro-batch that are those of another."""
    model = tiny("llama")
    how = LayerInputs(layers_of(model).linear, 32, 0, CPU)
    first, second = how.watch(), how.watch()
    with first:
        model(input_ids=IDS)
    with second:
        model(input_ids=IDS.flip(0))
    taken = first.take(IDS.numel())
    torch.testing.assert_close(second.take(IDS.numel()), taken.unflatten(0, IDS.shape).flip(0).flatten(0, 1))
    with pytest.raises(AssertionError):
        first.take(IDS.numel())


def test_norms_are_root_mean_squares_over_tokens_where_they_are_asked_for():
    model = tiny("llama")
    norms = watched(model, norms=True)[0].norms
    seen = inputs_by_hand(model)
    assert norms.keys() == seen.keys()
    for name, x in seen.items():
        torch.testing.assert_close(norms[name], x.square().sum(1).mean().sqrt())
    assert watched(model)[0].norms == {}
