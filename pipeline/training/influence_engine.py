"""A DeepSpeed engine that knows, at every optimizer step, which of its samples help."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pipeline.config.schema_influence import InfluenceConfig, PolicyConfig
from pipeline.config.timing import Stopwatch
from pipeline.data.batch import IGNORE, Batch
from pipeline.data.rows import Rows, batch_of
from pipeline.data.samples import Samples
from pipeline.engine import adam_state, collectives, deepspeed_engine
from pipeline.engine.deepspeed_engine import DeepSpeedEngine
from pipeline.influence.micro_batch import forward_losses, hold_validation
from pipeline.influence.scorer import Scorer, SketchScorer
from pipeline.influence.table import check, scorer_of
from pipeline.models.compiled import refuse_compiled
from pipeline.models.dropout import refuse_dropout
from pipeline.record.outcome import Decided, Outcome
from pipeline.training.corrective import Corrective
from pipeline.training.lookahead import Lookahead
from pipeline.training.one_pass import OnePass
from pipeline.training.passes import Pass, Workshop
from pipeline.training.pool import Pool
from pipeline.training.score_first import ScoreFirst
from pipeline.training.scoring_pass import ScoringPass


class InfluenceEngine:
    """Takes optimizer steps with `ds_engine` on what the policy keeps. Collective: all ranks make the same calls, in
    the same order.

        engine = InfluenceEngine(ds_engine, influence=InfluenceConfig(), policy=PolicyConfig(), seed=0)
        for micro_batches in loader:
            outcome = engine.train_step(micro_batches)

    in place of the loop's forward, `backward` and `step`. Batch sizes, precision, optimizer, clipping, accumulation and
    ZeRO are the engine's own. Nothing is written; `state_dict` belongs into the loop's own checkpoints. `timed.read()`
    says where the time went; on an accelerator it is to be called now and then, or the events it holds pile up.

    `reference`: the sequences whose loss counts with `influence.reference: validation`, a sized, indexable collection
    of dicts as in a batch, but one sequence each. `norms_every_steps`: when norms of layer inputs are wanted in the
    outcome. `audit_every_steps`: when scores are held against how much losses fell, one more forward.

    `reference_model`: the frozen model that estimator rho compares with, called as a model is.

    `scorer`: in place of what `influence` asks for (baselines, measurements); `timed`: a stopwatch of the caller's.

    Raises ValueError where model, engine and configs do not go together.
    """

    def __init__(
        self,
        ds_engine: DeepSpeedEngine,
        influence: InfluenceConfig | None = None,
        policy: PolicyConfig | None = None,
        seed: int = 0,
        reference: Samples | Sequence[Mapping[str, Any]] | None = None,
        norms_every_steps: int = 10,
        audit_every_steps: int | None = None,
        timed: Stopwatch | None = None,
        scorer: Scorer | None = None,
        reference_model: Callable[..., Any] | None = None,
    ) -> None:
        influence, policy = influence or InfluenceConfig(), policy or PolicyConfig()
        refuse_compiled(ds_engine.module)
        deepspeed_engine.refuse_shared_samples(ds_engine)
        check(influence, policy, deepspeed_engine.settings_of(ds_engine), audits=audit_every_steps is not None)
        if (influence.reference == "validation") != (reference is not None):
            raise ValueError("influence.reference 'validation' and a `reference` to score against go together")
        self._engine, self._influence, self._audit_every = ds_engine, influence, audit_every_steps
        self.timed = timed or Stopwatch(ds_engine.device)
        compared = None if reference_model is None else partial(self._reference_losses, reference_model)
        self.scorer = scorer or scorer_of(
            influence, ds_engine.module, seed, ds_engine.device, self.timed, collectives.all_reduce_sum, compared
        )
        self._lookahead = None
        if influence.estimator == "lookahead":
            self._lookahead = Lookahead(ds_engine, influence.lookahead_step)
        self._reference = reference if isinstance(reference, Samples | None) else Rows(reference, seed)
        self._shop = Workshop(ds_engine, self.scorer, influence, policy, seed, self.timed, norms_every_steps)
        self._take = self._pass()
        self.size, self.ranks, self.device = self._shop.size, self._shop.world, ds_engine.device
        self.micro_batches = self._shop.accumulation * (policy.pool or 1)
        """That a step reads on each rank."""
        self.step = 0
        """Optimizer steps taken."""
        self.position = 0
        """Sequences read, of all ranks: the place in the sample order at which the next step begins."""

    def _pass(self) -> Pass:
        shop, managed = self._shop, self._engine.managed_gradient_accumulation()
        ours = shop.policy.rule != "top" and (self.scorer.after_backward or shop.influence.passes == "score_first")
        if ours and managed:
            raise ValueError(
                f"estimator '{shop.influence.estimator}' with influence.passes '{shop.influence.passes}' runs as many "
                'backwards in a step as it needs: set "managed_gradient_accumulation": false in the DeepSpeed JSON'
            )
        if not ours and not managed and shop.accumulation > 1:
            raise ValueError(
                f"estimator '{shop.influence.estimator}' leaves the accumulation to DeepSpeed: take "
                '"managed_gradient_accumulation": false out of the DeepSpeed JSON'
            )
        scoring = ScoringPass(shop, self._lookahead)
        if shop.policy.rule == "top":
            return Pool(shop, scoring)
        if self.scorer.after_backward:
            if shop.policy.action != "observe" and shop.policy.rule != "mixture":
                refuse_dropout(self._engine.module)
            return Corrective(shop)
        return ScoreFirst(shop, scoring) if shop.influence.passes == "score_first" else OnePass(shop, scoring)

    @property
    def sequences(self) -> int:
        """That a step reads, on all ranks."""
        return self.size * self._shop.world * self.micro_batches

    def train_step(self, micro_batches: Sequence[Batch | Mapping[str, Any]], stop_requested: bool = False) -> Outcome:
        """One optimizer step: scores, decides, runs the backwards and DeepSpeed's step.

        `micro_batches`: this rank's, as many as the engine accumulates, and `policy.pool` times as many with
        `policy.rule: top`; dicts of `input_ids` (B, T) and `labels` in
        transformers' convention (of the same positions, -100 ignored; default: the ids, less what `attention_mask`
        masks), other tensors being handed to the model; `unit_ids` (B, T), with `influence.unit: document`, says which
        unit a position belongs to (-1: none); `metadata`, a list of B objects, comes back in `Outcome.table`. Lengths
        may differ between micro-batches and ranks. `stop_requested` travels in the gather: `Outcome.stop` says whether
        any rank was asked to stop.

        Raises ValueError for batches of another number or size than the engine's and for a model that is compiled, and
        FloatingPointError, on all ranks, where the weights are broken.
        """
        if len(micro_batches) != self.micro_batches:
            pool = " x policy.pool" if self._shop.policy.pool else ""
            raise ValueError(
                f"train_step takes the micro-batches of one optimizer step, {self.micro_batches} of them "
                f"(gradient_accumulation_steps{pool}), not {len(micro_batches)}"
            )
        refuse_compiled(self._engine.module)  # it may have been compiled since
        with self.timed("step"):
            return self._step(micro_batches, stop_requested)

    def _step(self, micro_batches: Sequence[Batch | Mapping[str, Any]], stop_requested: bool) -> Outcome:
        shop, step = self._shop, self.step + 1
        starts = [self.position + m * self.size * shop.world for m in range(self.micro_batches)]
        batches: list[Batch] = []
        metadata: dict[int, Any] = {}
        for start, given in zip(starts, micro_batches, strict=True):
            first = start + shop.rank * self.size
            batch = given if isinstance(given, Batch) else self._batch_of(given, first)
            batches.append(batch)
            if not isinstance(given, Batch) and given.get("metadata") is not None:
                metadata |= dict(enumerate(given["metadata"], start=first))
        shop.stop_requested, skipped = stop_requested, self._engine.skipped_steps
        self._refresh(step)
        decided, norm = self._take(step, batches)
        self.step, self.position = step, self.position + self.sequences
        audit = None
        if self._audit_every and step % self._audit_every == 0:
            with self.timed("audit"):
                audit = self._audit(step, batches, decided)
        return Outcome(
            step,
            starts,
            decided,
            norm,
            self._engine.skipped_steps > skipped,
            self._disagreement(step, decided),
            audit,
            shop.norms,
            metadata,
        )

    def _batch_of(self, given: Mapping[str, Any], first: int) -> Batch:
        batch = batch_of(given, first, self._engine.device, self._influence.unit)
        if len(batch.input_ids_BT) > self.size:
            raise ValueError(
                f"a micro-batch has {len(batch.input_ids_BT)} sequences, more than the {self.size} of the engine's "
                "train_micro_batch_size_per_gpu"
            )
        for name, tensor in batch.others.items():
            if tensor.shape != batch.input_ids_BT.shape and not isinstance(self._take, OnePass):
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}, and only tensors of shape (B, T) can go with a sequence "
                    f"to another rank, as they do with estimator '{self._influence.estimator}' and influence.passes "
                    f"'{self._influence.passes}': leave it out, or choose lai and one"
                )
        return batch

    def _disagreement(self, step: int, decided: list[Decided]) -> float | None:
        """`Outcome.disagreement`."""
        if self._influence.scope != "step" or self._influence.unit == "token" or self._shop.policy.rule == "top":
            return None
        differ = []
        for m, part in enumerate(decided):
            alone = self._shop.decide(part.units, step, m, part.units.micro_scores)
            differ.append((alone.weights > 0) != (part.decision.weights > 0))
        return float(torch.cat(differ).double().mean())

    @torch.no_grad()
    def _audit(self, step: int, batches: list[Batch], decided: list[Decided]) -> float:
        """Pearson's correlation of the units' scores with how much their losses (sums, nats) fell in the step just
        taken, mean over its micro-batches; NaN where nothing varies. Costs a forward.

        To first order a unit's loss falls by the inner product of its own gradient with the update. That is its score
        with the self-influence in, if the update is the batch's gradient in the geometry that the estimator assumes.
        So this also sees what the score leaves out: momentum from earlier batches, the optimizer's real geometry,
        clipping, what was dropped, curvature. It says nothing of other batches' losses.
        """
        found = []
        for m, (batch, part) in enumerate(zip(batches, decided, strict=True)):
            losses_BT = self._shop.forward(batch, step, m)  # with the same draws of dropout as before
            after = collectives.all_gather_rows(batch.sum_per_unit(losses_BT)[:, None])[:, 0].cpu()
            fell, counted = part.units.losses - after, part.units.finite & after.isfinite()
            pair = torch.stack([part.units.scores[counted], fell[counted]])
            found.append(torch.corrcoef(pair)[0, 1] if pair.shape[1] > 1 else torch.tensor(torch.nan))
        return float(torch.stack(found).nanmean())

    def _refresh(self, step: int) -> None:
        """Bring what the scorer holds between steps up to date."""
        influence, scorer = self._influence, self.scorer
        validating = (step - 1) % influence.validation_every_steps == 0
        position = (step - 1) // influence.validation_every_steps * influence.validation_sequences
        if self._lookahead and self._reference and (validating or not self._lookahead.holds_gradient):
            with self.timed("validation"):
                self._lookahead.hold_gradient(self._of_reference(self._reference, position))
        if not isinstance(scorer, SketchScorer):
            return
        due = not scorer.preconditioned or (step - 1) % influence.adam_every_steps == 0
        if scorer.reads_second_moments and due:
            with self.timed("second moments"):
                second = adam_state.second_moments(self._engine)
            if second:
                scorer.precondition(second)
        if self._reference and (validating or not scorer.holds_validation):
            with self.timed("validation"):
                self._hold_validation(scorer, self._of_reference(self._reference, position))

    def _of_reference(self, reference: Samples | Rows, position: int) -> Iterator[Batch]:
        """This rank's share of the next few of the reference's sequences, in its seeded order."""
        shop, count = self._shop, self._influence.validation_sequences
        mine = range(position + shop.rank, position + count, shop.world)
        for first in range(0, -(-count // shop.world), self.size):
            part = list(mine[first : first + self.size])
            batch = reference.batch_at(part or [position], self._engine.device)
            if not part:  # every rank takes part in every forward
                batch.labels_BT.fill_(IGNORE)
            yield batch

    def _hold_validation(self, scorer: SketchScorer, batches: Iterator[Batch]) -> None:
        """The sketch of all ranks' batches."""
        self._engine.eval()
        # Not through the engine, which expects a backward for the weights to follow.
        hold_validation(scorer, self._engine.module, batches, self.timed)
        self._engine.train()

    @torch.no_grad()
    def _reference_losses(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        with self.timed("reference model"):
            return forward_losses(model, batch)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on as this one would; the same on every rank. The weights and the optimizer
        are DeepSpeed's to save."""
        return {"step": self.step, "position": self.position, "scorer": self.scorer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Go on from a saved state; returns, in sentences, what of it is of no use under today's config."""
        self.step, self.position = state["step"], state["position"]
        dropped = self.scorer.load_state_dict(state["scorer"])
        if self._lookahead and self.step % self._influence.validation_every_steps:
            dropped.append("the reference's gradient is not in a checkpoint and is taken anew, at today's weights")
        return dropped
