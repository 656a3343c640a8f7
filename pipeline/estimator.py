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
from pipeline.data import Unit
from pipeline.influence import CountSketch, SquaredGradient, influence_scores, unit_moments
from pipeline.loss import Visitor
from pipeline.model import head_layer, linear_layers
from pipeline.timing import Stopwatch


class Estimator:
    """Scores units by `config.estimator`. Two of them need the forward: `lai` and `lli`; the rest have no `capture`.

    Use, once per micro-batch and on every rank: the forward inside `capture()`, `visit` handed to
    `loss.token_losses`, then `scores`.
    """

    def __init__(
        self, config: InfluenceConfig, model: PreTrainedModel, seed: int, device: torch.device, timed: Stopwatch
    ) -> None:
        self._config, self._seed, self._timed = config, seed, timed
        self._inputs: LayerInputs | None = None
        self._squared: SquaredGradient | None = None
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
    def scores(self, units: list[Unit], losses_U: Tensor, tokens_U: Tensor, feedback_NG: Tensor | None) -> Tensor:
        """Score of each of this rank's units against the global micro-batch; positive helps; NaN for `none`.

        Collective for `lai` and `lli`: one all-reduce of K x G numbers (and V + 1 more under `adam_ema`).
        """
        if self._config.estimator == "loss":
            return -losses_U / tokens_U.clamp(min=1)
        if self._config.estimator == "random":
            numbers = [np.random.default_rng([self._seed, u.position, u.document_ids[0]]).random() for u in units]
            return torch.tensor(numbers, device=losses_U.device)
        if self._inputs is None:
            return torch.full_like(losses_U, torch.nan)
        assert feedback_NG is not None
        with self._timed("moments"):
            keys_NK = self._inputs.take_keys()
            moments_UKG = unit_moments(keys_NK, feedback_NG, [unit.span for unit in units])
            local = [moments_UKG.sum(0).flatten()]
            if self._squared:
                local += [self._square_sum_V, tokens_U.sum().to(self._square_sum_V)[None]]
        with self._timed("reduce"):
            summed = collectives.all_reduce_sum(torch.cat(local))
        with self._timed("moments"):
            reference, *squares = summed.split([part.numel() for part in local])
            if self._squared:
                self._squared.update(squares[0], float(squares[1]))
                self._square_sum_V.zero_()
            return influence_scores(moments_UKG, reference.view_as(moments_UKG[0]), self._config.include_self)

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
