"""What the kernels of this room can do, and what they are told: nothing here needs Triton."""

from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

_READ = (torch.float32, torch.bfloat16, torch.float16)


class Hashing(NamedTuple):
    """A count sketch: y[b] = sum over i with (i + offset) mod width = b of signs_i scale_i x_i."""

    signs_D: Tensor
    offset: int
    width: int
    scale_D: Tensor | None = None


def usable(tensor: Tensor) -> bool:
    """On a CUDA device, in a precision that kernels read, and Triton is there, which Linux builds of torch bring along.
    Everything works without it."""
    return tensor.is_cuda and tensor.dtype in _READ and _triton()


@cache
def _triton() -> bool:
    return find_spec("triton") is not None
