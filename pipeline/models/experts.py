"""Mixtures of experts: fused expert weights and their routers, which are bare parameters to the rest of the world."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.layer import Layer, TransposedLayer, shape_of
from pipeline.models.second_moments import Means


class Router(Layer):
    """A linear map to the experts whose module goes on to choose among them: its output is a tuple, in which the scores
    before the choice are found by what they are."""

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """By shape: a module of its own with one bare matrix."""
        own = dict(module.named_parameters(recurse=False))
        matrix = own.get("weight")
        named = any(word in type(module).__name__ for word in ("Router", "Gate"))
        return named and matrix is not None and len(shape_of(matrix)) == 2

    def output_of(self, args: tuple[Any, ...], output: Any) -> Tensor:
        """The linear map's own output among the module's. Raises ValueError where it is not there."""
        module: Any = self.module
        rows_ND = self.input_rows(args)
        for tensor in output if isinstance(output, tuple) else (output,):
            if not isinstance(tensor, Tensor) or tensor.shape[-1] != self.outputs or not tensor.is_floating_point():
                continue
            if tensor.numel() != len(rows_ND) * self.outputs:
                continue
            bias = getattr(module, "bias", None)
            expected_NO = F.linear(rows_ND.to(tensor.dtype), module.weight.to(tensor.dtype))
            expected_NO = expected_NO if bias is None else expected_NO + bias.to(tensor.dtype)
            found_NO = tensor.detach().flatten(0, -2)
            tolerance = 1e-4 if tensor.dtype in (torch.float32, torch.float64) else 5e-2
            if (found_NO - expected_NO).abs().max() <= tolerance * expected_NO.abs().max():
                return tensor
        raise ValueError(
            f"{self.name} ({type(module).__name__}) does not hand out the scores that its weight makes of its input, "
            "so its gradient could not be told; choose influence.estimator lli, loss, random or none"
        )


class Routed(NamedTuple):
    """What one expert matrix saw of a micro-batch: rows n, the position of each, ascending."""

    weight: str
    position_n: Tensor
    input_nD: Tensor
    gradient_nO: Tensor


@dataclass(frozen=True, eq=False)
class Experts(Layer):
    """Fused experts as transformers has them (`use_experts_implementation`): `gate_up_proj` or `up_proj` and
    `down_proj`, (experts, outputs, inputs) or transposed, called with (positions, top-k experts, top-k weights).

    As a layer among others it counts once: its input is the block's, at every position, whatever expert it goes to, its
    weight the first of the two. True gradients are those of every expert's matrices (`matrices`, `routed`).
    """

    matrices: Mapping[str, Layer] = field(default_factory=dict)
    """Of all experts, by `PARAMETER[EXPERT]`."""
    up: str = ""
    down: str = ""
    """The two parameters' names."""

    @property
    def trained(self) -> bool:
        module: Any = self.module
        return module.down_proj.requires_grad

    def means(self, means: Means) -> tuple[Tensor, Tensor]:
        """Of the first weight: every expert's outputs one after the other, and the mean over experts of the inputs."""
        each = [layer.means(means) for name, layer in self.matrices.items() if name.startswith(f"{self.up}[")]
        outputs, inputs = zip(*each, strict=True)
        return torch.cat(outputs), torch.stack(inputs).mean(0)

    def routed(self, args: tuple[Any, ...], gradient: Tensor) -> Iterator[Routed]:
        """Inputs and output gradients of every matrix that saw a position, for a gradient at the module's output.

        The experts' forward is run once more, for the gradient in between: their weights must be whole.
        """
        module: Any = self.module
        hidden_ND, index_Nk, weight_Nk = (tensor.detach() for tensor in args[:3])
        gradient_ND = gradient.flatten(0, -2)
        first = module.gate_up_proj if module.has_gate else module.up_proj
        for expert in range(module.num_experts):
            position_n, slot_n = torch.where(index_Nk == expert)
            if not len(position_n):
                continue
            up, down = (weight[expert].detach() for weight in (first, module.down_proj))
            if module.is_transposed:
                up, down = up.T, down.T
            input_nD = hidden_ND[position_n]
            bias = None
            if module.has_bias:
                bias = (module.gate_up_proj_bias if module.has_gate else module.up_proj_bias)[expert].detach()
            with torch.enable_grad():
                between = F.linear(input_nD, up, bias).requires_grad_()
                inner_nI = module._apply_gate(between) if module.has_gate else module.act_fn(between)
            output_nD = gradient_ND[position_n] * weight_Nk[position_n, slot_n, None].to(gradient_ND.dtype)
            (inner_gradient,) = torch.autograd.grad(inner_nI, between, output_nD @ down)
            yield Routed(f"{self.down}[{expert}]", position_n, inner_nI.detach(), output_nD)
            yield Routed(f"{self.up}[{expert}]", position_n, input_nD, inner_gradient)


def is_experts(module: nn.Module) -> bool:
    """Whether a module keeps fused experts in a form that is known here."""
    flags = ("has_gate", "has_bias", "is_transposed", "num_experts", "down_proj")
    return all(hasattr(module, name) for name in flags) and not getattr(module, "has_post_expert_norm", False)


def experts_of(name: str, module: Any, names: Mapping[int, str]) -> Experts:
    """The experts of a module that `is_experts`. Raises ValueError where only one of their two weights is trained."""
    first, second = (module.gate_up_proj if module.has_gate else module.up_proj), module.down_proj
    if first.requires_grad != second.requires_grad:
        raise ValueError(
            f"of the experts in {name} only one of {names[id(first)]} and {names[id(second)]} is trained, which no "
            "score knows how to tell apart: train both or none (model.trainable)"
        )
    kind = TransposedLayer if module.is_transposed else Layer
    matrices: dict[str, Layer] = {}
    for parameter in (first, second):
        experts, rows, columns = shape_of(parameter)
        outputs, inputs = (columns, rows) if module.is_transposed else (rows, columns)
        for expert in range(experts):
            key = f"{names[id(parameter)]}[{expert}]"
            matrices[key] = kind(name, module, key, inputs, outputs)
    up = next(iter(matrices.values()))
    return Experts(name, module, names[id(first)], up.inputs, up.outputs, matrices, names[id(first)], names[id(second)])
