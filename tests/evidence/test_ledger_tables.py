"""Tables from ledger rows, against what can be counted by hand."""

import numpy as np
import pandas as pd
import pytest

from pipeline.evidence import ledger_tables


def ledger_rows(scores, subsets=None, kept=None, size=4, units=None):
    """Rows as the ledger has them: micro-batches of `size` sequences, one a step; `units`: sequences of an epoch."""
    count = len(scores)
    units = units or count
    position = np.arange(count)
    return pd.DataFrame({
        "step": position // size + 1, "micro_step": 0, "epoch": position // units, "position": position,
        "sample_id": position % units, "document_ids": [[int(p)] for p in position % units],
        "subset": subsets or ["real"] * count, "score": np.array(scores, np.float32),
        "kept": (kept := [True] * count if kept is None else kept), "units": 1, "removed": [int(not k) for k in kept],
    })  # fmt: skip


def test_ranks_are_among_what_was_scored_together():
    """Catches ranks over the whole run, and places that are not symmetric about one half."""
    rows = ledger_tables.comparable(ledger_rows([3, 1, 2, 2, 300, 100, 200, 400]), "micro_step")
    assert rows["rank"].tolist() == [0.875, 0.125, 0.5, 0.5, 0.625, 0.125, 0.375, 0.875]


def test_ranks_of_a_step_scored_together_are_over_its_micro_batches():
    rows = ledger_rows([1, 2, 3, 4]).assign(micro_step=[0, 0, 1, 1])
    assert ledger_tables.comparable(rows, "micro_step")["rank"].tolist() == [0.25, 0.75, 0.25, 0.75]
    together = ledger_tables.comparable(rows, "step")
    assert together["rank"].tolist() == [0.125, 0.375, 0.625, 0.875]
    assert (together["relative"] ** 2).mean() == pytest.approx(1)


def test_units_without_a_score_have_no_rank_and_take_no_place():
    rows = ledger_tables.comparable(ledger_rows([3, np.nan, 1, 2]), "micro_step")
    assert rows["rank"].tolist()[2:] == pytest.approx([1 / 6, 0.5])
    assert np.isnan(rows["rank"][1])


def test_bands_do_not_feel_the_scale_of_a_micro_batch_but_its_sign():
    """Catches quantiles of raw scores, which shrink by orders of magnitude while a model trains."""
    generator = np.random.default_rng(0)
    scores = generator.normal(size=(10, 50))
    scale = 10.0 ** -np.arange(10)[:, None]
    bands = [
        ledger_tables.score_bands(ledger_tables.comparable(ledger_rows(s.ravel(), size=50), "micro_step"), parts=2)
        for s in (scores, scores * scale)
    ]
    for plain, scaled in zip(*bands, strict=True):
        assert plain == pytest.approx(scaled, rel=1e-5)
        assert plain["q05"] == pytest.approx(-1.645, abs=0.25)
        assert abs(plain["q50"]) < 0.15
    assert [(band["step"], band["units"]) for band in bands[0]] == [(3.0, 250), (8.0, 250)]


def test_removal_over_time_adds_up_to_the_ledger():
    generator = np.random.default_rng(1)
    subsets = [f"s{i}" if i else "planted/uniform" for i in generator.integers(0, 10, size=400)]
    rows = ledger_rows(generator.normal(size=400), subsets, list(generator.random(400) > 0.3))
    found = pd.DataFrame(ledger_tables.removed_over_time(rows, parts=5, subsets=3))
    assert found["units"].sum() == 400
    assert found["removed"].sum() == (~rows["kept"]).sum()
    largest = rows["subset"][rows["subset"] != "planted/uniform"].value_counts().index[:3]
    assert set(found["subset"]) == {*largest, ledger_tables.OTHERS, ledger_tables.NOISE}
    for subset in largest:
        own = rows[rows["subset"] == subset]
        assert found[found["subset"] == subset]["removed"].sum() == (~own["kept"]).sum()
    assert found["step"].nunique() == 5


