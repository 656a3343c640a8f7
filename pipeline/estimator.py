"""From one forward to the scores of this rank's units: layer inputs, logit gradient, moments, one all-reduce."""

import zlib
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline import collectives
from pipeline.capture import LayerInputs
from pipeline.config import InfluenceConfig
from pipeline.data import Batch, Scored, Unit
from pipeline.influence import CountSketch, SquaredGradient, influence_scores, unit_moments
from pipeline.loss import IGNORE, Visitor
from pipeline.model import head_layer, linear_layers
from pipeline.timing import Stopwatch


class Estimator:
    """Scores units by `config.estimator`. Two of them need the forward: `lai` and `lli`; the rest have no `capture`.

    Use, on every rank: for each micro-batch the forward inside `capture()`, `visit` handed to `loss.token_losses`, then
    `add`; and `scores` for one or for several micro-batches at a time.
    """

    def __init__(
        self, config: InfluenceConfig, model: PreTrainedModel, seed: int, device: torch.device, timed: Stopwatch
    ) -> None:
        self._config, self._seed, self._timed = config, seed, timed
        self._inputs: LayerInputs | None = None
        self._squared: SquaredGradient | None = None
        self._pending: list[tuple[Tensor, Tensor, Tensor]] = []
        if config.estimator not in ("lai", "lli"):
            return
        name, head = head_layer(model)
        vocabulary = head.out_features
        layers = linear_layers(model) if config.estimator == "lai" else {name: head}
        width, self._sketch = None, None
        if config.sketch != "none":
            width = config.sketch.inputs
            if config.sketch.gradients < vocabulary:
                seed_of_logits = zlib.crc32(f"{seed}/logits".encode())
                self._sketch = CountSketch(vocabulary, config.sketch.gradients, seed_of_logits, device)
        self._inputs = LayerInputs(layers, width, seed, partial(timed, "layer inputs"))
        if config.precondition == "adam_ema":
            self._squared = SquaredGradient(vocabulary, config.adam_decay, config.adam_power, device)
            self._square_sum_V = torch.zeros(vocabulary, device=device)

    def capture(self) -> AbstractContextManager:
        """The `with` for the forward; it ends before the backward."""
        return self._inputs or nullcontext()

    @property
    def visit(self) -> Visitor | None:
        """What `token_losses` is to make of the logit gradient; None where no estimator asks for it."""
        return self._visit if self._inputs else None

    def norms(self) -> dict[str, Tensor]:
        """Root mean square norm of each captured layer's input in the last forward."""
        return self._inputs.norms() if self._inputs else {}

    @torch.no_grad()
    def add(self, batch: Batch, losses_BT: Tensor, feedback_NG: Tensor | None) -> None:
        """Take in one micro-batch of this rank after its forward. Its moments are kept: 4 K G bytes a unit."""
        losses_U, tokens_U = batch.sum_per_unit(losses_BT), batch.sum_per_unit(batch.labels_BT != IGNORE)
        finite_U = batch.whole_rows(losses_U.isfinite())
        if self._inputs is None:
            basis = self._control_scores(batch.units, losses_U, tokens_U)
        else:
            assert feedback_NG is not None
            with self._timed("moments"):
                basis = unit_moments(self._inputs.take_keys(), feedback_NG, [unit.span for unit in batch.units])
                finite_U = batch.whole_rows(finite_U & basis.sum((1, 2)).isfinite())
                # One sample that is not finite must not make all scores so.
                basis = basis.where(finite_U[:, None, None], 0.0)
        self._pending.append((basis, losses_U.where(finite_U, torch.nan), tokens_U))

    @torch.no_grad()
    def scores(self) -> list[Scored]:
        """This rank's units of every micro-batch added since the last call; the reference is all of these on all ranks.

        Positive helps; NaN for `none`. A unit that is not finite has NaN as its loss, and so have the others of its
        sequence. Collective for `lai` and `lli`: one all-reduce of K x G numbers a micro-batch (and V + 1 under
        `adam_ema`).
        """
        pending, self._pending = self._pending, []
        if self._inputs is None:
            return [Scored(scores_U, scores_U, losses_U, tokens_U) for scores_U, losses_U, tokens_U in pending]
        with self._timed("moments"):
            local = [moments_UKG.sum(0).flatten() for moments_UKG, *_ in pending]
            if self._squared:
                tokens = torch.stack([tokens_U.sum() for *_, tokens_U in pending]).sum()
                local += [self._square_sum_V, tokens.to(self._square_sum_V)[None]]
        with self._timed("reduce"):
            summed = collectives.all_reduce_sum(torch.cat(local)).split([part.numel() for part in local])
        with self._timed("moments"):
            if self._squared:
                if summed[-2].isfinite().all():
                    self._squared.update(summed[-2], float(summed[-1]))
                self._square_sum_V.zero_()
            references = [part.view_as(pending[0][0][0]) for part in summed[: len(pending)]]
            reference_KG = torch.stack(references).sum(0) if len(references) > 1 else references[0]
            scored = []
            for (moments_UKG, losses_U, tokens_U), micro_KG in zip(pending, references, strict=True):
                scores_U = influence_scores(moments_UKG, reference_KG, self._config.include_self)
                micro_U = scores_U
                if len(references) > 1:
                    micro_U = influence_scores(moments_UKG, micro_KG, self._config.include_self)
                scored.append(Scored(scores_U, micro_U, losses_U, tokens_U))
            return scored

    def _control_scores(self, units: list[Unit], losses_U: Tensor, tokens_U: Tensor) -> Tensor:
        if self._config.estimator == "loss":
            return -losses_U / tokens_U.clamp(min=1)
        if self._config.estimator == "random":
            numbers = [np.random.default_rng([self._seed, u.position, u.document_ids[0]]).random() for u in units]
            return torch.tensor(numbers, device=losses_U.device)
        return torch.full_like(losses_U, torch.nan)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to score as this one would; the same on every rank."""
        squared = self._squared
        return {"mean_square": squared.mean_V.cpu(), "updates": squared.updates} if squared else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._squared and state:
            self._squared.load(state["mean_square"], state["updates"])

    def _visit(self, gradient_nV: Tensor) -> Tensor:
        with self._timed("logit gradient"):
            if self._squared:
                self._square_sum_V += gradient_nV.square().sum(0)
                if self._squared.scale_V is not None:
                    gradient_nV *= self._squared.scale_V
            return self._sketch(gradient_nV) if self._sketch else gradient_nV
