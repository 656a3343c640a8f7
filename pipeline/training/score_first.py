"""Decide in forwards without gradients, then train on what is kept only, shared out anew among the ranks."""

from pipeline.data.batch import Batch
from pipeline.engine import deepspeed_engine
from pipeline.record.outcome import Decided
from pipeline.training.exchange import exchange
from pipeline.training.passes import Workshop
from pipeline.training.scoring_pass import ScoringPass


class ScoreFirst:
    """The gradient is `OnePass`'s. The number of backwards is what is kept needs, so the accumulation is ours."""

    def __init__(self, workshop: Workshop, scoring: ScoringPass) -> None:
        self._workshop, self._scoring = workshop, scoring

    def __call__(self, step: int, batches: list[Batch]) -> tuple[list[Decided], float | None]:
        shop = self._workshop
        decided = self._scoring(step, batches)
        weights, kept = [], []
        for batch, part in zip(batches, decided, strict=True):
            weights.append(part.weights_of(batch, shop.rank) / (shop.denominator(part) or 1.0))
            kept += part.units.positions[part.decision.weights != 0].unique().tolist()
        # Where nothing is kept anywhere, one backward still has to give the engine its zero gradient.
        sequences = exchange(batches, weights, kept or decided[0].units.positions[:1].tolist())
        all_finite = all(bool(part.units.finite.all()) for part in decided)
        shop.backward_shared_out(sequences, 1.0, step, check=not all_finite)
        return decided, deepspeed_engine.take_step(shop.ds_engine)
