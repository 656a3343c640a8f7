"""Read more than is trained on, score all of it, and train on the best."""

import torch

from pipeline.data.batch import IGNORE, Batch
from pipeline.engine import deepspeed_engine
from pipeline.record.outcome import Decided
from pipeline.training.exchange import Sequences, exchange
from pipeline.training.passes import Workshop
from pipeline.training.scoring_pass import ScoringPass


class Pool:
    """All ranks together read `policy.pool` times the sequences of a step and keep the best of them all. They are
    trained on in the order in which they were read, as if nothing else had been: rank by rank, micro-batch by
    micro-batch, each the mean over its own tokens."""

    def __init__(self, workshop: Workshop, scoring: ScoringPass) -> None:
        self._workshop, self._scoring = workshop, scoring

    def __call__(self, step: int, batches: list[Batch]) -> tuple[list[Decided], float | None]:
        decided = self._scoring(step, batches)
        weights, kept = [], []
        for batch, part in zip(batches, decided, strict=True):
            weights.append(part.weights_of(batch, self._workshop.rank))
            kept += part.units.positions[part.decision.weights > 0].tolist()
        # Where nothing in the pool is finite, backwards of nothing still have to give the engine its zero gradient.
        sequences = exchange(batches, weights, kept or decided[0].units.positions[:1].tolist())
        return decided, self._train(sequences, step)

    def _train(self, sequences: Sequences, step: int) -> float | None:
        shop, norm = self._workshop, None
        together = shop.size * shop.world
        for m in range(shop.accumulation):
            first = m * together
            kept_tokens = (sequences.weights_RT * (sequences.labels_RT != IGNORE))[first : first + together].sum()
            mine = [first + shop.rank * shop.size + index for index in range(shop.size)]
            rows = [row for row in mine if row < len(sequences)]
            batch, weights_BT = sequences.batch(rows or [0])
            if not rows or not weights_BT.any():  # fewer were finite than a step takes
                batch, weights_BT = batch.blank(torch.ones(len(batch.units), dtype=torch.bool)), weights_BT * 0
            shop.backward(shop.forward(batch, step, m), weights_BT, float(kept_tokens))
            norm = deepspeed_engine.take_step(shop.ds_engine)
        return norm
