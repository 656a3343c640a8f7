"""From one forward, or for `ghost` its backward too, to the scores of this rank's units."""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.config.schema import InfluenceConfig
from pipeline.config.timing import Stopwatch
from pipeline.data.batch import IGNORE, Batch, Scored, Unit
from pipeline.engine import collectives
from pipeline.influence.adam import adam_factors
from pipeline.influence.appendix_e import RunningMean, SquaredGradient
from pipeline.influence.ghost import LayerGradients
from pipeline.influence.hooks import LayerInputs
from pipeline.influence.layer_weights import LayerWeights
from pipeline.influence.residual import ResidualMoments
from pipeline.influence.scores import influence_scores, unit_moments
from pipeline.influence.sketch import CountSketch, hashed, seed_of
from pipeline.models.heads import head_layer
from pipeline.models.layers import is_conv1d, linear_layers
from pipeline.models.second_moments import SecondMoments
from pipeline.tasks.causal_lm import Visitor


class Pending(NamedTuple):
    """A micro-batch of this rank that is not yet scored."""

    moments_UM: Tensor
    """Where there are no moments, scores."""
    saturation_U: Tensor
    """What Adam's step leaves out of own terms."""
    positions_U: Tensor
    losses_U: Tensor
    tokens_U: Tensor

    def scored(self, scores_U: Tensor, micro_scores_U: Tensor) -> Scored:
        return Scored(self.positions_U, scores_U, micro_scores_U, self.losses_U, self.tokens_U)


