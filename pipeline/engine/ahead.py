"""A model's weights a fraction of an optimizer step further, and back to the bit. DeepSpeed takes no notice."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from pipeline.engine import collectives
from pipeline.engine.own_parts import OwnPart, own_part


class Ahead:
    """Adam's coming step, at `fraction` of its rate, on a gradient of ours: of a loss that no step is taken on.

    Every rank moves its own part of the weights; above ZeRO 0 it also holds that part of the gradient only, 4 bytes a
    number. All calls are collective.
    """

    def __init__(self, engine: DeepSpeedEngine, fraction: float) -> None:
        self._engine, self._fraction = engine, fraction
        self._parameters = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
        self._gradients: list[Tensor] | None = None

    @property
    def holds_gradient(self) -> bool:
        return self._gradients is not None

    def hold_gradient(self, losses: Iterator[tuple[Tensor, Tensor]]) -> None:
        """Hold the gradient of the mean of these losses over all ranks: pairs of a sum, attached to the graph of a
        forward of the module, and over how many it is. It is clipped as the engine clips. Raises FloatingPointError, on
        all ranks, where it is not finite."""
        sums: list[Tensor] | None = None
        count: Tensor | float = 0.0
        for loss, number in losses:
            parts = self._gradient_parts(loss)
            sums = parts if sums is None else [kept.add_(part) for kept, part in zip(sums, parts, strict=True)]
            count = count + number
        assert sums is not None, "a gradient needs a loss"
        assert isinstance(count, Tensor)
        tokens = collectives.all_reduce_sum(count.double())
        gradients = [part / tokens.to(part.dtype) for part in sums]
        squares = torch.stack([part.square().sum(dtype=torch.float64) for part in gradients]).sum()
        if self._engine.zero_optimization_stage():
            squares = collectives.all_reduce_sum(squares)
        norm = squares.sqrt()
        if not bool(norm.isfinite()):
            raise FloatingPointError("the gradient of the reference's loss is not finite, so the weights are broken")
        limit = self._engine.gradient_clipping()
        if limit and norm > limit:
            gradients = [part * (limit / norm).to(part.dtype) for part in gradients]
        self._gradients = gradients

    def _gradient_parts(self, loss: Tensor) -> list[Tensor]:
        """This rank's part of every parameter's gradient of the sum of `loss` over ranks."""
        parts: list[Tensor | None] = [None] * len(self._parameters)
        owned = [own_part(self._engine, parameter) for parameter in self._parameters]

        def keep(index: int, gradient: Tensor) -> Tensor:
            own = owned[index]
            whole = collectives.all_reduce_sum(gradient.detach().flatten().float())
            parts[index] = whole.narrow(0, own.start, own.numbers).clone()
            return gradient.new_zeros(()).expand_as(gradient)  # so that no whole gradient is kept

        hooks = [
            parameter.register_hook(lambda gradient, index=index: keep(index, gradient))
            for index, parameter in enumerate(self._parameters)
        ]
        try:
            # Not `backward`, which DeepSpeed would take for its own.
            torch.autograd.grad(loss, self._parameters, allow_unused=True)
        finally:
            for hook in hooks:
                hook.remove()
        return [
            torch.zeros(own.numbers, device=loss.device) if part is None else part
            for part, own in zip(parts, owned, strict=True)
        ]

    @contextmanager
    def moved(self, along: bool) -> Iterator[None]:
        """Inside, the weights are where the step would take them: along the gradient that is held, or on a gradient of
        zeros, by momentum and decay alone."""
        assert not along or self._gradients is not None, "no gradient is held"
        saved = [_stored(parameter).clone() for parameter in self._parameters]
        try:
            self._move(along)
            yield
        finally:
            for parameter, weights in zip(self._parameters, saved, strict=True):
                _stored(parameter).copy_(weights)
            self._renew()

    @torch.no_grad()
    def _move(self, along: bool) -> None:
        for index, parameter in enumerate(self._parameters):
            own = own_part(self._engine, parameter)
            gradient = self._gradients[index] if along and self._gradients else None
            moved = self._adam(own, gradient)
            stored = _stored(parameter)
            if hasattr(parameter, "ds_id"):
                stored[: own.numbers] = moved.to(stored.dtype)
                continue
            whole = torch.zeros_like(stored).flatten()
            whole[own.start : own.start + own.numbers] = moved.to(stored.dtype)
            if self._engine.zero_optimization_stage():
                whole = collectives.all_reduce_sum(whole)
            stored.copy_(whole.view_as(stored))
        self._renew()

    def _adam(self, own: OwnPart, gradient: Tensor | None) -> Tensor:
        """The weights after Adam's step (arXiv 1412.6980; decoupled decay: 1711.05101) at a fraction of its rate."""
        engine, group, weights = self._engine, own.group, own.weights.float()
        if not own.numbers:
            return weights
        step = engine.global_steps - engine.skipped_steps + 1
        (beta1, beta2), decay, rate = group["betas"], group["weight_decay"], self._fraction * group["lr"]
        mean, square = (own.state(engine, key).float() for key in ("exp_avg", "exp_avg_sq"))
        gradient = torch.zeros_like(weights) if gradient is None else gradient
        decoupled = _decoupled(engine.basic_optimizer, group)
        if decay and not decoupled:
            gradient = gradient + decay * weights
        mean = beta1 * mean + (1 - beta1) * gradient
        square = beta2 * square + (1 - beta2) * gradient.square()
        change = mean / (1 - beta1**step) / ((square / (1 - beta2**step)).sqrt() + group["eps"])
        if decoupled:
            change = change + decay * weights
        return weights - rate * change

    def _renew(self) -> None:
        """ZeRO-3: what is gathered, and small parameters always are, is to be gathered anew."""
        if offload := getattr(self._engine.optimizer, "parameter_offload", None):
            offload.partition_all_parameters()
            if persistent := self._engine.optimizer.persistent_parameters:
                persistent[0].all_gather(persistent)


def _stored(parameter: Any) -> Tensor:
    """What a forward reads: a rank's partition under ZeRO-3, else the whole parameter."""
    return parameter.ds_tensor.data if hasattr(parameter, "ds_id") else parameter.data


def _decoupled(optimizer: Any, group: Any) -> bool:
    """Whether weight decay is AdamW's."""
    if "decoupled_weight_decay" in group:  # torch
        return bool(group["decoupled_weight_decay"])
    return bool(getattr(optimizer, "adam_w_mode", isinstance(optimizer, torch.optim.AdamW)))
