"""Which ranks are gone, when a collective fails."""

import os
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch.distributed as dist

from pipeline.engine.collectives import rank, world_size

LOST_CONTACT = 3
"""Exit code of a rank that can no longer reach another one."""


_PROBE_SECONDS = 2.0


@dataclass(frozen=True)
class Peer:
    """Where a rank can be asked whether it lives."""

    rank: int
    host: str
    address: str
    port: int


_peers: list[Peer] = []


_listener: socket.socket | None = None


def introduce() -> None:
    """Tell all ranks where each one is, for `exit_on_lost_contact`. Collective, once, when the group is new."""
    global _listener
    if world_size() == 1 or _peers:
        return
    # Nothing is ever accepted or sent: that the kernel completes a connection says that the process lives.
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    _listener = socket.create_server(("", 0), family=family, backlog=world_size(), dualstack_ipv6=dual)
    mine = Peer(rank(), socket.gethostname(), _own_address(), _listener.getsockname()[1])
    found: list[Peer] = [mine] * world_size()
    dist.all_gather_object(found, mine)
    _peers[:] = found


def _own_address() -> str:
    """This host's address on the network that leads to rank 0. (No packet is sent.)"""
    master = os.environ["MASTER_ADDR"]
    family, kind, *_, address = socket.getaddrinfo(master, int(os.environ["MASTER_PORT"]), type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        own = str(probe.getsockname()[0])
    return master if own.startswith("127.") or own == "::1" else own  # the loopback of rank 0's host, as others know it


def _trouble(peer: Peer) -> str:
    """What is wrong with a rank; empty where it lives."""
    try:
        socket.create_connection((peer.address, peer.port), timeout=_PROBE_SECONDS).close()
    except ConnectionRefusedError:
        return "has ended"
    except OSError:
        return "does not answer"
    return ""


@contextmanager
def exit_on_lost_contact(prog: str) -> Iterator[None]:
    """End the process with one message and exit code 3 where a collective failed because other ranks are gone.

    A rank that died is noticed at once; a host that fell silent when the collective that waits for it times out
    (DEEPSPEED_TIMEOUT minutes). Where all ranks live, the error keeps its trace.
    """
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        if not _peers:
            error.add_note("The ranks did not meet: launch/deepspeed_env.example says what the network must be told.")
            raise
        time.sleep(1)  # so that a process that is about to end has ended
        others = [peer for peer in _peers if peer.rank != rank()]
        with ThreadPoolExecutor(32) as pool:
            troubles = list(pool.map(_trouble, others))
        if not any(troubles):
            error.add_note("All other ranks live: one is stuck, or slower than DEEPSPEED_TIMEOUT (minutes).")
            raise
        lost = defaultdict(list)
        for peer, trouble in zip(others, troubles, strict=True):
            if trouble:
                lost[f"on {peer.host} ({peer.address}) {trouble}"].append(f"rank {peer.rank}")
        what = "; ".join(f"{', '.join(ranks)} {where}" for where, ranks in lost.items())
        here = _peers[rank()]
        print(
            f"\n{prog}: error: rank {here.rank} on {here.host} lost contact: {what}. This rank ends here ({error}). "
            "Start all ranks again with --resume auto: it goes on from the newest checkpoint, if there is one",
            file=sys.stderr,
            flush=True,
        )
        sys.stdout.flush()
        os._exit(LOST_CONTACT)  # what a clean exit does to the group would wait for the lost
