"""Logits -> per-token loss and its analytic gradient. Pure tensors, no ranks."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from pipeline.data.batch import IGNORE
from pipeline.kernels.available import Hashing, usable

_CHUNK_BYTES = 64 * 2**20


_CHUNK_BYTES_CPU = 16 * 2**20
"""Smaller, because the C library maps larger blocks anew each time, and fresh pages cost more than the sums on them."""


Visitor = Callable[[Tensor, Tensor], Tensor]
"""Takes the logit gradients of a chunk of tokens, (n, V) float32, its to overwrite, and which of them have a label,
(n,): the other rows mean nothing. Returns what to keep, (n, G), in which those rows are then set to 0."""


@dataclass(frozen=True)
class SketchVisitor:
    """A visitor that makes nothing but a count sketch, which a kernel can make without the gradients."""

    visit: Visitor
    hashing: Hashing

    def __call__(self, gradient_nV: Tensor, labelled_n: Tensor) -> Tensor:
        return self.visit(gradient_nV, labelled_n)


def token_losses(logits_BTV: Tensor, labels_BT: Tensor, visit: Visitor | None = None) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy of every position, in nats, and what `visit` makes of its gradient with respect to the logits.

    loss_t = logsumexp(logits_t) - logits_t[label_t], and g_t = softmax(logits_t) - onehot(label_t), which needs no
    backward. Where the label is IGNORE both are 0. Softmax exists for one chunk of tokens at a time, formed once in the
    forward, for loss and gradient both, and once in the backward, so no second (B, T, V) tensor is kept and logits in
    16 bits are never whole in float32.

    On a CUDA device a kernel reads the logits once for losses and sketch (`visit` a `SketchVisitor`, or none), and the
    backward writes the gradient over the logits: a second backward, or one of an operation that kept them, raises.

    Returns (losses_BT, feedback_NG): losses in float32 (float64 for float64 logits), attached to the graph; feedback
    for the N = B T positions in order, detached, or None without `visit`.
    """
    labels_N = labels_BT.flatten()
    fused = usable(logits_BTV) and (visit is None or isinstance(visit, SketchVisitor))
    chosen = _FusedTokenLosses if fused else _TokenLosses
    losses_N, feedback_NG = chosen.apply(logits_BTV.flatten(0, 1), labels_N, visit)
    return losses_N.view_as(labels_BT), feedback_NG


class _TokenLosses(torch.autograd.Function):
    """Per-token cross-entropy over (N, V) logits, chunk by chunk."""

    @staticmethod
    def forward(ctx, logits_NV: Tensor, labels_N: Tensor, visit: Visitor | None):
        losses, kept = [], []
        for logits_nV, labels_n in _chunks(logits_NV, labels_N):
            labelled_n = labels_n != IGNORE
            target_n1 = labels_n.where(labelled_n, 0).unsqueeze(1)
            softmax_nV = _softmax(logits_nV)
            # The largest softmax is 1 / (sum of exp(logit - largest logit)).
            lse_n = logits_nV.amax(1) - softmax_nV.amax(1).log()
            losses.append((lse_n - logits_nV.gather(1, target_n1).squeeze(1)) * labelled_n)
            if visit is not None:
                kept.append(visit(_less_onehot(softmax_nV, target_n1), labelled_n).mul_(labelled_n[:, None]))
        ctx.save_for_backward(logits_NV, labels_N)
        if visit is None:
            return torch.cat(losses), None
        feedback_NG = torch.cat(kept)
        ctx.mark_non_differentiable(feedback_NG)
        return torch.cat(losses), feedback_NG

    @staticmethod
    def backward(ctx, grad_N: Tensor, _):
        logits_NV, labels_N = ctx.saved_tensors
        grad_NV = torch.empty_like(logits_NV)
        start = 0
        for logits_nV, labels_n in _chunks(logits_NV, labels_N):
            stop = start + len(labels_n)
            labelled_n = labels_n != IGNORE
            gradient_nV = _less_onehot(_softmax(logits_nV), labels_n.where(labelled_n, 0).unsqueeze(1))
            torch.mul(gradient_nV, (grad_N[start:stop] * labelled_n)[:, None], out=grad_NV[start:stop])
            start = stop
        return grad_NV, None, None


class _FusedTokenLosses(torch.autograd.Function):
    """The same in one kernel each way."""

    @staticmethod
    def forward(ctx, logits_NV: Tensor, labels_N: Tensor, visit: SketchVisitor | None):
        from pipeline.kernels.losses import losses_and_sketch  # imports Triton

        logits_NV = logits_NV if logits_NV.stride(1) == 1 else logits_NV.contiguous()
        hashing = visit.hashing if visit else None
        losses_N, lse_N, feedback_NG = losses_and_sketch(logits_NV, labels_N, IGNORE, hashing)
        ctx.save_for_backward(logits_NV, labels_N, lse_N)
        if feedback_NG is not None:
            ctx.mark_non_differentiable(feedback_NG)
        return losses_N, feedback_NG

    @staticmethod
    def backward(ctx, grad_N: Tensor, _):
        from pipeline.kernels.losses import to_gradient

        logits_NV, labels_N, lse_N = ctx.saved_tensors
        to_gradient(logits_NV, labels_N, IGNORE, lse_N, grad_N)
        increment_version(logits_NV)  # so that autograd tells whoever kept the logits that they are gone
        return logits_NV, None, None


def _softmax(logits_nV: Tensor) -> Tensor:
    """In one kernel, in float32 at least."""
    return logits_nV.softmax(1, dtype=torch.promote_types(logits_nV.dtype, torch.float32))


def _less_onehot(softmax_nV: Tensor, target_n1: Tensor) -> Tensor:
    """The logit gradient, softmax - onehot, in place."""
    return softmax_nV.scatter_add_(1, target_n1, softmax_nV.new_full(target_n1.shape, -1.0))


def _chunks(logits_NV: Tensor, labels_N: Tensor):
    size = _CHUNK_BYTES_CPU if logits_NV.device.type == "cpu" else _CHUNK_BYTES
    tokens = max(1, size // (4 * logits_NV.shape[1]))
    return zip(logits_NV.split(tokens), labels_N.split(tokens), strict=True)
