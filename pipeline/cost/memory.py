"""Memory at its peak, and bytes held."""

import ctypes
import re
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from pipeline.engine import deepspeed_engine


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
            deepspeed_engine.reset_peak_memory()
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
            self.peak = deepspeed_engine.peak_memory()
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
