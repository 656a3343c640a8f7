"""Real gloo ranks for tests: one pair of spawned processes serves the whole session.

`ranks(function, *args)` runs a module-level function on every rank at once and returns their results in rank order.
"""

import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp

TIMEOUT_SECONDS = 300


class Ranks:
    def __init__(self, world_size: int) -> None:
        context = mp.get_context("spawn")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._tasks = [context.SimpleQueue() for _ in range(world_size)]
        self._results = [context.Queue() for _ in range(world_size)]
        self._processes = [
            context.Process(target=_serve, args=(rank, world_size, port, *queues), daemon=True)
            for rank, queues in enumerate(zip(self._tasks, self._results, strict=True))
        ]
        for process in self._processes:
            process.start()

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        for tasks in self._tasks:
            tasks.put((function, args))
        answers = [results.get(timeout=TIMEOUT_SECONDS) for results in self._results]
        for rank, (error, _) in enumerate(answers):
            if error:
                raise AssertionError(f"on rank {rank}:\n{error}")
        return [value for _, value in answers]

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _serve(rank: int, world_size: int, port: int, tasks: Any, results: Any) -> None:
    names = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ |= {name: str(value) for name, value in names.items()}
    import torch

    from pipeline.engine import launch

    torch.set_num_threads(1)
    launch.join_process_group()
    while True:
        function, args = tasks.get()
        try:
            results.put((None, function(*args)))
        except BaseException:
            results.put((traceback.format_exc(), None))
