"""Where the time of a step goes, read once per step so that timing adds no synchronisation of its own."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up the seconds that named parts take on `device`: on an accelerator by events, on the CPU by the clock."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.Event, torch.Event]] = []

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        if self._device.type == "cpu":
            start = time.perf_counter()
            yield
            self._seconds[part] += time.perf_counter() - start
        else:
            before, after = (torch.Event(self._device, enable_timing=True) for _ in range(2))
            before.record()
            yield
            after.record()
            self._events.append((part, before, after))

    def read(self) -> dict[str, float]:
        """Seconds per part since the last call."""
        for part, before, after in self._events:
            after.synchronize()
            self._seconds[part] += before.elapsed_time(after) / 1000
        seconds = dict(self._seconds)
        self._seconds.clear()
        self._events.clear()
        return seconds
