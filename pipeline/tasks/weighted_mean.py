"""The one loss that is minimised. Pure tensors, no ranks."""

from torch import Tensor


def weighted_mean(losses_N: Tensor, weights_N: Tensor, denominator: float, world_size: int) -> Tensor:
    """This rank's loss, such that the engine's gradient is that of the weighted mean over all ranks' tokens.

    sum_n w_n loss_n * world_size / denominator, where `denominator` is the sum of the weights of all labelled tokens
    of the micro-batch on all ranks: dropped tokens are not in it. The one owner of the world-size factor: ZeRO
    averages gradients over ranks (and `engine.backward` over accumulation steps), so the factor makes a sum of that
    average. Where nothing is kept anywhere (denominator 0) the loss is 0 and still attached to the graph, because
    every rank must run every backward.
    """
    return (losses_N * weights_N).sum() * (world_size / denominator if denominator > 0 else 0.0)
