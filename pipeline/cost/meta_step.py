"""One micro-batch counted on tensors without values: the forward, backward and estimators of training, run on torch's
meta device, where a tensor of any size takes no memory."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from pipeline.config.timing import Stopwatch
from pipeline.cost.memory import bytes_held
from pipeline.cost.work import Work
from pipeline.data.batch import Batch
from pipeline.influence.micro_batch import MicroBatch
from pipeline.influence.scorer import Scorer
from pipeline.tasks.weighted_mean import weighted_mean

META = torch.device("meta")


class MetaStep(Work):
    """`Work` on tensors without values. Also counts

    `low_flops`, those of `flops` in 16-bit numbers; `traffic`, bytes that all other operators read and write, none
    fused; `live` and `peak`, bytes of all tensors made inside the `with` that are alive, now and at most.

    A flag or number that is asked of such a tensor is 1. Weights get no gradient, which ZeRO has its own place for.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.low_flops = self.traffic = self.live = self.peak = 0
        self._alive: set[int] = set()

    def __enter__(self) -> Self:
        weights = self._model.parameters()
        self._forgetting = [weight.register_post_accumulate_grad_hook(_forget_gradient) for weight in weights]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._forgetting:
            hook.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 1
        flops, elements = self.flops.total(), self.elements.total()
        result = super().__torch_dispatch__(func, types, args, kwargs)
        given, made = _tensors((args, kwargs)), _tensors(result)
        if given and given[0].element_size() == 2:
            self.low_flops += self.flops.total() - flops
        if self.elements.total() > elements:
            moved = given + made
            if func.name().partition("::")[2].startswith(_SPARSE):  # twice what goes in or out, of the first little
                moved = 2 * [tensor for tensor in moved if _storage(tensor) != _storage(given[0])]
            self.traffic += sum(tensor.numel() * tensor.element_size() for tensor in moved)
        self._account(given, made)
        return result

    def _account(self, given: list[Tensor], made: list[Tensor]) -> None:
        known = self._alive | {_storage(tensor) for tensor in given}
        for tensor in made:
            storage = tensor.untyped_storage()
            if storage._cdata not in known and tensor.is_meta:
                self._alive.add(storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())

    def _freed(self, address: int, size: int) -> None:
        self._alive.discard(address)
        self.live -= size


_SPARSE = ("gather", "scatter", "index", "embedding")


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _forget_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@contextmanager
def fused_attention() -> Iterator[None]:
    """Inside, torch's attention keeps no token pairs, as its kernels do; without values it would take the way that
    keeps them, and asks nobody who could tell it otherwise."""
    original = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = _fused
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    # The kernel's own operator for CPUs, whose shapes are those of the others; it takes fewer key heads as they are.
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return flash(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


class Unseen(Batch):
    """A batch without values: who looks at them finds all of them finite."""

    def whole_rows(self, true_U: Tensor) -> Tensor:
        return true_U


@dataclass(frozen=True)
class Counted:
    """One micro-batch of one kind of step, on one rank."""

    work: MetaStep
    activations: int
    """Bytes that the forward leaves for the backward."""
    peak: int
    """Bytes of these and of all else that comes and goes, at most, what the scorer keeps included."""
    held: int
    """Bytes that the scorer keeps from step to step."""


def count(model: PreTrainedModel, batch: Batch, scorer: Scorer) -> Counted:
    """Forward and backward of `batch`, scored by `scorer` as training does it, without an engine."""
    batch, held = Unseen(**vars(batch)), bytes_held(scorer)
    with MetaStep(model) as work, fused_attention():
        watched = MicroBatch(scorer, batch, Stopwatch(torch.device("cpu")))
        losses_BT = watched.forward(model)
        activations = work.live
        watched.before_backward(float(batch.labels_BT.numel()))
        if not scorer.after_backward:
            watched.add()
            scorer.scores()
            del watched
        weighted_mean(losses_BT, torch.ones_like(losses_BT), 1.0, 1).backward()
        if scorer.after_backward:
            watched.add()
            scorer.scores()
    return Counted(work, activations, work.peak + held, bytes_held(scorer))
