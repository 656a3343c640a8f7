"""The prepared dataset, in a run of many ranks: rank 0 makes it, all of them read it."""

import socket
import time
from pathlib import Path

from pipeline.config.schema import Config
from pipeline.data.prepared import ensure_prepared
from pipeline.engine import collectives

PATIENCE = 60
"""Seconds in which a shared file system may show what another host wrote."""


def prepare_on_rank_0(config: Config) -> None:
    """`data.prepared_dir` is there, for every rank. Raises ValueError, on all ranks, where it cannot be prepared or was
    made of something else (`ensure_prepared`), or where a rank does not see it. Collective."""
    collectives.on_rank_0(lambda: ensure_prepared(config))
    directory = Path(config.data.prepared_dir)
    deadline = time.monotonic() + PATIENCE
    while not (seen := (directory / "fingerprint.json").exists()) and time.monotonic() < deadline:
        time.sleep(1)
    if blind := collectives.all_gather([] if seen else [f"rank {collectives.rank()} on {socket.gethostname()}"]):
        raise ValueError(
            f"data.prepared_dir: rank 0 has {directory}, and {', '.join(blind)} cannot see it. Name a directory on a "
            "file system that all hosts share"
        )
