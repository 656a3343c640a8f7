"""Forward hooks that live exactly as long as a `with`, in front of the engine's own.

The one owner of hook order: under ZeRO-3 the engine's hooks gather a weight before a module runs and give it back
after, and hand every module tensor objects of their own. What is registered here sees the forward's own tensors and,
after the module, its weight whole. Nothing is kept on a module.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

Before = Callable[[tuple[Any, ...]], None]
"""Takes the arguments of a module's forward."""
After = Callable[[tuple[Any, ...], Any], None]
"""Takes them and the output."""


@contextmanager
def hooks(
    before: Iterable[tuple[nn.Module, Before]] = (), after: Iterable[tuple[nn.Module, After]] = ()
) -> Iterator[None]:
    """Inside, every forward of these modules calls these functions. None of them changes anything."""

    def as_pre_hook(function: Before) -> Callable[..., None]:
        return lambda _module, args: function(args)

    def as_hook(function: After) -> Callable[..., None]:
        return lambda _module, args, output: function(args, output)

    handles = [module.register_forward_pre_hook(as_pre_hook(call), prepend=True) for module, call in before]
    handles += [module.register_forward_hook(as_hook(call), prepend=True) for module, call in after]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
