"""Rates with their uncertainty, against values by hand and against chance itself."""

import numpy as np
import pytest

from pipeline.record.subset_rates import LEVEL, MIN_UNITS, by_subset, in_words, standing_out, wilson


def test_wilson_intervals_are_those_of_the_books():
    """Catches the Wald interval, which is empty at 0 and reaches below it. 0 of 10 and 1 of 10: Newcombe (1998)'s
    method 3 by hand, z = 1.96: 3.8416 / 13.8416, (0.1 + 0.19208 -/+ 1.96 sqrt(0.009 + 0.009604)) / 1.38416."""
    assert wilson(0, 10) == pytest.approx((0.0, 0.27754), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((1 - 0.27754, 1.0), abs=1e-4)
    assert wilson(1, 10) == pytest.approx((0.01788, 0.40415), abs=1e-4)
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe's own example


@pytest.mark.parametrize(("rate", "units"), [(0.1, 30), (0.02, 200), (0.5, 1000)])
def test_wilson_intervals_cover_the_truth_in_about_95_percent(rate, units):
    found = np.random.default_rng(0).binomial(units, rate, size=4000)
    covered = np.mean([low <= rate <= high for low, high in (wilson(int(k), units) for k in found)])
    assert 0.92 < covered < 0.985


def test_the_p_value_is_fishers():
    """4 of 30 against 0 of 30: C(30,4) / C(60,4) = 27405 / 487635 in either tail, twice that; the tea of the lady, 3
    of 4 right, needs no more units than the test says, so it is not judged."""
    rows = {row["subset"]: row for row in by_subset({"a": (30, 4), "b": (30, 0)})}
    assert rows["a"]["p_value"] == pytest.approx(2 * 27405 / 487635)
    assert rows["a"]["p_value"] == pytest.approx(rows["b"]["p_value"])
    assert by_subset({"milk": (4, 3), "tea": (4, 1)})[0]["p_value"] is None


def test_the_p_value_is_that_of_drawing_at_random():
    """Against brute force: removals dealt out among shuffled units."""
    generator = np.random.default_rng(1)
    removed = np.repeat([1, 0], [20, 180])
    dealt = np.array([generator.permutation(removed)[:40].sum() for _ in range(20_000)])
    for count in (1, 4, 7):
        [row] = [row for row in by_subset({"a": (40, count), "b": (160, 20 - count)}) if row["subset"] == "a"]
        brute = min(1.0, 2 * min((dealt <= count).mean(), (dealt >= count).mean()))
        assert row["p_value"] == pytest.approx(brute, abs=0.02)


def test_what_clearly_stands_out_is_named_with_its_direction():
    counts = {"good": (1000, 20), "usual": (3000, 300), "bad": (200, 80), "few": (MIN_UNITS - 1, MIN_UNITS - 1)}
    found = {row["subset"]: row["stands_out"] for row in standing_out(counts)}
    assert found == {"bad": "more", "good": "less"}
    [bad] = [row for row in standing_out(counts) if row["subset"] == "bad"]
    assert in_words(bad) == (
        "bad: 40.0 % of 200 units removed (95 % interval 33.5 to 46.9), more than the 8.7 % of all others"
    )


def test_a_subset_is_compared_with_the_rest_not_with_all():
    """Catches a comparison that contains the subset itself."""
    [row] = [row for row in by_subset({"a": (50, 25), "b": (50, 5)}) if row["subset"] == "a"]
    assert row["rest"] == 0.1


def test_chance_alone_seldom_stands_out():
    """Catches a test that forgets how many subsets it looks at."""
    generator = np.random.default_rng(2)
    alarms = 0
    for _ in range(500):
        counts = {f"s{i}": (int(n), int(generator.binomial(n, 0.1))) for i, n in enumerate(range(40, 440, 20))}
        alarms += bool(standing_out(counts))
    assert alarms / 500 <= 2 * LEVEL


@pytest.mark.parametrize(
    "counts", [{}, {"a": (100, 10)}, {"a": (100, 0), "b": (100, 0)}, {"a": (40, 40), "b": (40, 40)}]
)
def test_nothing_stands_out_where_there_is_nothing_to_compare(counts):
    assert standing_out(counts) == []


def test_large_counts_neither_overflow_nor_take_long():
    assert [row["subset"] for row in standing_out({"a": (2_000_000, 210_000), "b": (2_000_000, 200_000)})] == ["a", "b"]
