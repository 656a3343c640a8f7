"""Documents that a run leaves out."""

import datasets
import pytest
import torch

from pipeline.config.schema_data import DataConfig
from pipeline.data.batch import IGNORE, PADDING
from pipeline.data.document import SHARD, document_ids
from pipeline.data.leave_out import left_out
from pipeline.data.samples import Samples

ROWS = datasets.Dataset.from_dict(
    {
        "input_ids": [[11, 12, 13, 21, 22, 23], [24, 25, 31, 32, 9, 9]],
        "document_ids": [[1, 1, 1, 2, 2, 2], [2, 2, 3, 3, PADDING, PADDING]],
        "subset": [["a", "b"], ["b", "a"]],
    }
)
CPU = torch.device("cpu")


def batch_of(unit: str, leave_out: list[int]):
    samples = Samples(ROWS, 0, unit, leave_out)
    positions = sorted(range(2), key=lambda position: samples.units(position, 1)[0].sample_id)
    return samples.batch_at(positions, CPU)


def test_no_token_of_a_document_left_out_is_read_or_predicted():
    """Catches its first token as the target of the document before it, and its content as context of the next one."""
    batch = batch_of("sequence", [2])
    assert batch.input_ids_BT.tolist() == [[11, 12, 13, 0, 0, 0], [0, 0, 31, 32, 9, 9]]
    assert batch.labels_BT.tolist() == [[12, 13, IGNORE, IGNORE, IGNORE, IGNORE], [IGNORE, IGNORE, 32] + [IGNORE] * 3]


def test_units_stay_what_they_are_and_say_what_is_left_out():
    """Catches another order, other spans or other documents than a run without `leave_out` has."""
    plain, without = batch_of("document", []), batch_of("document", [2])
    assert [(u.span, u.document_ids) for u in plain.units] == [(u.span, u.document_ids) for u in without.units]
    assert [unit.left_out for unit in without.units] == [unit.document_ids == [2] for unit in without.units]
    assert without.tokens_U.tolist() == [2, 0, 0, 1]
    assert not any(unit.left_out for unit in plain.units)


def test_ids_come_from_a_list_or_a_file(tmp_path):
    file = tmp_path / "ids.txt"
    file.write_text("7, 3\n5 3\n")
    for leave_out in (str(file), [7, 5, 3]):
        assert left_out(DataConfig("p", leave_out=leave_out), [range(8)]) == [3, 5, 7]
    assert left_out(DataConfig("p"), [range(8)]) == []
    with pytest.raises(ValueError, match="there is no training document 7; ids run from 0 to 6"):
        left_out(DataConfig("p", leave_out=str(file)), [range(7)])
    shards = document_ids({"documents": 9, "shards": [4, 5]})
    assert left_out(DataConfig("p", leave_out=[3, SHARD + 4]), shards) == [3, SHARD + 4]
    for beyond in (4, SHARD + 5):
        with pytest.raises(
            ValueError, match=rf"document {beyond}; ids run from 0 to 3, from {SHARD} to {SHARD + 4}, as"
        ):
            left_out(DataConfig("p", leave_out=[beyond]), shards)
    file.write_text("seven")
    with pytest.raises(ValueError, match="holds `seven`, which is no document id"):
        left_out(DataConfig("p", leave_out=str(file)), [range(8)])
    with pytest.raises(ValueError, match="cannot be read"):
        left_out(DataConfig("p", leave_out=str(tmp_path / "none")), [range(8)])
