"""Scores by n-grams, against counting by hand."""

import math
from collections import Counter
from itertools import pairwise

import pytest
import torch

from pipeline.data.batch import IGNORE, Batch, Unit, next_token_labels
from pipeline.influence.ngram import BUCKETS, Ngram, _ngrams

CPU = torch.device("cpu")


def batch_of(rows: list[list[int]]) -> Batch:
    length = len(rows[0])
    units = [Unit(row, row, (row * length, (row + 1) * length), [row], "-") for row in range(len(rows))]
    return Batch(torch.tensor(rows), next_token_labels(torch.tensor(rows)), units)


def test_scores_are_log_ratios_of_counts():
    """Catches the label of another position, pairs in the other order, and frequencies that do not sum to one."""
    reference, corpus = [[1, 2, 3, 1, 2], [1, 2, 4, 4, 1]], [[3, 2, 1, 4, 4], [2, 1, 2, 1, 3], [4, 4, 4, 4, 4]]
    seen = batch_of([[1, 2, 4, 4, 2], [9, 9, 1, 3, 2]])
    ngram = Ngram([batch_of(reference[:1]), batch_of(reference[1:])], [batch_of(corpus)], CPU)
    scores = ngram.token_scores(seen, torch.zeros(2, 5))

    def frequency(rows: list[list[int]], gram: tuple[int, ...]) -> float:
        grams = Counter[tuple[int, ...]]()
        for row in rows:
            grams.update((after,) for after in row[1:])
            grams.update(pairwise(row))
        return (grams[gram] + 1) / (grams.total() + BUCKETS)

    for b, row in enumerate(seen.input_ids_BT.tolist()):
        for t, (now, after) in enumerate(pairwise(row)):
            expected = sum(
                math.log(frequency(reference, gram) / frequency(corpus, gram)) for gram in ((after,), (now, after))
            )
            assert scores[b, t].item() == pytest.approx(expected, abs=1e-6)


def test_positions_without_a_label_count_for_nothing():
    padded = batch_of([[5, 6, 7, 0, 0]])
    padded.labels_BT[0, 2:] = IGNORE
    alone = batch_of([[5, 6, 7]])
    other = batch_of([[5, 6, 7, 8, 9]])
    scores = [Ngram([some], [other], CPU).token_scores(other, torch.zeros(1, 5)) for some in (padded, alone)]
    assert torch.equal(*scores)


def test_ngrams_spread_over_the_buckets():
    """Catches a hash whose low bits depend on one token alone."""
    rows = torch.randint(50_000, (20, 512), generator=torch.Generator().manual_seed(0)).tolist()
    singles = {after for row in rows for after in row[1:]}
    pairs = {pair for row in rows for pair in pairwise(row)}
    for grams, buckets in zip((singles, pairs), _ngrams(batch_of(rows)), strict=True):
        at_random = BUCKETS * (1 - math.exp(-len(grams) / BUCKETS))  # buckets hit by as many balls
        assert len(buckets[:, :-1].unique()) == pytest.approx(at_random, rel=0.02)
    counted = [[7, token] for token in range(4096)]
    _, buckets = _ngrams(batch_of(counted))
    assert len(buckets[:, 0].unique()) > 0.95 * 4096
