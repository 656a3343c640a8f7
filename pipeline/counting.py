"""What a step costs, counted instead of timed: floating-point operations, bytes on the wire, memory at its peak."""

import ctypes
import re
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from pipeline import engine

PHASES = ("forward", "backward", "optimizer")


class Work(TorchDispatchMode):
    """Counts what operators do inside the `with`, on this rank, in steps of `model`, by phase:

    `flops`: of matrix products, attention and convolutions, 2 for a multiply and add; `elements`: of all other
    operators, the size of the largest argument or result (copies and random accesses count, views do not);
    `wire`: bytes that this rank hands to each kind of collective, whatever its algorithm then sends.

    `backward` is what autograd runs, recomputed forwards included, `optimizer` what follows it until the model's next
    forward, `forward` the rest. Scoring is the difference between a scored step and a plain one. Not seen: kernels
    outside of torch's dispatcher (DeepSpeed's fused and CPU Adam), and bytes between GPU and CPU.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model, self._phase = model, "forward"
        self.flops, self.elements, self.wire = Counter[str](), Counter[str](), Counter[str]()

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
        if (formula := _FORMULAS.get(func.overloadpacket)) is not None:
            self.flops[phase] += formula(*args, **kwargs, out_val=result)
        elif not func.is_view and not name.startswith(("empty", "new_empty", "_local_scalar", "is_same_size")):
            self.elements[phase] += max(map(_numbers, (*args, *kwargs.values(), result)), default=0)
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
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad_out.shape, query.shape, key.shape, value.shape)


# torch knows the formulas of attention on accelerators only.
_FORMULAS = dict(flop_registry) | {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class PeakMemory:
    """Most bytes in use inside the `with`, as `peak`: allocated on the accelerator; on the CPU the process's resident
    set, by the kernel's high-water mark, which is reset, or, where it cannot be, by looking every few milliseconds.

    glibc's allocator gives back before what it held on to, and maps all but small blocks by themselves in there: they
    go back as they are freed, and the peak is of what is in use, not of a heap with holes. That is slow: not for timed
    steps.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.peak = 0

    def __enter__(self) -> Self:
        if self._device.type != "cpu":
            engine.reset_peak_memory()
            return self
        _map_blocks_from(2**16)
        self._sampler: threading.Thread | None = None
        try:
            _CLEAR.write_text("5")
        except OSError:
            self._stop = threading.Event()
            self._sampler = threading.Thread(target=self._sample, daemon=True)
            self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._device.type != "cpu":
            self.peak = engine.peak_memory()
            return
        _map_blocks_from(_LARGEST_THRESHOLD)
        if self._sampler:
            self._stop.set()
            self._sampler.join()
        else:
            self.peak = int(re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())[1]) * 1024  # type: ignore[index]

    def _sample(self) -> None:
        import psutil

        process = psutil.Process()
        while True:
            self.peak = max(self.peak, process.memory_info().rss)
            if self._stop.wait(0.003):
                return


_MMAP_THRESHOLD, _LARGEST_THRESHOLD = -3, 2**25
"""M_MMAP_THRESHOLD, and where glibc itself would have it after a while."""


def _map_blocks_from(size: int) -> None:
    with suppress(AttributeError, OSError):  # glibc's only
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, size)
        libc.malloc_trim(0)


_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def bytes_held(*owners: object) -> int:
    """Bytes of all tensors that these objects of the pipeline hold, modules and their parameters left out."""
    found: dict[int, int] = {}
    seen: set[int] = set()
    queue: list[Any] = list(owners)
    while queue:
        item = queue.pop()
        if id(item) in seen or isinstance(item, nn.Module | nn.Parameter | type):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            storage = item.untyped_storage()
            found[storage._cdata] = storage.nbytes()
        elif isinstance(item, dict):
            queue += item.values()
        elif isinstance(item, list | tuple | set):
            queue += item
        elif type(item).__module__.startswith("pipeline."):
            queue += vars(item).values()
    return sum(found.values())
