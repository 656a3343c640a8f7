import math

import pytest

from pipeline.record import ledger
from pipeline.record.ledger import Ledger


def rows(step, positions, kept=True, score=1.0):
    count = len(positions)
    return ledger.table(
        {
            "step": step,
            "micro_step": 0,
            "rank": 0,
            "epoch": 0,
            "position": list(positions),
            "sample_id": list(positions),
            "document_ids": [[1, 2]] * count,
            "subset": [f"s{p % 2}" for p in positions],
            "tokens": 5,
            "loss": [1.5] * count,
            "score": [score] * count,
            "kept": kept,
            "reason": "",
            "weight": float(kept),
        }
    )


def steps(run_dir):
    return ledger.read(run_dir)["step"].to_pylist()


def test_rows_are_published_at_commit_and_not_before(tmp_path):
    """Catches a half-written part that a reader takes for a whole one."""
    book = Ledger(tmp_path, 0)
    book.append(rows(1, range(4)))
    assert steps(tmp_path) == []
    book.commit(1)
    assert steps(tmp_path) == [1] * 4
    assert [part.name for part in (tmp_path / "ledger").iterdir()] == ["steps-00000001-00000001.parquet"]


def test_many_rows_are_written_as_they_come_and_still_published_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "_ROW_GROUP", 8)
    book = Ledger(tmp_path, 0)
    for step in range(1, 6):
        book.append(rows(step, range(step * 4, step * 4 + 4)))
    assert steps(tmp_path) == []
    book.commit(5)
    assert ledger.read(tmp_path)["position"].to_pylist() == list(range(4, 24))


def test_resume_discards_rows_past_the_checkpoint(tmp_path):
    """Catches samples that a resumed run would record twice, also when it goes on from an older checkpoint."""
    book = Ledger(tmp_path, 0)
    for step in range(1, 7):
        book.append(rows(step, [step]))
        if step % 3 == 0:
            book.commit(step)
    book.append(rows(7, [7]))
    Ledger(tmp_path, 6)
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    Ledger(tmp_path, 4)
    assert steps(tmp_path) == [1, 2, 3, 4]
    resumed = Ledger(tmp_path, 4)
    resumed.append(rows(5, [5]))
    resumed.commit(5)
    assert steps(tmp_path) == [1, 2, 3, 4, 5]


def test_nan_scores_are_null(tmp_path):
    assert rows(1, [0], score=math.nan)["score"].to_pylist() == [None]


def test_counts_by_subset():
    table = ledger.pa.concat_tables([rows(1, range(3)), rows(2, range(2), kept=False)])
    assert ledger.counts_by_subset(table) == {"s0": (3, 1), "s1": (2, 1)}


def test_a_column_that_the_schema_does_not_know_is_refused():
    with pytest.raises(KeyError):
        ledger.table({"position": [1]})
