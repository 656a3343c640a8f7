"""Where tests reach into a running job: DeepSpeed's engine, whose methods every step goes through."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor


@contextmanager
def around_forward(change: Callable[[dict[str, Any], Any], Any]) -> Iterator[None]:
    """Inside, every forward of an engine returns what `change` makes of its arguments and its output."""
    original = DeepSpeedEngine.forward

    def forward(self: DeepSpeedEngine, *args: Any, **kwargs: Any) -> Any:
        return change(kwargs, original(self, *args, **kwargs))

    DeepSpeedEngine.forward = forward
    try:
        yield
    finally:
        DeepSpeedEngine.forward = original


@contextmanager
def before_backward(see: Callable[[Tensor], Any]) -> Iterator[None]:
    """Inside, `see` is shown every loss before the engine's backward of it."""
    original = DeepSpeedEngine.backward

    def backward(self: DeepSpeedEngine, loss: Tensor, *args: Any, **kwargs: Any) -> Any:
        see(loss)
        return original(self, loss, *args, **kwargs)

    DeepSpeedEngine.backward = backward
    try:
        yield
    finally:
        DeepSpeedEngine.backward = original


def on_rank(rank: int) -> bool:
    return torch.distributed.get_rank() == rank
