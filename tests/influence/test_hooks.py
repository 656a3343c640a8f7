import pytest
import torch
from torch import nn

from pipeline.influence.hooks import hooks


def test_they_see_what_the_forward_has_before_any_hook_of_another_hands_on_its_own():
    """Catches hooks behind the engine's, which under ZeRO-3 see other tensors and a weight that was given back."""
    model, seen = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), {}
    first, second = model

    def replace_input(_module, args):
        return (args[0] + 1,)

    def replace_output(_module, _args, output):
        return output + 1

    for module in model:
        module.register_forward_pre_hook(replace_input)
        module.register_forward_hook(replace_output)
    x = torch.zeros(2, 3)
    with hooks(
        before=[(first, lambda args: seen.update(before=args))],
        after=[(second, lambda args, output: seen.update(after=(args, output)))],
    ):
        y = model(x)
    assert seen["before"][0] is x
    args, output = seen["after"]
    assert torch.equal(output, nn.functional.linear(args[0], second.weight, second.bias))
    assert torch.equal(output + 1, y)


def test_they_change_nothing_and_live_as_long_as_the_with():
    """Also where it ends in an error."""
    layer, calls = nn.Linear(3, 3), []
    watching = {"before": [(layer, lambda args: calls.append(1))], "after": [(layer, lambda *_: calls.append(2))]}
    x = torch.ones(2, 3)
    expected = layer(x)
    with hooks(**watching):
        assert torch.equal(layer(x), expected)
    with pytest.raises(RuntimeError, match="boom"), hooks(**watching):
        raise RuntimeError("boom")
    layer(x)
    assert calls == [1, 2]
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks
