"""`CountSketch` of rows in one kernel: each number is read once, in its own precision, and nothing lies between.

The reference is `influence.sketch.CountSketch`, which says what is computed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.kernels.available import Hashing

ROWS, BUCKETS = 8, 256
"""What one program makes."""


@triton.jit(do_not_specialize=["rows", "offset", "times"])
def add_sketch_kernel(
    x,
    x_stride,
    signs,
    scale,
    out,
    times,
    rows,
    dim,
    width,
    offset,
    TURNS: tl.constexpr,
    SCALED: tl.constexpr,
    ADDED: tl.constexpr,
    ROWS: tl.constexpr,
    BUCKETS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    bucket = tl.program_id(1) * BUCKETS + tl.arange(0, BUCKETS)
    inside = (row < rows)[:, None] & (bucket < width)[None, :]
    start = x + row.to(tl.int64)[:, None] * x_stride
    total = tl.zeros((ROWS, BUCKETS), tl.float32)
    for turn in range(TURNS):
        place = turn * width + bucket - offset
        there = (bucket < width) & (place >= 0) & (place < dim)
        sign = tl.load(signs + place, there, 0.0)
        if SCALED:
            sign *= tl.load(scale + place, there, 0.0)
        total += tl.load(start + place[None, :], inside & there[None, :], 0.0).to(tl.float32) * sign[None, :]
    total *= times
    made = out + row.to(tl.int64)[:, None] * width + bucket[None, :]
    if ADDED:
        total += tl.load(made, inside, 0.0)
    tl.store(made, total, inside)


def add_sketch(x_ND: Tensor, hashing: Hashing, times: float = 1.0, out_NW: Tensor | None = None) -> Tensor:
    """`times` the sketch of every row, in float32, added to `out_NW` where that is given: (N, width)."""
    x_ND = x_ND if x_ND.stride(1) == 1 else x_ND.contiguous()
    (rows, dim), (signs_D, offset, width, scale_D) = x_ND.shape, hashing
    added = out_NW is not None
    out_NW = out_NW if out_NW is not None else x_ND.new_empty(rows, width, dtype=torch.float32)
    assert out_NW.is_contiguous()
    assert out_NW.dtype == torch.float32
    if rows:
        add_sketch_kernel[(triton.cdiv(rows, ROWS), triton.cdiv(width, BUCKETS))](
            x_ND,
            x_ND.stride(0),
            signs_D,
            signs_D if scale_D is None else scale_D.to(torch.float32).contiguous(),
            out_NW,
            times,
            rows,
            dim,
            width,
            offset,
            TURNS=triton.cdiv(dim + offset, width),
            SCALED=scale_D is not None,
            ADDED=added,
            ROWS=ROWS,
            BUCKETS=BUCKETS,
        )
    return out_NW
