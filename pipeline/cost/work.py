"""What a step costs, counted instead of timed: floating-point operations and bytes on the wire."""

from collections import Counter
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

PHASES = ("forward", "backward", "optimizer")


class Work(TorchDispatchMode):
    """Counts what operators do inside the `with`, on this rank, in steps of `model`, by phase:

    `flops`: of matrix products, attention and convolutions, 2 for a multiply and add; `elements`: of all other
    operators, the size of the largest argument or result (copies and random accesses count, views do not); `launches`:
    operators of both kinds, each a kernel or a few for the CPU to start; `wire`: bytes that this rank hands to each
    kind of collective, whatever its algorithm then sends.

    `backward` is what autograd runs, recomputed forwards included, `optimizer` what follows it until the model's next
    forward, `forward` the rest. Scoring is the difference between a scored step and a plain one. Not seen: kernels
    outside of torch's dispatcher (DeepSpeed's fused and CPU Adam), and bytes between GPU and CPU.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model, self._phase = model, "forward"
        self.flops, self.elements, self.wire = Counter[str](), Counter[str](), Counter[str]()
        self.launches = Counter[str]()

    def __enter__(self) -> Self:
        self._hook = self._model.register_forward_pre_hook(self._begin_forward)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hook.remove()

    def _begin_forward(self, *_: object) -> None:
        if not _in_backward():  # there it is recomputation
            self._phase = "forward"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        namespace, _, name = func.name().partition("::")
        if namespace == "c10d":
            if kind := next((kind for kind in _COLLECTIVES if name.lstrip("_").startswith(kind)), None):
                has_output_first = kind in ("allgather", "reduce_scatter", "alltoall")
                self.wire[_COLLECTIVES[kind]] += _bytes(args[has_output_first])
            return result
        phase = "backward" if _in_backward() else self._phase
        if phase == "backward":
            self._phase = "optimizer"  # until the next forward
        if (formula := FORMULAS.get(func.overloadpacket)) is not None:
            self.flops[phase] += formula(*args, **kwargs, out_val=result)
            self.launches[phase] += 1
        elif not func.is_view and not name.startswith(("empty", "new_empty", "_local_scalar", "is_same_size")):
            size = max(map(_numbers, (*args, *kwargs.values(), result)), default=0)
            self.elements[phase] += size
            self.launches[phase] += size > 0
        return result


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _numbers(argument: Any) -> int:
    return sum(leaf.numel() for leaf in tree_leaves(argument) if isinstance(leaf, Tensor))


def _bytes(argument: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(argument) if isinstance(leaf, Tensor))


# By how torch's names for them begin; barriers and receivers hand over nothing.
_COLLECTIVES = {
    "allreduce": "all_reduce",
    "allgather": "all_gather",
    "alltoall": "all_to_all",
    "reduce_scatter": "reduce_scatter",
    "reduce": "reduce",
    "broadcast": "broadcast",
    "gather": "gather",
    "scatter": "scatter",
    "send": "send",
}


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, *_for_each_head(query, key, value))


def _attention_backward(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad_out.shape, query.shape, *_for_each_head(query, key, value))


def _for_each_head(query: Tensor, *keys: Tensor) -> list[tuple[int, ...]]:
    """The shapes of keys and values that several heads share, as each head reads them: (B, heads, T, width)."""
    return [(len(key), query.shape[1], *key.shape[2:]) for key in keys]


# torch has no formulas of attention on the CPU, and up to 2.11 none where heads share keys.
FORMULAS = dict(flop_registry)
for _kind in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu"):
    FORMULAS[getattr(torch.ops.aten, f"_scaled_dot_product_{_kind}")] = _attention
    FORMULAS[getattr(torch.ops.aten, f"_scaled_dot_product_{_kind}_backward")] = _attention_backward
