"""One micro-batch on its way through the model to its scorer: the calls, in their order, in one place."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pipeline.config.timing import Stopwatch
from pipeline.data.batch import Batch
from pipeline.influence.estimator import SampleGradients
from pipeline.influence.scorer import Scorer, SketchScorer
from pipeline.tasks.causal_lm import SketchVisitor, Visitor
from pipeline.tasks.classification import losses_of


class MicroBatch:
    """Watched from its forward on; dies once its scorer has taken it in.

    watched = MicroBatch(scorer, batch, timed)
    losses_BT = watched.forward(model)
    watched.before_backward(...); backward       where scorer.after_backward
    watched.add()
    """

    def __init__(self, scorer: Scorer, batch: Batch, timed: Stopwatch, norms: bool = False) -> None:
        self._scorer, self._batch, self._timed = scorer, batch, timed
        self._watch = scorer.watch(batch, norms)

    def forward(self, model: Callable[..., Any]) -> Tensor:
        """The loss of every position, (B, T), attached to the graph."""
        with self._watch:
            logits_BTV = forward_logits(model, self._batch)
            self._watch.before_losses(logits_BTV)
            self._losses_BT, self._logit_sketch = losses_of(logits_BTV, self._batch.labels_BT, self._visitor())
        return self._losses_BT

    def before_backward(self, step_tokens: float | None) -> None:
        """See `Watch.before_backward`."""
        self._watch.before_backward(self._losses_BT, step_tokens)

    def backward_to_inputs(self) -> None:
        """See `Watch.backward_to_inputs`."""
        self._watch.backward_to_inputs(self._losses_BT)

    def add(self, losses_BT: Tensor | None = None) -> dict[str, Tensor]:
        """Hand it to the scorer, with other losses than its forward's where these were of less; returns norms of the
        layers' inputs, where they were asked for."""
        recorded_BT = self._losses_BT if losses_BT is None else losses_BT
        self._scorer.add(self._batch, self._watch, recorded_BT.detach(), self._logit_sketch)
        return dict(self._watch.norms)

    def gradients(self) -> SampleGradients:
        """What an estimator knows of the units, without a scorer taking it in; once."""
        assert self._logit_sketch is not None
        watch: Any = self._watch
        with torch.no_grad():
            return watch.take(self._logit_sketch)

    def _visitor(self) -> Visitor | None:
        visit, timed = self._watch.visit, self._timed
        if visit is None:
            return None

        def timed_visit(gradient_nV: Tensor, labelled_n: Tensor) -> Tensor:
            with timed("logit gradient"):
                return visit(gradient_nV, labelled_n)

        return replace(visit, visit=timed_visit) if isinstance(visit, SketchVisitor) else timed_visit


def hold_validation(
    scorer: SketchScorer, model: Callable[..., Any], batches: Iterable[Batch], timed: Stopwatch
) -> None:
    """These become what `scorer` scores against. Collective where the scorer's sum is; as many batches on each rank."""
    for batch in batches:
        watched = MicroBatch(scorer, batch, timed)
        with torch.set_grad_enabled(scorer.after_backward):
            watched.forward(model)
        watched.before_backward(None)
        watched.backward_to_inputs()
        watched.add()
    scorer.hold_validation()


def forward_logits(model: Callable[..., Any], batch: Batch) -> Tensor:
    """The logits of every position, (B, T, V), or of every sequence, (B, C)."""
    return model(input_ids=batch.input_ids_BT, use_cache=False, **batch.others).logits


def forward_losses(model: Callable[..., Any], batch: Batch) -> Tensor:
    """The loss of every position of a forward that nobody watches, (B, T)."""
    return losses_of(forward_logits(model, batch), batch.labels_BT)[0]
