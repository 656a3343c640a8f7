"""Scores and decisions from a pass of its own, which leaves no gradient of any weight."""

from dataclasses import replace

import torch
from torch import Tensor

from pipeline.data.batch import Batch
from pipeline.engine import collectives
from pipeline.influence.scorer import ControlScorer, Scored
from pipeline.record.outcome import Decided
from pipeline.training.lookahead import Lookahead
from pipeline.training.passes import Workshop


class ScoringPass:
    """Scores units by the first `influence.score_prefix` of their sequences: in a forward that keeps nothing for a
    backward; `ghost` in a forward and a backward in which weights have no gradient; `lookahead` in two forwards."""

    def __init__(self, workshop: Workshop, lookahead: Lookahead | None) -> None:
        self._workshop, self._lookahead = workshop, lookahead

    def __call__(self, step: int, batches: list[Batch]) -> list[Decided]:
        """Collective. A candidate pool is decided together, all else as `influence.scope` says."""
        shop, fraction = self._workshop, self._workshop.influence.score_prefix
        together = shop.policy.rule == "top" or shop.influence.scope == "step"
        seen = [batch.prefix(fraction) for batch in batches] if fraction < 1 else batches
        step_tokens = self._tokens_of_step(batches)
        losses = self._losses_ahead(step, seen)
        decided, scored = [], list[Scored]()
        for m, batch in enumerate(seen):
            with shop.timed("scoring forward"):
                self._score(step, m, batch, step_tokens, losses[m] if losses else None)
            if not together:
                (part,) = shop.scorer.scores()
                decided.append(shop.gather_and_decide(step, m, [_of_whole(part, batches[m])]))
            elif not shop.scorer.compares:  # else sketches wait for all that they are compared with
                scored += shop.scorer.scores()
        if not together:
            return decided
        parts = zip(scored or shop.scorer.scores(), batches, strict=True)
        return shop.decide_together(step, [_of_whole(part, whole) for part, whole in parts])

    def _score(
        self, step: int, m: int, batch: Batch, step_tokens: float | None, losses: tuple[Tensor, Tensor] | None
    ) -> None:
        shop = self._workshop
        if losses:
            assert isinstance(shop.scorer, ControlScorer)
            before_BT, after_BT = losses
            shop.scorer.add_scored(batch, before_BT, before_BT - after_BT)
        elif shop.scorer.after_backward:
            watched = shop.watched(batch, step)
            shop.seed_dropout(step, m)
            watched.forward(shop.ds_engine.module)  # the engine would expect a backward for the weights to follow
            watched.before_backward(step_tokens)
            watched.backward_to_inputs()
            shop.norms = watched.add()
        else:
            with torch.no_grad():
                shop.score(batch, step, m)

    def _losses_ahead(self, step: int, batches: list[Batch]) -> list[tuple[Tensor, Tensor]] | None:
        """Of every batch at the two places of `lookahead`, with the same draws of dropout."""
        if self._lookahead is None:
            return None
        shop, losses = self._workshop, []
        for along in (False, True):
            with shop.timed("scoring forward"), torch.no_grad(), self._lookahead.moved(along):
                losses.append([shop.forward(batch, step, m) for m, batch in enumerate(batches)])
        return list(zip(*losses, strict=True))

    def _tokens_of_step(self, batches: list[Batch]) -> float | None:
        """Labelled tokens that the coming step will train on, for `ghost`: a candidate's share of what it reads."""
        shop = self._workshop
        if not (shop.scorer.after_backward and shop.policy.pool):
            return None
        labelled = torch.stack([batch.tokens_U.sum() for batch in batches]).sum()
        return float(collectives.all_reduce_sum(labelled)) / shop.policy.pool


def _of_whole(part: Scored, whole: Batch) -> Scored:
    """As if the mean loss of what was scored were that of the whole unit."""
    tokens_U = whole.tokens_U
    if bool((tokens_U == part.tokens_U).all()):
        return part
    return replace(part, losses_U=part.losses_U * tokens_U / part.tokens_U.clamp(min=1), tokens_U=tokens_U)
