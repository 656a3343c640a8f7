"""Decide between forward and backward: one forward, one backward a micro-batch."""

from pipeline.data.batch import Batch
from pipeline.engine import deepspeed_engine
from pipeline.record.outcome import Decided
from pipeline.training.passes import Workshop, refuse_broken_weights
from pipeline.training.scoring_pass import ScoringPass


class OnePass:
    """The gradient is the mean over the step's micro-batches of each one's mean over its kept tokens, or with
    `policy.normalize: all` of its kept tokens' sum over the number of all. With
    `influence.scope: step` all of them are scored before, in forwards of their own."""

    def __init__(self, workshop: Workshop, scoring: ScoringPass) -> None:
        self._workshop, self._scoring = workshop, scoring

    def __call__(self, step: int, batches: list[Batch]) -> tuple[list[Decided], float | None]:
        shop = self._workshop
        known = self._scoring(step, batches) if shop.influence.scope == "step" else None
        decided, norm = [], None
        for m, batch in enumerate(batches):
            losses_BT = shop.forward(batch, step, m) if known else shop.score(batch, step, m)
            part = known[m] if known else shop.gather_and_decide(step, m)
            if not part.units.finite.all():
                own = part.units.ranks == shop.rank
                # Weight 0 is not enough: 0 * NaN = NaN. Train on the same shapes without what was in them.
                losses_BT = shop.forward(batch.blank(~part.units.finite[own]), step, m)
                refuse_broken_weights(losses_BT, step)
            shop.backward(losses_BT, part.weights_of(batch, shop.rank), shop.denominator(part))
            norm = deepspeed_engine.take_step(shop.ds_engine)
            decided.append(part)
        return decided, norm