class Estimator:
    """Scores units by `config.estimator`: `lai` and `lli` need the forward, `ghost` (`needs_backward`) the backward
    too, the rest neither.

    Use, on every rank: for each micro-batch the forward inside `capture()`, with `visit` handed to `loss.token_losses`;
    for `ghost`, `watch`, the backward; then `add`. At last `scores`, for one or for several micro-batches at a time.
    """

    def __init__(
        self, config: InfluenceConfig, model: PreTrainedModel, seed: int, device: torch.device, timed: Stopwatch
    ) -> None:
        self._config, self._seed, self._timed, self._device = config, seed, timed, device
        self._inputs: LayerInputs | None = None
        self._gradients: LayerGradients | None = None
        self._residual: ResidualMoments | None = None
        self._squared: SquaredGradient | None = None
        self._layer_weights: LayerWeights | None = None
        self._sketch: CountSketch | None = None
        self._scale_V: Tensor | None = None
        self._step_tokens: float | None = None
        self._second: SecondMoments | None = None
        self._held: dict[str, Tensor] = {}
        self._pending: list[Pending] = []
        self._moments = config.estimator not in ("none", "loss", "random")
        self.needs_backward = config.estimator == "ghost"
        reads = config.precondition == "adam_state" or config.layer_weights == "gains"
        self.needs_second_moments = self._moments and reads
        if not self._moments:
            return
        name, head = head_layer(model)
        layers, sketch = linear_layers(model), config.sketch
        if self.needs_backward:
            widths = None if sketch == "none" else (sketch.layers, sketch.gradients)
            self._gradients = LayerGradients(
                model, layers, name, widths, seed, device, partial(timed, "layer gradients")
            )
            self._sketch = self._gradients.logit_sketch()
            return
        if config.estimator == "residual":
            chosen = None if sketch == "none" else sketch
            self._residual = ResidualMoments(model, layers, chosen, seed, device, partial(timed, "layer inputs"))
            self._weigh_layers(self._residual.inputs)
            return
        if config.estimator == "lli":
            layers = {name: head}
        width = None if sketch == "none" else sketch.inputs
        if sketch != "none" and sketch.gradients < head.out_features:
            self._sketch = CountSketch(head.out_features, sketch.gradients, seed_of(seed, "logits"), device)
        self._inputs = LayerInputs(layers, width, seed, device, partial(timed, "layer inputs"))
        names = {id(parameter): parameter_name for parameter_name, parameter in model.named_parameters()}
        self._weights = {layer: (names[id(module.weight)], is_conv1d(module)) for layer, module in layers.items()}
        self._head = name
        if config.precondition == "adam_ema":
            self._squared = SquaredGradient(head.out_features, config.adam_decay, config.adam_power, device)
        self._weigh_layers(self._inputs)

    def _weigh_layers(self, inputs: LayerInputs) -> None:
        kind = self._config.layer_weights
        if kind != "none":
            self._layer_weights = LayerWeights(kind, inputs, self._config.layer_decay, self._device)

    def capture(self, norms: bool = True) -> AbstractContextManager:
        """The `with` for the forward; it ends before the backward. `norms`: whether they are asked for afterwards."""
        if self._layer_inputs:
            self._layer_inputs.measured = norms or self._layer_weights is not None
        return self._residual or self._inputs or self._gradients or nullcontext()

    @property
    def _layer_inputs(self) -> LayerInputs | None:
        return self._residual.inputs if self._residual else self._inputs

    @property
    def visit(self) -> Visitor | None:
        """What `token_losses` is to make of the logit gradient; None where no estimator asks for it."""
        return self._visit if self._moments else None

    def norms(self) -> dict[str, Tensor]:
        """Root mean square norm of each captured layer's input in the last forward, where it was measured."""
        return self._layer_inputs.norms() if self._layer_inputs else {}

    @property
    def preconditioned(self) -> bool:
        """Whether `precondition` was ever called."""
        return self._second is not None

    def precondition(self, second: SecondMoments) -> None:
        """`adam_state`: score in the geometry of these second moments of the optimizer until the next call. (`gains`:
        weigh layers by them.)

        `ghost` scales every layer's input and output gradient (`influence.adam_factors`), and takes from a unit's own
        term what Adam's step takes (`influence.saturation`); `lai` and `lli` scale inputs by the column factors of
        their own layer and the logit gradient by the head's row factors; `residual`: `ResidualMoments.precondition`.
        """
        self._second, means = second, second.means
        if self._layer_weights:
            self._layer_weights.learn({layer: means[name] for layer, (name, _) in self._weights.items()})
        elif self._residual:
            self._residual.precondition(means)
        elif self._gradients:
            self._gradients.precondition(second)
            self._scale_V = self._gradients.logit_scale()
        elif self._inputs:
            for layer, (name, conv1d) in self._weights.items():
                rows, columns = reversed(means[name]) if conv1d else means[name]
                output_scale, self._inputs.scales[layer] = adam_factors(rows, columns)
                if layer == self._head:
                    self._scale_V = output_scale

    def watch(self, batch: Batch, losses_BT: Tensor, step_tokens: float | None) -> None:
        """Before a backward that is to be scored, with the losses that it starts from. `step_tokens`: all labelled
        tokens of the optimizer step that it is part of; None where it only gives a reference."""
        self._step_tokens = step_tokens
        if self._gradients:
            self._gradients.watch(losses_BT, [unit.span for unit in batch.units])

    def backward_to_inputs(self, losses_BT: Tensor) -> None:
        """The watched backward where no weight shall have a gradient of it: only as far as the word embeddings."""
        assert self._gradients is not None
        torch.autograd.grad(losses_BT.sum(), self._gradients.embedded)

    @torch.no_grad()
    def add(self, batch: Batch, losses_BT: Tensor, feedback_NG: Tensor | None) -> None:
        """Take in one micro-batch of this rank. Its moments are kept: 4 bytes a number, K G numbers a unit."""
        losses_U, tokens_U = batch.sum_per_unit(losses_BT), batch.sum_per_unit(batch.labels_BT != IGNORE)
        finite_U = batch.whole_rows(losses_U.isfinite())
        saturation_U = torch.zeros_like(losses_U)
        if not self._moments:
            basis = self._control_scores(batch.units, losses_U, tokens_U)
        else:
            assert feedback_NG is not None
            spans = [unit.span for unit in batch.units]
            with self._timed("moments"):
                if self._layer_weights:
                    self._layer_weights.add(tokens_U.sum())
                if self._gradients:
                    if self._step_tokens and self._config.include_self:
                        saturation_U = self._gradients.own_saturation(batch.labels_BT, losses_BT, self._step_tokens)
                    basis = self._gradients.take_moments(feedback_NG)
                elif self._residual:
                    basis = self._residual.take_moments(feedback_NG, spans)
                else:
                    assert self._inputs is not None
                    basis = unit_moments(self._inputs.take_keys(), feedback_NG, spans)
                basis = basis.flatten(1)
                finite_U = batch.whole_rows(finite_U & basis.sum(1).isfinite())
                # One sample that is not finite must not make all scores so.
                basis = basis.where(finite_U[:, None], 0.0)
                saturation_U = saturation_U.where(finite_U, 0.0)
        losses_U = losses_U.where(finite_U, torch.nan)
        self._pending.append(Pending(basis, saturation_U, batch.positions_U, losses_U, tokens_U))

    @torch.no_grad()
    def scores(self) -> list[Scored]:
        """This rank's units of every micro-batch added since the last call, against `config.reference`: `batch`, all of
        these on all ranks; `running`, an exponential mean of that over the calls so far, this one included;
        `validation`, what `hold_validation` holds.

        Positive helps; NaN for `none`. A unit that is not finite has NaN as its loss, and so have the others of its
        sequence. Collective where moments are needed: one all-reduce of K x G numbers a micro-batch (and V under
        `adam_ema`, one a layer for `layer_weights`; none against a validation set).
        """
        pending, self._pending = self._pending, []
        if not self._moments:
            return [part.scored(part.moments_UM, part.moments_UM) for part in pending]
        micro = self._references(pending)
        with self._timed("scores"):
            together, share = self._reference(micro)
            kept, removed = (share, 0.0) if self._config.include_self else (0.0, share)
            scored = []
            for part, micro_M in zip(pending, micro, strict=True):
                taken_U = kept * part.saturation_U
                scores_U = influence_scores(part.moments_UM, together, removed) - taken_U
                micro_U = scores_U
                if self._config.reference == "batch" and len(micro) > 1:
                    micro_U = influence_scores(part.moments_UM, micro_M, removed) - taken_U
                scored.append(part.scored(scores_U, micro_U))
            return scored

    @property
    def reduced(self) -> int:
        """Numbers that `scores` would now hand to its all-reduce; nothing is summed up against a validation set."""
        means = self._running_means()
        if not self._moments or (self._config.reference == "validation" and not means):
            return 0
        moments = sum(part.moments_UM[0].numel() for part in self._pending)
        return moments + (sum(len(mean.raw_C) for mean in means) + 1 if means else 0)

    @property
    def holds_validation(self) -> bool:
        """Whether there is a moment of the validation set to score against."""
        return "validation" in self._held

    @torch.no_grad()
    def hold_validation(self) -> None:
        """What was added since `scores` becomes the reference, until this is called again. Collective."""
        pending, self._pending = self._pending, []
        local = torch.stack([part.moments_UM.sum(0) for part in pending]).sum(0)
        with self._timed("reduce"):
            self._held["validation"] = collectives.all_reduce_sum(local)
        for mean in self._running_means():  # of what is trained on
            mean.take()

    def _running_means(self) -> list[RunningMean]:
        """What is kept of earlier micro-batches."""
        found = (self._squared, self._layer_weights and self._layer_weights.squares)
        return [mean for mean in found if mean]

    def _references(self, pending: list[Pending]) -> list[Tensor]:
        """The moment of each micro-batch, on all ranks together. Collective."""
        with self._timed("scores"):
            local = [part.moments_UM.sum(0) for part in pending]
            means = self._running_means()
            if means:
                tokens = torch.stack([part.tokens_U.sum() for part in pending]).sum()
                local += [*(mean.take() for mean in means), tokens.to(local[0])[None]]
        if self._config.reference == "validation" and not means:
            return local
        with self._timed("reduce"):
            summed = list(collectives.all_reduce_sum(torch.cat(local)).split([part.numel() for part in local]))
        for mean, sum_C in zip(means, summed[len(pending) :], strict=False):
            mean.update(sum_C, float(summed[-1]))
        self._go_by_means()
        return summed[: len(pending)]

    def _go_by_means(self) -> None:
        if self._squared:
            self._scale_V = self._squared.scale_V
        if self._layer_weights:
            self._layer_weights.weigh()

    def _reference(self, micro: list[Tensor]) -> tuple[Tensor, float]:
        """The moment that scores are against, and how much of a unit's own is in it."""
        if self._config.reference == "validation":
            return self._held["validation"], 0.0
        reference = torch.stack(micro).sum(0) if len(micro) > 1 else micro[0]
        share = 1.0
        if self._config.reference == "running":
            decay = self._config.running_decay
            count = self._held.get("count", torch.zeros((), dtype=torch.float64)) + 1
            # Bias-corrected: the weights of all moments so far add up to 1.
            share = (1 - decay) / (1 - decay ** float(count))
            if "running" in self._held:
                reference = self._held["running"].lerp(reference, share)
            self._held |= {"running": reference, "count": count}
        return reference, share

    def _control_scores(self, units: list[Unit], losses_U: Tensor, tokens_U: Tensor) -> Tensor:
        if self._config.estimator == "loss":
            return -losses_U / tokens_U.clamp(min=1)
        if self._config.estimator == "random":
            numbers = [np.random.default_rng([self._seed, u.position, u.document_ids[0]]).random() for u in units]
            return torch.tensor(numbers, device=losses_U.device)
        return torch.full_like(losses_U, torch.nan)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to score as this one would; the same on every rank."""
        state: dict[str, Any] = {
            "config": repr(self._config),
            "held": {name: tensor.cpu() for name, tensor in self._held.items()},
        }
        if self._second:
            means = {name: (rows.cpu(), columns.cpu()) for name, (rows, columns) in self._second.means.items()}
            state["second_moments"] = means, self._second.beta, self._second.updates
        return state | {"running": [(mean.raw_C.cpu(), mean.updates) for mean in self._running_means()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state; what was scored otherwise before has no bearing, and all is gathered anew."""
        if state.get("config") != repr(self._config):
            return
        self._held = {name: tensor.to(self._device) for name, tensor in state["held"].items()}
        if "second_moments" in state:
            means, *decay = state["second_moments"]
            move = {name: (rows.to(self._device), columns.to(self._device)) for name, (rows, columns) in means.items()}
            self.precondition(SecondMoments(move, *decay))
        for mean, saved in zip(self._running_means(), state["running"], strict=True):
            mean.load(*saved)
        self._go_by_means()

    def _visit(self, gradient_nV: Tensor, labelled_n: Tensor) -> Tensor:
        with self._timed("logit gradient"):
            if self._squared:
                self._squared.add(labelled_n.to(gradient_nV) @ gradient_nV.square())
            if self._residual:
                return self._residual.visit(gradient_nV)
            return hashed(self._sketch, gradient_nV, self._scale_V)
