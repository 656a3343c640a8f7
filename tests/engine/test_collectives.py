import time

import pytest
import torch

from pipeline.config.writing import NotWritten
from pipeline.engine import collectives


def gathered() -> list[list[float]]:
    rank = collectives.rank()
    rows = torch.tensor([[rank, index] for index in range(3 * rank)], dtype=torch.float64).reshape(-1, 2)
    return collectives.all_gather_rows(rows).tolist()


def test_rows_come_in_rank_order_also_where_a_rank_has_none(ranks):
    """Catches padding that is taken for rows."""
    assert ranks(gathered) == [[[1, 0], [1, 1], [1, 2]]] * 2


def other_code() -> None:
    rank = collectives.rank()
    collectives.agree({"config": "the same", "code": f"version {rank}", "torch": "the same"})


def test_ranks_that_run_other_code_are_told_apart_by_name_on_all_ranks(ranks):
    with pytest.raises(AssertionError, match="different things:\n  code: version 1 on rank 1, version 0 on rank 0"):
        ranks(other_code)


def from_rank_0() -> tuple[object, float]:
    rank = collectives.rank()
    return collectives.broadcast({"rank": rank}), float(collectives.all_reduce_sum(torch.tensor(1.0 + rank)))


def test_broadcast_is_rank_0s_and_the_sum_is_over_all(ranks):
    assert ranks(from_rank_0) == [({"rank": 0}, 3.0)] * 2


def slow_work() -> tuple[int | None, float]:
    collectives.BEAT = 0.05

    def work() -> int:
        time.sleep(0.3)
        return 10 + collectives.rank()

    return collectives.on_rank_0(work), float(collectives.all_reduce_sum(torch.tensor(1.0)))


def test_rank_0_may_take_many_beats_and_all_ranks_are_in_step_afterwards(ranks):
    """Catches a single long wait, and ranks that count the beats differently."""
    assert ranks(slow_work) == [(10, 2.0), (None, 2.0)]


def failing_work(error: BaseException) -> str:
    def work() -> None:
        raise error

    try:
        collectives.on_rank_0(work)
    except BaseException as raised:
        return f"{type(raised).__name__}: {raised}"
    return "nothing"


@pytest.mark.parametrize(
    ("error", "first", "second"),
    [
        (ValueError("data: none"), "ValueError: data: none", "ValueError: data: none"),
        (RuntimeError("boom"), "RuntimeError: boom", "ValueError: rank 0 failed: RuntimeError: boom"),
        (NotWritten("ledger: full"), "NotWritten: ledger: full", "NotWritten: ledger: full"),
        (SystemExit(2), "SystemExit: 2", "ValueError: rank 0 failed: SystemExit: 2"),
    ],
)
def test_whatever_rank_0_fails_with_reaches_all_ranks(ranks, error, first, second):
    """Catches ranks that wait for one that has ended: for minutes, or for ever."""
    assert ranks(failing_work, error) == [first, second]
    assert ranks(from_rank_0) == [({"rank": 0}, 3.0)] * 2
