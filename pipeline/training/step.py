"""One optimizer step: score the samples, decide, and let the engine step on those that are kept."""

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.config.schema import Config
from pipeline.config.timing import Stopwatch
from pipeline.data.batch import IGNORE, Batch
from pipeline.data.samples import Samples
from pipeline.engine import adam_state, collectives, deepspeed_engine
from pipeline.influence.estimator import Estimator
from pipeline.influence.policy import Decision, decide
from pipeline.record.outcome import Outcome, UnitTable
from pipeline.tasks.causal_lm import Visitor, token_losses
from pipeline.tasks.weighted_mean import weighted_mean

Weighted = tuple[int, Tensor]
"""Position of a sequence, and what a token of each of its units weighs in the loss."""


class Step:
    """Takes optimizer steps with `ds_engine`. Collective: all ranks, all in the same order.

    `lai`, `lli`, `residual` and the controls decide between forward and backward, or, with `influence.passes:
    score_first`, in forwards without gradients, after which only what is kept is trained on, shared out anew among the
    ranks. Both ways the gradient is the mean over the step's micro-batches of each one's mean over its kept tokens.
    `ghost` decides after the backward, and one pass over what is not kept as it is takes it out again; the gradient is
    the kept tokens' sum over the number of *all* labelled tokens of the step, which is known before: no factor all /
    kept is applied.
    """

    def __init__(
        self,
        ds_engine: deepspeed_engine.DeepSpeedEngine,
        estimator: Estimator,
        config: Config,
        samples: Samples,
        reference: Samples | None,
        timed: Stopwatch,
    ) -> None:
        self._engine, self._estimator, self._config = ds_engine, estimator, config
        self._samples, self._reference, self._timed = samples, reference, timed
        self._rank, self._world = collectives.rank(), collectives.world_size()
        self.size = ds_engine.train_micro_batch_size_per_gpu()
        self.accumulation = ds_engine.gradient_accumulation_steps()
        if estimator.needs_backward and config.policy.action != "observe":
            _refuse_dropout(ds_engine.module)

    def __call__(self, step: int, position: int, stop_requested: bool) -> Outcome:
        """Optimizer step `step`, on the sequences from `position` on."""
        starts = [position + m * self.size * self._world for m in range(self.accumulation)]
        batches = [
            self._samples.batch(start + self._rank * self.size, self.size, self._engine.device) for start in starts
        ]
        self._stop_requested, skipped = stop_requested, self._engine.skipped_steps
        self._refresh(step)
        train = self._decide_before_backward
        if self._estimator.needs_backward:
            train = self._decide_after_backward
        elif self._config.influence.passes == "score_first":
            train = self._score_first
        decided, norm = train(step, starts, batches)
        disagreement = None
        if self._config.influence.scope == "step":
            alone = [self._decide(units, step, m, units.micro_scores) for m, (units, _) in enumerate(decided)]
            differ = [((a.weights > 0) != (d.weights > 0)) for a, (_, d) in zip(alone, decided, strict=True)]
            disagreement = float(torch.cat(differ).double().mean())
        audit, every = None, self._config.observe.audit_every_steps
        if every and step % every == 0:
            with self._timed("audit"):
                audit = self._audit(step, batches, [units for units, _ in decided])
        micro_batches = [(start, units, decision) for start, (units, decision) in zip(starts, decided, strict=True)]
        return Outcome(micro_batches, norm, self._engine.skipped_steps > skipped, disagreement, audit)

    @torch.no_grad()
    def _audit(self, step: int, batches: list[Batch], tables: list[UnitTable]) -> float:
        """Pearson's correlation of the units' scores with how much their losses (sums, nats) fell in the step just
        taken, mean over its micro-batches; NaN where nothing varies. Costs a forward. Collective.

        To first order a unit's loss falls by the inner product of its own gradient with the update. That is its score
        with the own term in, if the update is the batch's gradient in the geometry that the estimator assumes. So this
        also sees what the score leaves out: momentum from earlier batches, the optimizer's real geometry, clipping,
        what was dropped, curvature. It says nothing of other batches' losses.
        """
        found = []
        for m, (batch, units) in enumerate(zip(batches, tables, strict=True)):
            losses_BT, _ = self._forward(batch, step, m)  # with the same draws of dropout as before
            after = collectives.all_gather_rows(batch.sum_per_unit(losses_BT)[:, None])[:, 0].cpu()
            fell, counted = units.losses - after, units.finite & after.isfinite()
            pair = torch.stack([units.scores[counted], fell[counted]])
            found.append(torch.corrcoef(pair)[0, 1] if pair.shape[1] > 1 else torch.tensor(torch.nan))
        return float(torch.stack(found).nanmean())

    def _decide_before_backward(
        self, step: int, starts: list[int], batches: list[Batch]
    ) -> tuple[list[tuple[UnitTable, Decision]], float | None]:
        known = self._decide_without_gradients(step, batches) if self._config.influence.scope == "step" else None
        decided, norm = [], None
        for m, batch in enumerate(batches):
            if known:
                losses_BT, _ = self._forward(batch, step, m)
                units, decision = known[m]
            else:
                losses_BT = self._score(batch, step, m)
                units = self._gather()
                decision = self._decide(units, step, m, units.scores)
            own = units.ranks == self._rank
            if not units.finite.all():
                # Weight 0 is not enough: 0 * NaN = NaN. Train on the same shapes without what was in them.
                losses_BT, _ = self._forward(batch.blank(~units.finite[own]), step, m)
                _refuse_broken_weights(losses_BT, step)
            weights_BT = batch.spread_over_tokens(decision.weights[own])
            kept_tokens = float((decision.weights * units.tokens).sum())
            self._engine.backward(weighted_mean(losses_BT, weights_BT, kept_tokens, self._world))
            norm = deepspeed_engine.take_step(self._engine)
            decided.append((units, decision))
        return decided, norm

    def _decide_without_gradients(self, step: int, batches: list[Batch]) -> list[tuple[UnitTable, Decision]]:
        """In forwards of their own, which keep nothing for a backward."""
        decided = []
        for m, batch in enumerate(batches):
            with self._timed("scoring forward"), torch.no_grad():
                self._score(batch, step, m)
            if self._config.influence.scope == "micro_step":
                units = self._gather()
                decided.append((units, self._decide(units, step, m, units.scores)))
        return decided or self._decide_on_all(step)

    def _score_first(
        self, step: int, starts: list[int], batches: list[Batch]
    ) -> tuple[list[tuple[UnitTable, Decision]], float | None]:
        decided = self._decide_without_gradients(step, batches)
        sequences: list[Weighted] = []
        for units, decision in decided:
            kept_tokens = float((decision.weights * units.tokens).sum())
            for position in units.positions.unique().tolist():
                weights_U = decision.weights[units.positions == position]
                sequences.append((position, weights_U / (kept_tokens or 1.0)))
        # Where nothing is kept anywhere, one backward still has to give the engine its zero gradient.
        kept = [(position, weights_U) for position, weights_U in sequences if weights_U.any()] or sequences[:1]
        all_finite = all(bool(units.finite.all()) for units, _ in decided)
        self._backward(kept, 1.0, step, check=not all_finite)
        return decided, deepspeed_engine.take_step(self._engine)

    def _decide_after_backward(
        self, step: int, starts: list[int], batches: list[Batch]
    ) -> tuple[list[tuple[UnitTable, Decision]], float | None]:
        labelled = torch.stack([(batch.labels_BT != IGNORE).sum() for batch in batches]).sum()
        # The engine divides by the accumulation steps.
        denominator = float(collectives.all_reduce_sum(labelled)) / self.accumulation
        decided, trained = [], []
        for m, batch in enumerate(batches):
            finite_U = self._score_in_backward(batch, step, m, denominator)
            trained.append(collectives.all_gather_rows(finite_U[:, None].float())[:, 0].cpu() > 0)
            if self._config.influence.scope == "micro_step":
                units = self._gather()
                decided.append((units, self._decide(units, step, m, units.scores)))
        decided = decided or self._decide_on_all(step)
        with self._timed("correction"):
            corrections: list[Weighted] = [
                (int(units.positions[index]), decision.weights[index : index + 1] - 1)
                for (units, decision), trained_U in zip(decided, trained, strict=True)
                for index in ((decision.weights != 1) & trained_U).nonzero().flatten().tolist()
            ]
            self._backward(corrections, denominator, step)
        return decided, deepspeed_engine.take_step(self._engine)

    def _score_in_backward(self, batch: Batch, step: int, m: int, denominator: float) -> Tensor:
        """Forward and backward of all that is finite; True for its units."""
        with self._estimator.capture():
            losses_BT, feedback_NG = self._forward(batch, step, m, self._estimator.visit)
        recorded_BT = losses_BT.detach()
        finite_U = batch.whole_rows(batch.sum_per_unit(recorded_BT).isfinite())
        if collectives.all_reduce_sum((~finite_U).sum()) > 0:
            # What is not finite must not enter a backward: NaN less NaN is NaN.
            with self._estimator.capture():
                losses_BT, feedback_NG = self._forward(batch.blank(~finite_U.cpu()), step, m, self._estimator.visit)
            _refuse_broken_weights(losses_BT, step)
        self._estimator.watch(batch, losses_BT, denominator * self.accumulation)
        weights_BT = batch.spread_over_tokens(finite_U.double())
        self._engine.backward(weighted_mean(losses_BT, weights_BT, denominator, self._world))
        self._estimator.add(batch, recorded_BT, feedback_NG)
        return finite_U

    def _backward(self, sequences: list[Weighted], denominator: float, step: int, check: bool = False) -> None:
        """Backwards of these sequences, spread evenly over the ranks, whoever read them before. `check`: refuse weights
        that are broken."""
        mine = sequences[self._rank :: self._world]
        rounds = -(-len(sequences) // (self._world * self.size))
        for index in range(rounds):
            # Every rank runs every backward: one that has run out takes a blank, and it counts for nothing.
            spare = [(position, torch.zeros_like(weights_U)) for position, weights_U in sequences[:1]]
            part = mine[index * self.size : (index + 1) * self.size] or spare
            batch = self._samples.batch_at([position for position, _ in part], self._engine.device)
            weights_U = torch.cat([weights_U for _, weights_U in part])
            if not weights_U.any():
                batch = batch.blank(torch.ones(len(batch.units), dtype=torch.bool))
            losses_BT, _ = self._forward(batch, step, index)
            if check:
                _refuse_broken_weights(losses_BT, step)
            weights_BT = batch.spread_over_tokens(weights_U)
            self._engine.backward(weighted_mean(losses_BT, weights_BT, denominator, self._world))

    def _refresh(self, step: int) -> None:
        """Bring what the estimator holds between steps up to date."""
        influence = self._config.influence
        due = not self._estimator.preconditioned or (step - 1) % influence.adam_every_steps == 0
        if self._estimator.needs_second_moments and due:
            with self._timed("second moments"):
                second = adam_state.second_moments(self._engine)
            if second:
                self._estimator.precondition(second)
        due = not self._estimator.holds_validation or (step - 1) % influence.validation_every_steps == 0
        if self._reference and due:
            with self._timed("validation"):
                refresh = (step - 1) // influence.validation_every_steps
                self._hold_validation(self._reference, refresh * influence.validation_sequences)

    def _hold_validation(self, reference: Samples, position: int) -> None:
        """The moment of the next few of the reference set's sequences, in its seeded order, shared among the ranks."""
        count = self._config.influence.validation_sequences
        mine = range(position + self._rank, position + count, self._world)
        self._engine.eval()
        for first in range(0, -(-count // self._world), self.size):
            part = list(mine[first : first + self.size])
            batch = reference.batch_at(part or [position], self._engine.device)
            if not part:  # every rank takes part in every forward
                batch.labels_BT.fill_(IGNORE)
            with torch.set_grad_enabled(self._estimator.needs_backward), self._estimator.capture():
                # Not through the engine, which expects a backward for the weights to follow.
                logits_BTV = self._engine.module(input_ids=batch.input_ids_BT, use_cache=False).logits
                losses_BT, feedback_NG = token_losses(logits_BTV, batch.labels_BT, self._estimator.visit)
            if self._estimator.needs_backward:
                self._estimator.watch(batch, losses_BT, None)
                self._estimator.backward_to_inputs(losses_BT)
            self._estimator.add(batch, losses_BT.detach(), feedback_NG)
        self._engine.train()
        self._estimator.hold_validation()

    def _score(self, batch: Batch, step: int, m: int) -> Tensor:
        """The forward that scores; returns the loss of every position."""
        with self._estimator.capture(norms=step % self._config.observe.every_steps == 0):
            losses_BT, feedback_NG = self._forward(batch, step, m, self._estimator.visit)
        self._estimator.add(batch, losses_BT.detach(), feedback_NG)
        return losses_BT

    def _forward(self, batch: Batch, step: int, m: int, visit: Visitor | None = None) -> tuple[Tensor, Tensor | None]:
        """Loss of every position, and what `visit` keeps of the gradient at the logits."""
        # Dropout draws as a function of where the run is, so a resumed run draws as an unbroken one.
        where = [self._config.seed, max(step - 1, 0) * self.accumulation + m, self._rank]
        torch.manual_seed(int(np.random.SeedSequence(where).generate_state(1)[0]))
        logits_BTV = self._engine(input_ids=batch.input_ids_BT, use_cache=False).logits
        return token_losses(logits_BTV, batch.labels_BT, visit)

    def _gather(self) -> UnitTable:
        """What was just scored, as all ranks see it. Collective: the one gather."""
        scored = self._estimator.scores()
        with self._timed("decide"):
            return UnitTable.gather(self._rank, scored, self._stop_requested)

    def _decide(self, units: UnitTable, step: int, m: int, scores: Tensor) -> Decision:
        """On the units of micro-batch `m` of the step."""
        with self._timed("decide"):
            batch = (step - 1) * self.accumulation + m
            return decide(scores, units.tokens, units.finite, self._config.policy, step, self._config.seed, batch)

    def _decide_on_all(self, step: int) -> list[tuple[UnitTable, Decision]]:
        """On the units of all micro-batches of the step together."""
        units = self._gather()
        with self._timed("decide"):
            decision = decide(
                units.scores, units.tokens, units.finite, self._config.policy, step, self._config.seed, step - 1
            )
        masks = [units.micro_steps == m for m in range(self.accumulation)]
        return [(units.of(mask), decision.of(mask)) for mask in masks]


def _refuse_dropout(model: PreTrainedModel) -> None:
    """Raises ValueError: what was dropped could not be taken out again, as a second forward draws otherwise."""
    rates = {name: module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout) and module.p}
    if rate := getattr(model.config, "attention_dropout", 0):  # some architectures have no module for it
        rates["attention_dropout"] = rate
    if rates:
        raise ValueError(
            "estimator 'ghost' takes dropped samples out of the gradient by a second pass, which dropout would change; "
            f"this model has {rates}. Set them to 0 in its config.json, or policy.action to observe"
        )


def _refuse_broken_weights(losses_BT: Tensor, step: int) -> None:
    """Collective: all ranks raise or none does."""
    if collectives.all_reduce_sum((~losses_BT.isfinite()).sum()) > 0:
        raise FloatingPointError(
            f"step {step}: the loss is not finite even without the samples in question, so the weights are broken; "
            "nothing was updated. The newest checkpoint is from before: lower the learning rate and resume"
        )
