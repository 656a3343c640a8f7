"""What `lookahead` needs of the engine: a reference's gradient, and the weights a little further along it."""

from collections.abc import Iterator
from contextlib import AbstractContextManager

from torch import Tensor

from pipeline.data.batch import IGNORE, Batch
from pipeline.engine.ahead import Ahead
from pipeline.engine.deepspeed_engine import DeepSpeedEngine
from pipeline.influence.micro_batch import forward_losses


class Lookahead:
    """Losses are compared at the weights that a fraction of the optimizer's step takes the model to, without and with
    the gradient of the reference's mean loss in it. Momentum and decay are in both. Collective."""

    def __init__(self, ds_engine: DeepSpeedEngine, fraction: float) -> None:
        self._engine, self._ahead = ds_engine, Ahead(ds_engine, fraction)

    @property
    def holds_gradient(self) -> bool:
        return self._ahead.holds_gradient

    def hold_gradient(self, batches: Iterator[Batch]) -> None:
        """Of all ranks' batches, as many on each, without dropout."""
        self._engine.eval()
        self._ahead.hold_gradient(self._losses(batch) for batch in batches)
        self._engine.train()

    def _losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        # Not through the engine, which expects a backward of its own to follow.
        losses_BT = forward_losses(self._engine.module, batch)
        return losses_BT.sum(), (batch.labels_BT != IGNORE).sum()

    def moved(self, along: bool) -> AbstractContextManager[None]:
        """Inside, the weights are there: `along` the gradient or without it."""
        return self._ahead.moved(along)
