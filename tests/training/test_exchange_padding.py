"""Texts that go to another rank keep their ends."""

import torch

from pipeline.data.batch import IGNORE, Batch, Unit
from pipeline.training.exchange import exchange


def batch_of(ids: list[list[int]], first: int, padding: int) -> Batch:
    ids_BT = torch.tensor(ids)
    length = ids_BT.shape[1]
    units = [Unit(first + row, 0, (row * length, (row + 1) * length), [0], "-") for row in range(len(ids))]
    return Batch(ids_BT, torch.full_like(ids_BT, IGNORE), units, {"attention_mask": ids_BT != padding}, padding)


def test_shorter_texts_are_lengthened_with_their_own_padding():
    """Catches zeros, behind which a GPT-style model that pads with another token would answer."""
    batches = [batch_of([[1, 2]], 0, 7), batch_of([[3, 4, 5], [6, 7, 7]], 1, 7)]
    weights = [torch.ones(1, 2), torch.ones(2, 3)]
    sequences = exchange(batches, weights, [0, 1, 2])
    assert sequences.input_ids_RT.tolist() == [[1, 2, 7], [3, 4, 5], [6, 7, 7]]
    assert sequences.batch([0, 2])[0].padding == 7
    assert sequences.others["attention_mask"].tolist() == [[True, True, False], [True] * 3, [True, False, False]]
