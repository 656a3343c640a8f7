"""Logits -> per-token loss and its analytic gradient, and the one loss that is minimised. Pure tensors, no ranks."""

from collections.abc import Callable

import torch
from torch import Tensor

IGNORE = -100
"""Label of a position that has none: the last of a sequence, and padding."""

_CHUNK_BYTES = 64 * 2**20

Visitor = Callable[[Tensor], Tensor]
"""Takes the logit gradients of a chunk of tokens, (n, V) float32, its to overwrite; returns what to keep, (n, G)."""


def token_losses(logits_BTV: Tensor, labels_BT: Tensor, visit: Visitor | None = None) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy of every position, in nats, and what `visit` makes of its gradient with respect to the logits.

    loss_t = logsumexp(logits_t) - logits_t[label_t], and g_t = softmax(logits_t) - onehot(label_t), which needs no
    backward. Where the label is IGNORE both are 0. Softmax exists for one chunk of tokens at a time, in the forward
    and again in the backward, so no second (B, T, V) tensor is kept.

    Returns (losses_BT, feedback_NG): losses in float32 (float64 for float64 logits), attached to the graph; feedback
    for the N = B T positions in order, detached, or None without `visit`.
    """
    labels_N = labels_BT.flatten()
    losses_N, feedback_NG = _TokenLosses.apply(logits_BTV.flatten(0, 1), labels_N, visit)
    return losses_N.view_as(labels_BT), feedback_NG


def weighted_mean(losses_N: Tensor, weights_N: Tensor, denominator: float, world_size: int) -> Tensor:
    """This rank's loss, such that the engine's gradient is that of the weighted mean over all ranks' tokens.

    sum_n w_n loss_n * world_size / denominator, where `denominator` is the sum of the weights of all labelled tokens
    of the micro-batch on all ranks: dropped tokens are not in it. The one owner of the world-size factor: ZeRO
    averages gradients over ranks (and `engine.backward` over accumulation steps), so the factor makes a sum of that
    average. Where nothing is kept anywhere (denominator 0) the loss is 0 and still attached to the graph, because
    every rank must run every backward.
    """
    return (losses_N * weights_N).sum() * (world_size / denominator if denominator > 0 else 0.0)


class _TokenLosses(torch.autograd.Function):
    """Per-token cross-entropy over (N, V) logits, chunk by chunk."""

    @staticmethod
    def forward(ctx, logits_NV: Tensor, labels_N: Tensor, visit: Visitor | None):
        losses, kept = [], []
        for logits_nV, labels_n in _chunks(logits_NV, labels_N):
            labelled_n = labels_n != IGNORE
            target_n1 = labels_n.where(labelled_n, 0).unsqueeze(1)
            logits_nV = _at_least_float32(logits_nV)
            lse_n1 = logits_nV.logsumexp(1, keepdim=True)
            losses.append((lse_n1 - logits_nV.gather(1, target_n1)).squeeze(1) * labelled_n)
            if visit is not None:
                kept.append(visit(_logit_gradient(logits_nV, lse_n1, target_n1, labelled_n)))
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
            target_n1 = labels_n.where(labelled_n, 0).unsqueeze(1)
            logits_nV = _at_least_float32(logits_nV)
            gradient_nV = _logit_gradient(logits_nV, logits_nV.logsumexp(1, keepdim=True), target_n1, labelled_n)
            grad_NV[start:stop] = gradient_nV.mul_(grad_N[start:stop, None])
            start = stop
        return grad_NV, None, None


def _logit_gradient(logits_nV: Tensor, lse_n1: Tensor, target_n1: Tensor, labelled_n: Tensor) -> Tensor:
    """softmax - onehot, 0 where there is no label."""
    gradient_nV = (logits_nV - lse_n1).exp_()
    gradient_nV.scatter_add_(1, target_n1, gradient_nV.new_full(target_n1.shape, -1.0))
    return gradient_nV.mul_(labelled_n[:, None])


def _chunks(logits_NV: Tensor, labels_N: Tensor):
    tokens = max(1, _CHUNK_BYTES // (4 * logits_NV.shape[1]))
    return zip(logits_NV.split(tokens), labels_N.split(tokens), strict=True)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