def test_participation_counts_a_unit_over_all_its_epochs():
    """Catches counting rows instead of units, and one document of a row taken for another."""
    rows = ledger_rows([1] * 8, kept=[True, False, True, True, True, False, False, True], units=4)
    assert ledger_tables.participation(ledger_tables.comparable(rows, "micro_step")) == [
        {"seen": 2, "removed": 0, "units": 2},
        {"seen": 2, "removed": 1, "units": 1},
        {"seen": 2, "removed": 2, "units": 1},
    ]
    documents = rows.assign(sample_id=0)
    assert len(ledger_tables.comparable(documents, "micro_step")["unit"].unique()) == 4


def test_trajectories_and_agreement_over_two_epochs():
    rows = ledger_tables.comparable(ledger_rows([1, 2, 3, 4, 5, 6, 6, 5, 4, 3, 2, 1], size=6, units=6), "micro_step")
    lines = ledger_tables.trajectories(rows, each=1)
    assert [(line["group"], line["sample_id"]) for line in lines] == [("lowest", 0), ("middle", 2), ("highest", 5)]
    assert lines[0]["ranks"] == pytest.approx([1 / 12, 11 / 12])
    assert lines[0]["epochs"] == [0, 1]
    assert ledger_tables.agreement_between_epochs(rows) == [
        {"epochs": [0, 1], "units": 6, "spearman": pytest.approx(-1)}
    ]  # fmt: skip


def test_there_are_no_trajectories_where_everything_was_seen_once():
    rows = ledger_tables.comparable(ledger_rows([1, 2, 3, 4]), "micro_step")
    assert ledger_tables.trajectories(rows) == []
    assert ledger_tables.agreement_between_epochs(rows) == []


def test_importance_is_the_mean_rank_over_the_times_seen():
    rows = ledger_tables.comparable(
        ledger_rows([1, 2, 3, 4, 4, 2, 3, 1], units=4, kept=[False] + [True] * 7), "micro_step"
    )
    table = ledger_tables.importance(rows)
    assert dict(zip(table["sample_id"], table["importance"], strict=True)) == {0: 0.5, 1: 0.375, 2: 0.625, 3: 0.5}
    assert table["importance"].is_monotonic_increasing
    assert dict(zip(table["sample_id"], table["removed"], strict=True)) == {0: 1, 1: 0, 2: 0, 3: 0}


def test_auc_is_the_chance_of_a_pair_with_ties_half():
    """Catches the other direction: low scores are the sign of noise."""
    generator = np.random.default_rng(2)
    low, high = generator.integers(0, 6, size=40) / 6, generator.integers(2, 9, size=70) / 6
    brute = np.mean([(a < b) + 0.5 * (a == b) for a in low for b in high])
    assert ledger_tables.auc(low, high) == pytest.approx(brute)
    assert ledger_tables.auc(np.array([0.1, 0.2]), np.array([0.3])) == 1.0
    assert ledger_tables.auc(np.array([]), high) is None


def test_noise_is_measured_by_kind_against_real_rows_alone():
    """Catches other kinds counted as real, and the warm-up, in which nothing is removed, held against the policy."""
    subsets = ["planted/a", "real", "planted/b", "real"] * 4
    scores = [0, 1, 2, 1.5] * 4
    kept = [True] * 8 + [False, True, True, False] + [False, True, True, True]
    rows = ledger_tables.comparable(ledger_rows(scores, subsets, kept), "micro_step")
    found = {(row["part"], row["kind"]): row for row in ledger_tables.noise_found(rows, warmup_steps=2)}
    assert [found["all", kind]["auc"] for kind in ("a", "b", ledger_tables.ALL_KINDS)] == [1.0, 0.0, 0.5]
    assert found["all", "a"]["recall"] == 1.0
    assert found["all", "a"]["precision"] == pytest.approx(2 / 3)
    assert found["all", "b"]["recall"] == 0.0
    assert found["all", ledger_tables.ALL_KINDS]["recall"] == 0.5
    assert (found["1/4", "a"]["recall"], found["1/4", "a"]["precision"]) == (None, None)
    assert found["4/4", "a"]["precision"] == 1.0
    assert {part for part, _ in found} == {"all", "1/4", "2/4", "3/4", "4/4"}


def test_noise_is_not_reported_where_none_was_planted():
    assert ledger_tables.noise_found(ledger_tables.comparable(ledger_rows([1, 2, 3, 4]), "micro_step"), 0) == []
