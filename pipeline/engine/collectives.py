"""What ranks tell each other: the only importer of torch.distributed. One process without a group is rank 0 of 1.

Every call here is collective: all ranks make it, in the same order, or they wait for each other for ever.
"""

from collections.abc import Callable
from concurrent.futures import Future, wait
from threading import Thread
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.config.writing import NotWritten

T = TypeVar("T")

BEAT = 5.0
"""Seconds after which ranks that wait for rank 0 hear from it again."""


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_gather_rows(rows_UC: Tensor) -> Tensor:
    """The rows of all ranks, in rank order; ranks may have different numbers of them."""
    if world_size() == 1:
        return rows_UC
    count = torch.tensor([len(rows_UC)], device=rows_UC.device)
    counts = [torch.empty_like(count) for _ in range(world_size())]
    dist.all_gather(counts, count)
    sizes = torch.cat(counts).tolist()  # the device is waited for once, not once a rank
    padded = rows_UC.new_zeros(max(sizes), rows_UC.shape[1])
    padded[: len(rows_UC)] = rows_UC
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded)
    return torch.cat([rows[:size] for rows, size in zip(gathered, sizes, strict=True)])


def broadcast(value: Any) -> Any:
    """Rank 0's value, any object that pickles, on every rank."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box)
    return box[0]


def on_rank_0(work: Callable[[], T]) -> T | None:
    """What `work` returns, on rank 0, which alone does it; None on the others. Where it fails all ranks raise: rank 0
    its own error, the others ValueError with its words (NotWritten, where that is its error). Collective, however long
    it takes: in one long wait for it a collective would time out, so the others hear from rank 0 every few seconds. A
    longer timeout would do too, and a host that fell silent would be noticed that much later.
    """
    if world_size() == 1:
        return work()
    done: Future[T] = Future()
    if rank() == 0:
        Thread(target=_do, args=(work, done), daemon=True).start()
    while not broadcast(rank() == 0 and bool(wait([done], timeout=BEAT).done)):
        pass
    error = done.exception() if rank() == 0 else None
    trouble = broadcast(error and _for_the_others(error))
    if error:
        raise error
    if trouble:
        raise trouble
    return done.result() if rank() == 0 else None


def _do(work: Callable[[], T], done: "Future[T]") -> None:
    try:
        done.set_result(work())
    except BaseException as error:  # whatever it is: the others wait
        done.set_exception(error)


def _for_the_others(error: BaseException) -> Exception:
    if isinstance(error, NotWritten):
        return NotWritten(str(error))
    words = str(error) if isinstance(error, ValueError) else f"rank 0 failed: {type(error).__name__}: {error}"
    return ValueError(words)


def all_gather(values: list[T]) -> list[T]:
    """The values of all ranks, any objects that pickle, in rank order."""
    every = [values] * world_size()
    if world_size() > 1:
        dist.all_gather_object(every, values)
    return [value for its in every for value in its]


def agree(values: dict[str, str]) -> None:
    """Raises ValueError, on all ranks, where these differ between ranks, naming the ranks and what differs."""
    every = all_gather([values])
    differing = [
        f"  {name}: {other[name]} on rank {index}, {every[0][name]} on rank 0"
        for index, other in enumerate(every)
        for name in values
        if other[name] != every[0][name]
    ]
    if differing:
        raise ValueError(
            "ranks were started with different things:\n"
            + "\n".join(differing[:20])
            + "\nGive all hosts the same config, DeepSpeed JSON, code and versions, and start again"
        )


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def leave() -> None:
    """Tear the process group down, at the end of a command."""
    if dist.is_initialized():
        dist.destroy_process_group()
