"""Decide after the backward, and take what is not kept out of the gradient again."""

import torch
from torch import Tensor

from pipeline.data.batch import IGNORE, Batch
from pipeline.engine import collectives, deepspeed_engine
from pipeline.record.outcome import Decided
from pipeline.training.exchange import exchange
from pipeline.training.passes import Workshop, refuse_broken_weights


class Corrective:
    """Every finite sequence goes through its backward, which scores it; one pass over those that are not kept as they
    are takes them out again, with weight minus one, spread over the ranks, before DeepSpeed's step. The accumulation is
    ours for that. The gradient is the kept tokens' sum over the number of *all* labelled tokens of the step, which is
    known before: no factor all / kept is applied.
    """

    def __init__(self, workshop: Workshop) -> None:
        self._workshop = workshop

    def __call__(self, step: int, batches: list[Batch]) -> tuple[list[Decided], float | None]:
        shop = self._workshop
        labelled = torch.stack([(batch.labels_BT != IGNORE).sum() for batch in batches]).sum()
        # The engine divides by the accumulation steps.
        denominator = float(collectives.all_reduce_sum(labelled)) / shop.accumulation
        decided, trained = [], []
        for m, batch in enumerate(batches):
            finite_U = self._score_in_backward(batch, step, m, denominator)
            trained.append(collectives.all_gather_rows(finite_U[:, None].float())[:, 0].cpu() > 0)
            if shop.influence.scope == "micro_step":
                decided.append(shop.gather_and_decide(step, m))
        decided = decided or shop.decide_together(step)
        with shop.timed("correction"):
            self._correct(step, batches, decided, trained, denominator)
        return decided, deepspeed_engine.take_step(shop.ds_engine)

    def _score_in_backward(self, batch: Batch, step: int, m: int, denominator: float) -> Tensor:
        """Forward and backward of all that is finite; True for its units."""
        shop = self._workshop
        watched = shop.watched(batch, step)
        shop.seed_dropout(step, m)
        losses_BT = watched.forward(shop.ds_engine)
        recorded_BT = losses_BT.detach()
        finite_U = batch.whole_rows(batch.sum_per_unit(recorded_BT).isfinite())
        if collectives.all_reduce_sum((~finite_U).sum()) > 0:
            # What is not finite must not enter a backward: NaN less NaN is NaN.
            del losses_BT
            watched = shop.watched(batch.blank(~finite_U.cpu()), step)
            shop.seed_dropout(step, m)
            losses_BT = watched.forward(shop.ds_engine)
            refuse_broken_weights(losses_BT, step)
        watched.before_backward(denominator * shop.accumulation)
        shop.backward(losses_BT, batch.spread_over_tokens(finite_U.double()), denominator)
        shop.norms = watched.add(recorded_BT)
        return finite_U

    def _correct(
        self, step: int, batches: list[Batch], decided: list[Decided], trained: list[Tensor], denominator: float
    ) -> None:
        shop, weights, flagged = self._workshop, [], []
        for batch, part, trained_U in zip(batches, decided, trained, strict=True):
            change_U = torch.where(trained_U, part.decision.weights - 1, 0.0)
            weights.append(batch.spread_over_tokens(change_U[part.units.ranks == shop.rank]))
            flagged += part.units.positions[change_U != 0].tolist()
        if flagged:
            shop.backward_shared_out(exchange(batches, weights, flagged), denominator, step)
