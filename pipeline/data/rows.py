"""Batches as other loops have them, dicts of tensors, and collections of single sequences in that form."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.data.batch import IGNORE, Batch, Unit, next_token_labels
from pipeline.data.order import Order

NO_UNIT = -1
"""In `unit_ids`: a position that belongs to no unit."""
_OURS = ("input_ids", "labels", "unit_ids", "metadata")


def batch_of(given: Mapping[str, Any], first: int, device: torch.device, unit: str) -> Batch:
    """A batch from `input_ids` (B, T), `labels` in transformers' convention (of the same positions, -100 ignored;
    default: the ids, less what `attention_mask` masks) and, for `unit` document, `unit_ids` (B, T); all other tensors
    are for the model. Its sequences have positions `first` and on.

    Raises ValueError where something is missing, has another shape, or a labelled position belongs to no unit.
    """
    ids_BT = torch.as_tensor(given.get("input_ids", []), device=device)
    if ids_BT.dim() != 2 or not ids_BT.numel():
        raise ValueError(f"a micro-batch needs input_ids of shape (B, T), not {tuple(ids_BT.shape)}")
    others = {
        name: torch.as_tensor(value, device=device)
        for name, value in given.items()
        if name not in _OURS and value is not None
    }
    labels = given.get("labels")
    if labels is None:
        labels = ids_BT.where(others.get("attention_mask", torch.ones_like(ids_BT)) != 0, IGNORE)
    labels = torch.as_tensor(labels, device=device)
    if labels.shape != ids_BT.shape:
        raise ValueError(f"labels has shape {tuple(labels.shape)}, input_ids {tuple(ids_BT.shape)}; make them alike")
    for name, tensor in others.items():
        if not tensor.dim() or len(tensor) != len(ids_BT):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, which does not fit input_ids {tuple(ids_BT.shape)}"
            )
    metadata = given.get("metadata")
    if metadata is not None and len(metadata) != len(ids_BT):
        raise ValueError(f"metadata has {len(metadata)} objects for {len(ids_BT)} sequences; give one for each")
    if (unit == "document") != ("unit_ids" in given):
        raise ValueError("influence.unit 'document' and unit_ids in every micro-batch go together")
    labels_BT = next_token_labels(labels)
    if "unit_ids" in given:
        units = _units(torch.as_tensor(given["unit_ids"]).cpu(), labels_BT.cpu(), first)
    else:
        length = ids_BT.shape[1]
        units = [_whole(row, first, length) for row in range(len(ids_BT))]
    return Batch(ids_BT, labels_BT, units, others)


def _whole(row: int, first: int, length: int) -> Unit:
    return Unit(first + row, first + row, (row * length, (row + 1) * length), [first + row], "-")


def _units(ids_BT: Tensor, labels_BT: Tensor, first: int) -> list[Unit]:
    """Every run of one id in a row."""
    if ids_BT.shape != labels_BT.shape:
        raise ValueError(
            f"unit_ids has shape {tuple(ids_BT.shape)}, input_ids {tuple(labels_BT.shape)}; make them alike"
        )
    units, length = [], ids_BT.shape[1]
    for row, ids_T in enumerate(ids_BT):
        values, counts = ids_T.unique_consecutive(return_counts=True)
        stops = counts.cumsum(0).tolist()
        runs = [
            (number, stop - count, stop)
            for number, count, stop in zip(values.tolist(), counts.tolist(), stops, strict=True)
            if number > NO_UNIT
        ]
        if len({number for number, *_ in runs}) < len(runs):
            raise ValueError(f"unit_ids: a unit of row {row} comes in several pieces; give each piece an id of its own")
        if bool(((ids_T <= NO_UNIT) & (labels_BT[row] != IGNORE)).any()):
            raise ValueError(f"unit_ids: a labelled position of row {row} belongs to no unit, so nobody would train it")
        units += [
            Unit(first + row, first + row, (row * length + start, row * length + stop), [number], "-")
            for number, start, stop in runs
        ] or [_whole(row, first, length)]
    return units


class Rows:
    """A collection of single sequences, dicts as in a batch but one-dimensional, in a seeded order."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], seed: int) -> None:
        if not len(rows):
            raise ValueError("the reference holds no sequence; give it one or more")
        self._rows, self._order = rows, Order(len(rows), seed)

    def batch_at(self, positions: list[int], device: torch.device) -> Batch:
        """The sequences at these positions of the order, padded to the longest without labels."""
        rows = [self._rows[self._order.row(position)] for position in positions]
        tensors = [{name: torch.as_tensor(value) for name, value in row.items() if name != "metadata"} for row in rows]
        for row in tensors:
            ids_T = row["input_ids"]
            row.setdefault("labels", ids_T.where(row.get("attention_mask", torch.ones_like(ids_T)) != 0, IGNORE))
        length = max(len(row["input_ids"]) for row in tensors)
        stacked = {}
        for name in tensors[0].keys() - {"unit_ids"}:
            value = IGNORE if name == "labels" else 0
            padded = [F.pad(row[name], (0, length - len(row[name])), value=value) for row in tensors]
            stacked[name] = torch.stack(padded)
        return batch_of(stacked, positions[0], device, "sequence")
