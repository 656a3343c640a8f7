"""What samples really do: true gradients and real optimizer steps, in float64."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.config.deepspeed_json import read_deepspeed_config
from pipeline.config.schema import Config
from pipeline.data.batch import IGNORE, Batch
from pipeline.engine import checkpoint_files
from pipeline.evidence.config import EXACT, FidelityRun
from pipeline.evidence.shapley import permutation_shapley, row_sums
from pipeline.models.second_moments import Moments
from pipeline.tasks.causal_lm import token_losses

# One optimizer step


@dataclass(frozen=True)
class SGD:
    """weights - lr * gradient."""

    learning_rate: float

    def __call__(self, weights_P: Tensor, gradient_P: Tensor) -> Tensor:
        return weights_P - self.learning_rate * gradient_P


@dataclass(frozen=True)
class Adam:
    """torch's Adam (AdamW where `decoupled`) from the moments after `step` updates, which stay as they are:

    m' = b1 m + (1 - b1) g,  v' = b2 v + (1 - b2) g^2,  t = step + 1,
    weights - lr * (m' / (1 - b1^t)) / (sqrt(v' / (1 - b2^t)) + eps), after the weight decay.
    """

    learning_rate: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    decoupled: bool
    exp_avg_P: Tensor
    exp_avg_sq_P: Tensor
    step: int

    def __call__(self, weights_P: Tensor, gradient_P: Tensor) -> Tensor:
        first, second = self.betas
        if self.decoupled:
            weights_P = weights_P * (1 - self.learning_rate * self.weight_decay)
        else:
            gradient_P = gradient_P + self.weight_decay * weights_P
        mean_P = self.exp_avg_P.lerp(gradient_P, 1 - first) / (1 - first ** (self.step + 1))
        square_P = self.exp_avg_sq_P * second + gradient_P.square() * (1 - second)
        root_P = (square_P / (1 - second ** (self.step + 1))).sqrt_()
        return weights_P - self.learning_rate * mean_P / (root_P + self.eps)

    @property
    def denominator_P(self) -> Tensor:
        """sqrt(v / (1 - b2^step)) + eps: the geometry of the last step. Needs at least one update."""
        return (self.exp_avg_sq_P / (1 - self.betas[1] ** self.step)).sqrt() + self.eps


# Samples as players


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that P runs over, by name, tied ones once; in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def sample_gradients(model: nn.Module, batch: Batch) -> Tensor:
    """The gradient of each sequence's summed loss, (B, P), in the model's precision: one backward a sequence."""
    parameters = list(trainable(model).values())
    gradients_BP = parameters[0].new_zeros(len(batch.input_ids_BT), sum(p.numel() for p in parameters))
    for gradient_P, ids_T, labels_T in zip(gradients_BP, batch.input_ids_BT, batch.labels_BT, strict=True):
        logits_1TV = model(input_ids=ids_T[None], use_cache=False).logits
        losses_1T, _ = token_losses(logits_1TV, labels_T[None])
        parts = torch.autograd.grad(losses_1T.sum(), parameters, allow_unused=True)
        for slot, part in zip(gradient_P.split([p.numel() for p in parameters]), parts, strict=True):
            if part is not None:
                slot.copy_(part.flatten())
    return gradients_BP


def inner_products(
    gradients_BP: Tensor, denominator_P: Tensor | None = None, target_ZP: Tensor | None = None
) -> Tensor:
    """<g_j, g_z>, or in Adam's geometry <g_j / denominator, g_z>, (B, Z) float64; positive helps. Targets are the
    sequences themselves, or those of `target_ZP`.

    Of gradients of summed losses. Times lr / tokens^2 (under Adam also (1 - b1) / (1 - b1^t)) it is, to first order in
    the step, what `StepEffect` measures.
    """
    scaled_BP = gradients_BP if denominator_P is None else gradients_BP / denominator_P
    return (scaled_BP @ (gradients_BP if target_ZP is None else target_ZP).T).double()


class FirstOrderEffect:
    """The game of `StepEffect` in the limit of a small learning rate: losses fall along their gradients, by the update
    that the coalition's gradient makes, whatever the optimizer makes of it.

    game(C)_z = <gradient of target z's loss, weights after nobody's step - weights after C's>, to first order the same
    units. No forward is run. Under SGD its Shapley values are `inner_products`; under Adam they are so up to what a
    coalition's gradient does to its own second moment. Targets are the sequences of the batch, or `target`: gradients
    of the summed losses of others, (Z, P), and how many tokens these have.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Batch,
        gradients_BP: Tensor,
        step: Callable[[Tensor, Tensor], Tensor],
        target: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self._step = step
        self._weights_P = nn.utils.parameters_to_vector(trainable(model).values()).detach()
        self._gradients_BP = gradients_BP / (batch.labels_BT != IGNORE).sum()
        self._target_ZP = self._gradients_BP if target is None else target[0] / target[1]
        self._nobody_P = step(self._weights_P, torch.zeros_like(self._weights_P))

    def __call__(self, coalition_B: Tensor) -> Tensor:
        gradient_P = coalition_B.to(self._gradients_BP) @ self._gradients_BP
        moved_P = self._nobody_P - self._step(self._weights_P, gradient_P)
        return (self._target_ZP @ moved_P).double().cpu()


