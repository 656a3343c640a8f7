"""Which part of every parameter, and of what the optimizer keeps of it, lies on this rank, at any ZeRO stage."""

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from pipeline.engine import collectives
from pipeline.engine.launch import device


class OwnPart(NamedTuple):
    """A slice of a flattened parameter: all of it on every rank at ZeRO 0, disjoint between ranks above."""

    start: int
    numbers: int
    held: Tensor | None
    """What the optimizer inside takes for a parameter, in its precision; None where this rank has no part."""
    first: int
    """Where the slice begins in `held`."""
    group: Mapping[str, Any]
    """The optimizer's settings for it."""

    @property
    def weights(self) -> Tensor:
        """In the optimizer's precision."""
        if self.held is None:
            return torch.zeros(0, device=device())
        return self.held.detach().flatten().narrow(0, self.first, self.numbers).to(device())

    def state(self, engine: DeepSpeedEngine, key: str) -> Tensor:
        """What the optimizer keeps of it; zeros before the first update."""
        if self.held is None:
            return torch.zeros(0, device=device())
        state = engine.basic_optimizer.state[self.held]
        if key not in state:
            return torch.zeros(self.numbers, device=device())
        return state[key].flatten().narrow(0, self.first, self.numbers).to(device())


def own_part(engine: DeepSpeedEngine, parameter: Any) -> OwnPart:
    """This rank's of a trained parameter. Raises ValueError where DeepSpeed keeps it on disk."""
    groups = engine.basic_optimizer.param_groups
    if hasattr(parameter, "ds_id"):
        zero = engine.optimizer
        index, first, numbers = zero.grad_position[zero.get_param_id(parameter)]
        if zero._swappable_optimizer_subgroup(index):
            raise ValueError(
                "DeepSpeed keeps optimizer states on NVMe (offload_optimizer), where they cannot be read in between: "
                "choose influence.precondition none and another estimator than lookahead, or offload to cpu"
            )
        start = min(collectives.rank() * numbers, parameter.ds_numel)
        numbers = min(numbers, parameter.ds_numel - start)  # the last partition is padded
        held = zero.fp32_partitioned_groups_flat[index]
        return OwnPart(start, numbers, held, first, groups[zero.sub_group_to_group_id[index]])
    if not hasattr(parameter, "_hp_mapping"):  # ZeRO 0
        return _whole(engine, parameter)
    mapping = parameter._hp_mapping
    if mapping is None:
        return OwnPart(0, 0, None, 0, {})
    # Not through the mapping's own copy of the state, which is of the last step, not of a checkpoint just loaded. Each
    # group is one flat tensor to the optimizer inside: this rank's part of it.
    group = groups[mapping.param_group_index]
    (held,) = group["params"]
    where = mapping.hp_fragment_address
    return OwnPart(mapping.lp_fragment_address.start, where.numel, held, where.start, group)


def _whole(engine: DeepSpeedEngine, parameter: Any) -> OwnPart:
    """At ZeRO 0. Of bf16 and fp16 the optimizer inside sees copies in float32: one flat tensor for each group, or
    (torch_adam) one for each parameter."""
    numbers, groups = parameter.numel(), engine.basic_optimizer.param_groups
    for group in groups:
        if any(held is parameter for held in group["params"]):
            return OwnPart(0, numbers, parameter, 0, group)
    for members, group in zip(engine.optimizer.fp16_groups, groups, strict=True):
        before = list(itertools.takewhile(lambda member: member is not parameter, members))
        if len(before) == len(members):
            continue
        if len(group["params"]) == len(members):
            return OwnPart(0, numbers, group["params"][len(before)], 0, group)
        (flat,) = group["params"]
        return OwnPart(0, numbers, flat, sum(member.numel() for member in before), group)
    raise AssertionError("a trained parameter is in no group of the optimizer")
