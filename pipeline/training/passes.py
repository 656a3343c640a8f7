"""What the ways to take an optimizer step share: forwards, scores, decisions, backwards. All collective."""

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.config.schema_influence import InfluenceConfig, PolicyConfig
from pipeline.config.timing import Stopwatch
from pipeline.data.batch import Batch
from pipeline.engine import collectives
from pipeline.engine.deepspeed_engine import DeepSpeedEngine
from pipeline.influence.micro_batch import MicroBatch, forward_losses
from pipeline.influence.policy import Decision, decide
from pipeline.influence.scorer import Scored, Scorer
from pipeline.record.outcome import Decided, UnitTable
from pipeline.tasks.weighted_mean import weighted_mean
from pipeline.training.by_token import decide_by_token
from pipeline.training.exchange import Sequences


class Pass(Protocol):
    """One way to take an optimizer step."""

    def __call__(self, step: int, batches: list[Batch]) -> tuple[list[Decided], float | None]:
        """Score this rank's micro-batches, decide, run the backwards and DeepSpeed's step. Returns what was decided,
        and the gradient norm."""


@dataclass
class Workshop:
    """The engine and all else that a pass works with. `step` counts from 1, `m` the micro-batches of a step from 0."""

    ds_engine: DeepSpeedEngine
    scorer: Scorer
    influence: InfluenceConfig
    policy: PolicyConfig
    seed: int
    timed: Stopwatch
    norms_every: int
    """Optimizer steps between norms of layer inputs."""
    stop_requested: bool = False
    norms: dict[str, Tensor] = field(default_factory=dict)
    """Of the last forward that was asked for them."""

    def __post_init__(self) -> None:
        self.rank, self.world = collectives.rank(), collectives.world_size()
        self.size = self.ds_engine.train_micro_batch_size_per_gpu()
        self.accumulation = self.ds_engine.gradient_accumulation_steps()

    def watched(self, batch: Batch, step: int) -> MicroBatch:
        """A micro-batch that is to be scored."""
        return MicroBatch(self.scorer, batch, self.timed, norms=step % self.norms_every == 0)

    def score(self, batch: Batch, step: int, m: int) -> Tensor:
        """The forward that scores; returns the loss of every position."""
        watched = self.watched(batch, step)
        self.seed_dropout(step, m)
        losses_BT = watched.forward(self.ds_engine)
        self.norms = watched.add()
        return losses_BT

    def forward(self, batch: Batch, step: int, m: int) -> Tensor:
        """A forward that does not; the loss of every position."""
        self.seed_dropout(step, m)
        return forward_losses(self.ds_engine, batch)

    def seed_dropout(self, step: int, m: int) -> None:
        """Dropout draws as a function of where the run is, so a resumed run draws as an unbroken one."""
        where = [self.seed, max(step - 1, 0) * self.accumulation + m, self.rank]
        torch.manual_seed(int(np.random.SeedSequence(where).generate_state(1)[0]))

    def gather(self, scored: list[Scored]) -> UnitTable:
        """What was just scored, as all ranks see it: the one gather."""
        with self.timed("decide"):
            return UnitTable.gather(self.rank, scored, self.stop_requested, collectives.all_gather_rows)

    def decide(self, units: UnitTable, step: int, m: int, scores: Tensor) -> Decision:
        """On the units of micro-batch `m` of the step."""
        with self.timed("decide"):
            batch = (step - 1) * self.accumulation + m
            return decide(scores, units.tokens, units.finite, self.policy, step, self.seed, batch)

    def gather_and_decide(self, step: int, m: int, scored: list[Scored] | None = None) -> Decided:
        """On the micro-batch that was just scored."""
        scored = scored or self.scorer.scores()
        units = self.gather(scored)
        if self.influence.unit == "token":
            (decided,) = self._by_token(units, scored, step, (step - 1) * self.accumulation + m)
            return decided
        return Decided(units, self.decide(units, step, m, units.scores))

    def decide_together(self, step: int, scored: list[Scored] | None = None) -> list[Decided]:
        """On the units of all micro-batches of the step, just scored, together."""
        scored = scored or self.scorer.scores()
        units = self.gather(scored)
        if self.influence.unit == "token":
            return self._by_token(units, scored, step, step - 1)
        with self.timed("decide"):
            decision = decide(units.scores, units.tokens, units.finite, self.policy, step, self.seed, step - 1)
        masks = [units.micro_steps == m for m in range(int(units.micro_steps.max()) + 1)]
        return [Decided(units.of(mask), decision.of(mask)) for mask in masks]

    def _by_token(self, units: UnitTable, scored: list[Scored], step: int, batch: int) -> list[Decided]:
        with self.timed("decide"):
            gather = collectives.all_gather_rows
            return decide_by_token(units, scored, self.rank, self.policy, step, self.seed, batch, gather)

    def denominator(self, decided: Decided) -> float:
        """Of the loss of a micro-batch that is decided before its backward."""
        return decided.all_tokens if self.policy.normalize == "all" else decided.kept_tokens

    def backward(self, losses_BT: Tensor, weights_BT: Tensor, denominator: float) -> None:
        """Of `weighted_mean` over all ranks."""
        self.ds_engine.backward(weighted_mean(losses_BT, weights_BT, denominator, self.world))

    def backward_shared_out(self, sequences: Sequences, denominator: float, step: int, check: bool = False) -> None:
        """Backwards of these sequences, spread evenly over the ranks, whoever read them before. `check`: refuse weights
        that are broken."""
        mine = range(self.rank, len(sequences), self.world)
        for index in range(-(-len(sequences) // (self.world * self.size))):
            # Every rank runs every backward: one that has run out takes a blank, and it counts for nothing.
            part = list(mine[index * self.size : (index + 1) * self.size])
            batch, weights_BT = sequences.batch(part or [0])
            if not part:
                weights_BT = torch.zeros_like(weights_BT)
            if not weights_BT.any():
                batch = batch.blank(torch.ones(len(batch.units), dtype=torch.bool))
            losses_BT = self.forward(batch, step, index)
            if check:
                refuse_broken_weights(losses_BT, step)
            self.backward(losses_BT, weights_BT, denominator)


def refuse_broken_weights(losses_BT: Tensor, step: int) -> None:
    """Collective: all ranks raise or none does."""
    if collectives.all_reduce_sum((~losses_BT.isfinite()).sum()) > 0:
        raise FloatingPointError(
            f"step {step}: the loss is not finite even without the samples in question, so the weights are broken; "
            "nothing was updated"
        )
