import datasets
import numpy as np
import pytest
import torch

from pipeline.data.batch import IGNORE
from pipeline.data.samples import Samples

ROWS = datasets.Dataset.from_dict(
    {
        "input_ids": [[10 * row + t for t in range(6)] for row in range(5)],
        "document_ids": [[0] * 6, [0, 1, 1, 1, 2, 2], [2] * 6, [3] * 6, [4, 4, 4, 5, -1, -1]],
        "subset": [["a"], ["a", "b", "c"], ["c"], ["d"], ["e", "f"]],
    }
)
CPU = torch.device("cpu")


def sample_ids(samples, position, size):
    return [unit.sample_id for unit in samples.units(position, size)]


def test_order_is_a_function_of_seed_and_position_alone():
    """Catches an order that depends on how the positions are split over ranks and calls."""
    samples = Samples(ROWS, seed=3, unit="sequence")
    whole = sample_ids(samples, 0, 20)
    assert whole == [i for p in range(20) for i in sample_ids(Samples(ROWS, 3, "sequence"), p, 1)]
    assert whole != sample_ids(Samples(ROWS, seed=4, unit="sequence"), 0, 20)


def test_every_epoch_sees_every_row_once_in_an_order_of_its_own():
    ids = np.array(sample_ids(Samples(ROWS, 3, "sequence"), 0, 20)).reshape(4, 5)
    assert (np.sort(ids) == np.arange(5)).all()
    assert len({tuple(epoch) for epoch in ids}) > 1


def test_labels_are_the_next_tokens_and_none_at_the_end_or_in_padding():
    samples = Samples(ROWS, 0, "sequence")
    batch = samples.batch(0, 5, CPU)
    for ids, labels, unit in zip(batch.input_ids_BT, batch.labels_BT, batch.units, strict=True):
        expected = [*(ids[1:]).tolist(), IGNORE]
        if unit.sample_id == 4:
            expected[3:] = [IGNORE] * 3
        assert labels.tolist() == expected


def test_a_sequence_is_one_unit_with_its_largest_subset():
    by_id = {unit.sample_id: unit for unit in Samples(ROWS, 0, "sequence").units(0, 5)}
    assert (by_id[1].document_ids, by_id[1].subset) == ([0, 1, 2], "b")
    assert by_id[4].document_ids == [4, 5]


def test_document_units_tile_the_sequence_and_know_their_subset():
    units = Samples(ROWS, 0, "document").units(0, 5)
    row1 = [unit for unit in units if unit.sample_id == 1]
    start = row1[0].span[0]
    assert [(u.span[0] - start, u.span[1] - start, u.document_ids, u.subset) for u in row1] == [
        (0, 1, [0], "a"),
        (1, 4, [1], "b"),
        (4, 6, [2], "c"),
    ]
    assert [u.document_ids for u in units if u.sample_id == 4] == [[4], [5]]


@pytest.mark.parametrize("unit", ["sequence", "document"])
def test_sums_and_weights_agree_about_spans(unit):
    batch = Samples(ROWS, 0, unit).batch(0, 5, CPU)
    values = torch.arange(len(batch.units)).double() + 1
    spread = batch.spread_over_tokens(values)
    lengths = torch.tensor([stop - start for start, stop in (u.span for u in batch.units)])
    torch.testing.assert_close(batch.sum_per_unit(spread), values * lengths)


def test_tokens_of_a_document_are_only_its_own():
    assert Samples(ROWS, 0, "document").tokens_of(1, [1]) == [11, 12, 13]
