"""The norm before the LM head, the blocks below it, and what comes after: found in a model by its structure."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The transformer's blocks, from the embedding on. Raises ValueError where there is no list of them."""
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == model.config.num_hidden_layers:
            return module
    raise ValueError(f"{type(model).__name__} has no list of {model.config.num_hidden_layers} blocks")


def final_norm(model: PreTrainedModel) -> nn.Module:
    """The norm before the LM head: the last module of the model, outside of its blocks, that is one by its class's
    name. Raises ValueError where there is none."""
    inside = {id(module) for stack in model.modules() if isinstance(stack, nn.ModuleList) for module in stack.modules()}
    norms = [
        module
        for module in model.modules()
        if "norm" in type(module).__name__.lower() and id(module) not in inside and not list(module.children())
    ]
    if not norms:
        raise ValueError(
            f"{type(model).__name__} has no norm before its LM head, through which estimator 'residual' brings "
            "gradients back; choose another estimator"
        )
    return norms[-1]


class NormRule(NamedTuple):
    """What a norm does: gain x (input, centred or not) / sigma (+ bias), sigma^2 = mean of squares + epsilon."""

    centred: bool
    epsilon: float
    gain: str
    """`weight`, `1 + weight` or `none`."""

    def inverse_sigma(self, input_ND: Tensor) -> Tensor:
        """1 / sigma of every position, (N, 1)."""
        if self.centred:
            input_ND = input_ND - input_ND.mean(1, keepdim=True)
        return (input_ND.square().mean(1, keepdim=True) + self.epsilon).rsqrt()

    def gain_of(self, norm: Any) -> Tensor | float:
        """(D,), a copy: the weight itself may lie among all others, or be given back."""
        if self.gain == "none":
            return 1.0
        weight_D = norm.weight.detach().clone()
        return weight_D if self.gain == "weight" else 1 + weight_D


def norm_rule(norm: Any, input_ND: Tensor, output_ND: Tensor) -> NormRule | None:
    """The rule by which a norm makes this output of this input; None where no position is finite. Raises ValueError
    where none does."""
    stated = getattr(norm, "eps", getattr(norm, "variance_epsilon", None))
    gains = ["weight", "1 + weight"] if getattr(norm, "weight", None) is not None else ["none"]
    centrings = [True] if isinstance(norm, nn.LayerNorm) else [False, True]
    rules = [
        NormRule(centred, epsilon, gain)
        for epsilon in ([stated] if stated is not None else [1e-6, 1e-5])
        for gain in gains
        for centred in centrings
    ]
    if output_ND.is_meta:  # there is nothing to tell it by
        return rules[0]
    finite_N = (input_ND.isfinite() & output_ND.isfinite()).all(1)
    if not finite_N.any():
        return None
    tolerance = 1e-3 if output_ND.dtype in (torch.float32, torch.float64) else 5e-2
    input_ND, output_ND = input_ND[finite_N], output_ND[finite_N].to(input_ND.dtype)
    if getattr(norm, "bias", None) is not None:
        output_ND = output_ND - norm.bias.detach()
    for rule in rules:
        shifted_ND = input_ND - input_ND.mean(1, keepdim=True) if rule.centred else input_ND
        error = (shifted_ND * rule.inverse_sigma(input_ND) * rule.gain_of(norm) - output_ND).abs().max()
        if float(error) <= tolerance * float(output_ND.abs().max()):
            return rule
    raise ValueError(
        f"the norm before the LM head, {type(norm).__name__}, is neither a layer norm nor a root-mean-square norm as "
        "estimator 'residual' knows them; choose another estimator"
    )


class LogitPath(NamedTuple):
    """What a model does to its head's output on the way to the logits: cap tanh(scale output / cap), or without a cap
    scale x output."""

    scale: float = 1.0
    cap: float | None = None

    def to_output(self, gradient_nV: Tensor, logits_nV: Tensor) -> Tensor:
        """The gradient at the head's output for one at the logits."""
        if self.cap is not None:
            gradient_nV = gradient_nV * (1 - (logits_nV.to(gradient_nV.dtype) / self.cap).square())
        return gradient_nV if self.scale == 1.0 else gradient_nV * self.scale


def logit_path(output_NV: Tensor, logits_NV: Tensor, cap: float | None) -> LogitPath | None:
    """The path that these are the ends of; `cap`: the soft cap that the model's config names. None where no position is
    finite. Raises ValueError where it is another."""
    if output_NV.is_meta:  # there is nothing to tell it by
        return LogitPath()
    finite_n = (output_NV[:_SHOWN].isfinite() & logits_NV[:_SHOWN].isfinite()).all(1)
    if not finite_n.any():
        return None
    x_nV, y_nV = (tensor[:_SHOWN][finite_n].detach().double() for tensor in (output_NV, logits_NV))
    tolerance = 1e-5 if output_NV.dtype in (torch.float32, torch.float64) else 2e-2
    straight_nV = y_nV if cap is None else cap * torch.atanh(y_nV / cap)
    scale = float((straight_nV * x_nV).sum() / x_nV.square().sum().clamp(min=1e-30))
    if abs(scale - 1) < tolerance:
        scale = 1.0
    found_nV = scale * x_nV if cap is None else cap * torch.tanh(scale * x_nV / cap)
    if float((found_nV - y_nV).abs().max()) > tolerance * float(y_nV.abs().max()):
        raise ValueError(
            "what this model does to its head's output on the way to the logits is neither a scale nor the soft cap of "
            "its config, so gradients of the head would be wrong; choose influence.estimator lai or lli"
        )
    return LogitPath(scale, cap)


_SHOWN = 64
"""Positions that are enough to tell."""
