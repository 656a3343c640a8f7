"""The order of samples, at sizes that can be listed and at sizes that cannot."""

import tracemalloc
from collections import Counter
from math import factorial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.order import Order

PILE = 150_000_000
"""Sequences of 2,048 tokens, about."""


@given(st.integers(1, 300), st.integers(0, 2**32), st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_an_epoch_is_a_permutation(rows, seed, epoch):
    """Catches rounds that are no bijection, a walk that leaves the rows, and a domain too small for them."""
    order = Order(rows, seed)
    places = range(epoch * rows, (epoch + 1) * rows)
    assert sorted(map(order.row, places)) == list(range(rows))
    assert {order.epoch(place) for place in places} == {epoch}


@pytest.mark.parametrize("rows", [2, 3, 4])
def test_every_permutation_of_a_few_rows_comes_about_as_often(rows):
    """Catches keys that differ between seeds in nothing that counts, and too few rounds (four and fewer fail)."""
    seeds = 250 * factorial(rows)
    counts = Counter(tuple(map(Order(rows, seed).row, range(rows))) for seed in range(seeds))
    assert len(counts) == factorial(rows)
    # 250 each, give or take five standard deviations.
    assert all(abs(count - 250) < 5 * 250**0.5 for count in counts.values())


def test_a_row_is_at_any_place_about_as_often():
    """Catches halves that are mixed by too few rounds, and a walk that favours some rows."""
    rows, seeds = 50, 2000
    at = np.array([list(map(Order(rows, seed).row, range(rows))) for seed in range(seeds)])
    counts = np.stack([np.bincount(column, minlength=rows) for column in at.T])
    expected = seeds / rows
    chi_square, freedom = ((counts - expected) ** 2 / expected).sum(), (rows - 1) ** 2
    assert abs(chi_square - freedom) < 5 * (2 * freedom) ** 0.5


def test_the_order_of_a_corpus_of_the_piles_size_takes_no_memory_and_is_no_window():
    """Catches an array of all rows, a shuffle inside windows, and positions that end at 32 bits."""
    tracemalloc.start()
    order = Order(PILE, 0)
    first = np.array([order.row(place) for place in range(5000)])
    late = np.array([order.row(40 * PILE + place) for place in range(5000)])
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert 40 * PILE > 2**32
    assert order.epoch(40 * PILE) == 40
    for rows in (first, late):
        assert len(set(rows)) == 5000
        # Uniform over the corpus: mean and deviation to within five standard errors, and neighbours unrelated.
        assert abs(rows.mean() / PILE - 0.5) < 5 / (12 * 5000) ** 0.5
        assert abs(rows.std() / PILE - 12**-0.5) < 0.02
        assert abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 0.07
    assert len(set(first) & set(late)) < 10, "an epoch of its own"