class StepEffect:
    """The game of one optimizer step: by how much do the samples that take part lower the loss of the targets?

    game(C)_z = loss of target z after a step that nobody takes part in, minus its loss after a step with the gradient
    sum over j in C of g_j / tokens, `tokens` being those of the whole batch, so that coalitions add up. Nobody's step
    is still a step: momentum and weight decay are the same for all coalitions and count for none. Losses are sums over
    a target's labelled tokens, over the tokens of all targets (nats): summed over targets, the mean loss. Positive
    helps. Targets are the sequences of `target`, by default the batch's own. There is no gradient clipping, which would
    make the coalitions' gradients not add up.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Batch,
        gradients_BP: Tensor,
        step: Callable[[Tensor, Tensor], Tensor],
        target: Batch | None = None,
    ) -> None:
        self._model, self._step, self._target = model, step, target or batch
        self._parameters = trainable(model)
        self._weights_P = nn.utils.parameters_to_vector(self._parameters.values()).detach()
        self._gradients_BP = gradients_BP / (batch.labels_BT != IGNORE).sum()
        self._nobody_Z = self._losses(torch.zeros(len(gradients_BP), dtype=torch.bool))

    def __call__(self, coalition_B: Tensor) -> Tensor:
        return self._nobody_Z - self._losses(coalition_B)

    @torch.no_grad()
    def _losses(self, coalition_B: Tensor) -> Tensor:
        gradient_P = coalition_B.to(self._gradients_BP) @ self._gradients_BP
        stepped_P = self._step(self._weights_P, gradient_P)
        parts = stepped_P.split([parameter.numel() for parameter in self._parameters.values()])
        weights = {
            name: part.view_as(parameter)
            for (name, parameter), part in zip(self._parameters.items(), parts, strict=True)
        }
        inputs = {"input_ids": self._target.input_ids_BT, "use_cache": False}
        # Tied weights are tied in it, too, and the model's own stay as they are.
        logits_ZTV = torch.func.functional_call(self._model, weights, kwargs=inputs).logits
        losses_ZT, _ = token_losses(logits_ZTV, self._target.labels_BT)
        return (losses_ZT.double().sum(1) / (self._target.labels_BT != IGNORE).sum()).cpu()


@dataclass(frozen=True)
class Target:
    """Whose loss counts in place of the batch's own: sequences, and the gradient of their summed loss, (1, P)."""

    batch: Batch
    gradient_1P: Tensor

    @property
    def tokens(self) -> Tensor:
        return (self.batch.labels_BT != IGNORE).sum()


def target_at(model: nn.Module, batches: list[Batch]) -> Target:
    """The sequences of these batches, with their gradient at the model's weights."""
    ids, labels = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("input_ids_BT", "labels_BT"))
    gradient_1P = torch.stack([sample_gradients(model, batch).sum(0) for batch in batches]).sum(0)[None]
    return Target(Batch(ids, labels, []), gradient_1P)


Values = dict[tuple[str, bool], Tensor]
"""By reference and whether the self-influence is in; (B,) each."""


# References


