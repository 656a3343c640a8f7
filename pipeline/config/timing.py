"""Where the time of a step goes, read once per step so that timing adds no synchronisation of its own."""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up the seconds that named parts take on `device`: on an accelerator by events, on the CPU by the clock.

    A part inside another has both names, `validation/logit gradient`, and its seconds are among the other's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._inside: list[str] = []
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.Event, torch.Event]] = []
        self._free: list[torch.Event] = []

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        self._inside.append(part)
        name = "/".join(self._inside)
        try:
            if self._device.type == "cpu":
                start = time.perf_counter()
                yield
                self._seconds[name] += time.perf_counter() - start
            else:
                before, after = (self._event() for _ in range(2))
                before.record()
                yield
                after.record()
                self._events.append((name, before, after))
        finally:
            self._inside.pop()

    def _event(self) -> torch.Event:
        """Made once, since a step has hundreds."""
        return self._free.pop() if self._free else torch.Event(self._device, enable_timing=True)

    def read(self) -> dict[str, float]:
        """Seconds per part since the last call. Every rank has to call it, or its events pile up."""
        for name, before, after in self._events:
            after.synchronize()
            self._seconds[name] += before.elapsed_time(after) / 1000
            self._free += [before, after]
        seconds = dict(self._seconds)
        self._seconds.clear()
        self._events.clear()
        return seconds


def outermost(seconds: Mapping[str, float], inside: str = "") -> dict[str, float]:
    """The parts directly inside `inside` (everything, where it is empty), without what is inside of them: each second
    once."""
    prefix = f"{inside}/" if inside else ""
    parts = {name.removeprefix(prefix): value for name, value in seconds.items() if name.startswith(prefix)}
    return {name: value for name, value in parts.items() if "/" not in name and name != inside}
