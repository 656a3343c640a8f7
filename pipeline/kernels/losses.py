"""Cross-entropy, its gradient, and that gradient's sketch, from one reading of the logits.

The reference is `tasks.causal_lm`, which says what is computed. Softmax is never written down: the forward reads the
logits once and the backward puts the gradient in their place.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.kernels.available import Hashing

HELD = 8192
"""Buckets of all rows that a program makes the sketches of: 32 registers a thread."""
BLOCK = 2048
"""Logits of a row at once, where there is no sketch."""


@triton.jit(do_not_specialize=["rows", "offset"])
def losses_kernel(
    logits,
    stride,
    labels,
    signs,
    scale,
    lse,
    losses,
    sketch,
    rows,
    vocabulary,
    width,
    offset,
    ignore,
    TURNS: tl.constexpr,
    SKETCHED: tl.constexpr,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    BUCKETS: tl.constexpr,
):
    """`width` logits of a row at a time, from `offset` places before its first. As in flash attention, what is summed
    is relative to the largest logit so far."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    bucket = tl.arange(0, BUCKETS)
    label = tl.load(labels + row, exists, ignore)
    labelled = label != ignore
    target = tl.where(labelled, label, 0)
    start = logits + row.to(tl.int64) * stride
    largest = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    if SKETCHED:
        hashed = tl.zeros((ROWS, BUCKETS), tl.float32)
    for turn in range(TURNS):
        place = turn * width + bucket - offset
        there = (bucket < width) & (place >= 0) & (place < vocabulary)
        mask = exists[:, None] & there[None, :]
        logit = tl.load(start[:, None] + place[None, :], mask, float("-inf")).to(tl.float32)
        now = tl.maximum(largest, tl.max(logit, 1))
        shrunk = tl.exp(largest - now)
        part = tl.exp(logit - now[:, None])
        total = total * shrunk + tl.sum(part, 1)
        largest = now
        if SKETCHED:
            sign = tl.load(signs + place, there, 0.0)
            if SCALED:
                sign *= tl.load(scale + place, there, 0.0)
            hashed = hashed * shrunk[:, None] + part * sign[None, :]
    log_sum = largest + tl.log(total)
    own = tl.load(start + target, exists, 0.0).to(tl.float32)
    tl.store(lse + row, log_sum, exists)
    tl.store(losses + row, tl.where(labelled, log_sum - own, 0.0), exists)
    if SKETCHED:
        sign = tl.load(signs + target)
        if SCALED:
            sign *= tl.load(scale + target)
        hit = bucket[None, :] == ((target + offset) % width)[:, None]
        gradient = hashed / total[:, None] - tl.where(hit, sign[:, None], 0.0)
        made = sketch + row.to(tl.int64)[:, None] * width + bucket[None, :]
        tl.store(made, tl.where(labelled[:, None], gradient, 0.0), exists[:, None] & (bucket < width)[None, :])


def losses_and_sketch(
    logits_NV: Tensor, labels_N: Tensor, ignore: int, hashing: Hashing | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss and logsumexp of every row and, with `hashing`, the sketch of softmax - onehot, (N, width); loss and sketch
    are 0 where the label is `ignore`. All in float32."""
    rows, vocabulary = logits_NV.shape
    assert logits_NV.stride(1) == 1
    lse_N, losses_N = (logits_NV.new_empty(rows, dtype=torch.float32) for _ in range(2))
    nothing = lse_N
    signs_V, offset, width, scale_V = hashing or Hashing(nothing, 0, BLOCK)
    sketch_NW = logits_NV.new_empty(rows, width, dtype=torch.float32) if hashing else None
    buckets = triton.next_power_of_2(width)
    at_once = max(1, HELD // buckets) if hashing else 1
    if rows:
        losses_kernel[(triton.cdiv(rows, at_once),)](
            logits_NV,
            logits_NV.stride(0),
            labels_N,
            signs_V,
            nothing if scale_V is None else scale_V.to(torch.float32).contiguous(),
            lse_N,
            losses_N,
            nothing if sketch_NW is None else sketch_NW,
            rows,
            vocabulary,
            width,
            offset,
            ignore,
            TURNS=triton.cdiv(vocabulary + offset, width),
            SKETCHED=hashing is not None,
            SCALED=scale_V is not None,
            ROWS=at_once,
            BUCKETS=buckets,
            num_warps=8,
        )
    return losses_N, lse_N, sketch_NW


@triton.jit(do_not_specialize=["vocabulary"])
def gradient_kernel(logits, stride, labels, lse, factors, vocabulary, ignore, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = place < vocabulary
    label = tl.load(labels + row)
    factor = tl.where(label != ignore, tl.load(factors + row), 0.0)
    at = logits + row.to(tl.int64) * stride + place
    softmax = tl.exp(tl.load(at, mask, 0.0).to(tl.float32) - tl.load(lse + row))
    gradient = (softmax - tl.where(place == label, 1.0, 0.0)) * factor
    tl.store(at, tl.where(label != ignore, gradient, 0.0).to(logits.dtype.element_ty), mask)


def to_gradient(logits_NV: Tensor, labels_N: Tensor, ignore: int, lse_N: Tensor, factors_N: Tensor) -> None:
    """In place: logits become (softmax - onehot) times each row's factor; 0 where the label is `ignore`."""
    rows, vocabulary = logits_NV.shape
    if rows:
        gradient_kernel[(rows, triton.cdiv(vocabulary, BLOCK))](
            logits_NV,
            logits_NV.stride(0),
            labels_N,
            lse_N,
            factors_N.to(torch.float32).contiguous(),
            vocabulary,
            ignore,
            BLOCK=BLOCK,
            num_warps=8,
        )
