"""Compiled models, whose layers cannot be watched."""

from torch import nn
from torch._dynamo import OptimizedModule


def refuse_compiled(model: nn.Module) -> None:
    """Raises ValueError where the model, or a part of it, is compiled (`torch.compile`, `module.compile()`,
    `engine.compile()`): a hook in a compiled graph breaks it at every layer, and one that came after the graph was made
    is not called at all, so that the layer is missing from the scores."""
    for name, module in model.named_modules():
        if isinstance(module, OptimizedModule) or module._compiled_call_impl is not None:
            raise ValueError(
                f"the model is compiled{f' at {name}' if name else ''}, and the hooks that watch its layers do not go "
                "with torch.compile: hand it over as it was before, and call neither torch.compile nor engine.compile()"
            )