def reference_values(
    config: FidelityRun,
    model: PreTrainedModel,
    batch: Batch,
    adam: Adam | None,
    learning_rate: float,
    index: int,
    target: Target | None = None,
) -> tuple[Values, dict[str, Any]]:
    """What each sample of the `index`-th batch does, to the batch or to `target`, by every reference that applies, and
    how Shapley's went."""
    own_terms = config.fidelity.own_terms
    gradient_1P = None if target is None else target.gradient_1P
    looked_at: dict[type, dict[str, Any]] = {StepEffect: {}, FirstOrderEffect: {}}
    if target is not None:
        looked_at[StepEffect] = {"target": target.batch}
        looked_at[FirstOrderEffect] = {"target": (target.gradient_1P, target.tokens)}
    values: Values = {}
    details: dict[str, Any] = {}
    gradients_BP = sample_gradients(model, batch)
    games = {
        "shapley_sgd": (StepEffect, SGD(learning_rate)),
        "shapley_adam": (StepEffect, adam),
        "shapley_adam_limit": (FirstOrderEffect, adam),
    }
    for name in config.fidelity.references:
        if name == EXACT:
            continue  # not of the samples, but of the other form of an estimator
        if name == "ip":
            effects = inner_products(gradients_BP, None, gradient_1P).cpu()
        elif name == "ip_adam":
            if adam is None or adam.step == 0:
                continue  # Adam has no geometry before its first update
            effects = inner_products(gradients_BP, adam.denominator_P, gradient_1P).cpu()
        else:
            game, rule = games[name]
            if rule is None or (game is StepEffect and index >= config.fidelity.shapley_batches):
                continue
            started = time.perf_counter()
            estimate = permutation_shapley(
                game(model, batch, gradients_BP, rule, **looked_at.get(game, {})),
                len(gradients_BP),
                config.seed,
                config.fidelity.permutations,
                config.fidelity.standard_error,
                lambda effects: torch.stack([row_sums(effects, own) for own in own_terms]),
            )
            effects = estimate.effects_nZ
            spreads = [float(row_sums(effects, own).std()) for own in own_terms]
            details[name] = {
                "permutations": estimate.permutations,
                "learning_rate": learning_rate,
                "standard_error": {
                    "in" if own else "out": float(errors.max()) / spread if spread else None
                    for own, errors, spread in zip(own_terms, estimate.errors_Rn, spreads, strict=True)
                },
                "seconds": round(time.perf_counter() - started, 1),
            }
        values |= {(name, own): row_sums(effects, own) for own in own_terms}
    return values, details


def peak_learning_rate(config: Config) -> float:
    """Of the optimizer and its schedule: what `start`, where no step has set another, is measured with."""
    settings = read_deepspeed_config(config)
    schedule = settings.get("scheduler", {}).get("params", {})
    return schedule.get("warmup_max_lr", settings["optimizer"].get("params", {}).get("lr", 1e-3))


def adam_step(config: Config, model: nn.Module, moments: Moments | None, learning_rate: float) -> Adam | None:
    """The run's Adam with these moments (none: before the first update); None where the run has another optimizer."""
    optimizer = read_deepspeed_config(config)["optimizer"]
    kind, settings = optimizer["type"].lower(), optimizer.get("params", {})
    if kind not in ("adam", "adamw"):
        return None
    parameters = trainable(model)
    zero = {name: {key: torch.zeros_like(p) for key in checkpoint_files.MOMENTS} for name, p in parameters.items()}
    states = moments or zero
    device = next(iter(parameters.values())).device
    mean_P, square_P = (
        torch.cat([states[name][key].detach().to(device).double().flatten() for name in parameters])
        for key in checkpoint_files.MOMENTS
    )
    first, second = settings.get("betas", (0.9, 0.999))
    decoupled = kind == "adamw" or settings.get("adam_w_mode", True)
    decay = settings.get("weight_decay", 0.01 if settings.get("torch_adam") and decoupled else 0.0)
    step = int(next(iter(moments.values()))["step"]) if moments else 0
    eps = settings.get("eps", 1e-8)
    return Adam(learning_rate, (first, second), eps, decay, decoupled, mean_P, square_P, step)
