"""Packed sequences -> batches."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import torch
from torch import Tensor

from pipeline.config.answers import Answers
from pipeline.config.schema_data import SourceConfig
from pipeline.data.batch import IGNORE, PADDING, Batch, Unit, next_token_labels, to_device
from pipeline.data.mixture import MixtureOrder, Piece, sources_of
from pipeline.data.order import Order
from pipeline.data.prepared import load_answers, load_report, load_split


class Samples:
    """The packed sequences of a split in a seeded order (`Order`, or that of a mixture), and the units in them.

    `answers`: where each row is a labelled text. Batches then end with the longest of their texts, and the label stands
    at the last position of each that is no padding token, where GPT-style models with a classification head answer.

    Documents in `leave_out` are there in name only: token 0 stands for each of theirs, and no position in them, and
    none that would predict a token of theirs, has a label. Order, shapes and units stay what they are.
    """

    mixture: MixtureOrder | None = None

    def __init__(
        self,
        rows: datasets.Dataset,
        seed: int,
        unit: str,
        leave_out: Collection[int] = (),
        mixture: MixtureOrder | None = None,
        answers: Answers | None = None,
    ) -> None:
        self._rows = rows.with_format("numpy")
        self._documents = self._rows.select_columns(["document_ids", "subset"])
        self.mixture, self._unit = mixture, unit
        self._order = mixture or Order(len(rows), seed)
        self._leave_out = np.array(sorted(leave_out), dtype=np.int64)
        self._answers = answers

    def epoch(self, position: int) -> int:
        """How often all sequences, of a mixture those of the source at `position`, were seen before it."""
        return self._order.epoch(position)

    def micro_batches(
        self, position: int, rank: int, world: int, size: int, accumulation: int, device: torch.device
    ) -> list[Batch]:
        """A rank's part of the optimizer step that begins at `position`: global micro-batches one after the other, the
        ranks' parts one after the other in each."""
        firsts = [position + (m * world + rank) * size for m in range(accumulation)]
        return [self.batch(first, size, device) for first in firsts]

    def batch(self, position: int, size: int, device: torch.device) -> Batch:
        """The sequences at positions `position` to `position + size`, not included."""
        return self.batch_at(list(range(position, position + size)), device)

    def batch_at(self, positions: list[int], device: torch.device) -> Batch:
        """The sequences at these positions."""
        rows = self._at(self._rows, positions)
        if self._answers:
            return self._labelled(self._answers, rows, positions, device)
        ids_BT = torch.from_numpy(np.stack(rows["input_ids"]).astype(np.int64))
        documents_BT = torch.from_numpy(np.stack(rows["document_ids"]))
        left_out_BT = torch.from_numpy(np.isin(documents_BT.numpy(), self._leave_out))
        labels_BT = next_token_labels(ids_BT.where((documents_BT != PADDING) & ~left_out_BT, IGNORE))
        labels_BT = labels_BT.where(~left_out_BT, IGNORE)
        ids_BT = ids_BT.where(~left_out_BT, 0)
        return Batch(to_device(ids_BT, device), to_device(labels_BT, device), self._units_of(rows, positions))

    def _labelled(self, answers: Answers, rows: dict, positions: list[int], device: torch.device) -> Batch:
        ids_BT = torch.from_numpy(np.stack(rows["input_ids"]).astype(np.int64))
        documents_BT = np.stack(rows["document_ids"])
        attended_BT = torch.from_numpy(documents_BT != PADDING)
        left_out_BT = torch.from_numpy(np.isin(documents_BT, self._leave_out))
        length = int(attended_BT.sum(1).max())
        at_B = answer_positions(ids_BT[:, :length], answers.padding)
        classes = {label: index for index, label in enumerate(answers.classes)}
        answers_B = torch.tensor([classes[label] for label in rows["label"]])
        labels_BT = torch.full((len(ids_BT), length), IGNORE)
        labels_BT.scatter_(1, at_B[:, None], answers_B.where(~left_out_BT.any(1), IGNORE)[:, None])
        others = {"attention_mask": attended_BT.long()}
        if "token_type_ids" in rows:
            others["token_type_ids"] = torch.from_numpy(np.stack(rows["token_type_ids"]).astype(np.int64))
        units = [
            replace(unit, span=(row * length, (row + 1) * length))
            for row, unit in enumerate(self._units_of(rows, positions))
        ]
        return Batch(
            to_device(ids_BT.where(~left_out_BT, 0)[:, :length], device),
            to_device(labels_BT, device),
            units,
            {name: to_device(values[:, :length].contiguous(), device) for name, values in others.items()},
            answers.padding,
        )

    def units(self, position: int, size: int) -> list[Unit]:
        """The units of those sequences, without their tokens."""
        positions = list(range(position, position + size))
        return self._units_of(self._at(self._documents, positions), positions)

    def tokens_of(self, sample_id: int, document_ids: list[int]) -> list[int]:
        """The tokens of a unit: those of these documents in this row."""
        row = self._rows[sample_id]
        return row["input_ids"][np.isin(row["document_ids"], document_ids)].tolist()

    def _at(self, rows: datasets.Dataset, positions: list[int]) -> dict:
        indices = [self._order.row(position) for position in positions]
        return {"sample_id": indices, **rows[indices]}

    def _units_of(self, rows: dict, positions: list[int]) -> list[Unit]:
        units = []
        for row, (sample_id, document_ids_T, subset) in enumerate(
            zip(rows["sample_id"], rows["document_ids"], rows["subset"], strict=True)
        ):
            length = len(document_ids_T)
            starts = np.flatnonzero(np.diff(document_ids_T, prepend=document_ids_T[0] - 1))
            stops = np.append(starts[1:], length)
            # (document, its subset, first, one past last) for each, padding left out.
            parts = [
                (int(document_ids_T[start]), str(name), int(start), int(stop))
                for start, stop, name in zip(starts, stops, [*subset, ""], strict=False)
                if document_ids_T[start] != PADDING
            ]
            for group in [[part] for part in parts] if self._unit == "document" else [parts]:
                span = (row * length + group[0][2], row * length + group[-1][3])
                documents = [document for document, *_ in group]
                left_out = bool(len(self._leave_out)) and bool(np.isin(documents, self._leave_out).any())
                units.append(Unit(positions[row], sample_id, span, documents, _largest_subset(group), left_out))
        return units


def answer_positions(ids_BT: Tensor, padding: int) -> Tensor:
    """Of each text the last position that is no padding token, (B,); 0 where all are."""
    places_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
    return ((ids_BT != padding) * places_T).argmax(1)


def training_samples(
    prepared_dir: str | Path,
    seed: int,
    unit: str,
    mixture: Mapping[str, SourceConfig] | None,
    leave_out: Collection[int] = (),
    pieces: Sequence[Piece] | None = None,
) -> Samples:
    """The training split in the order of a run; `pieces`: of one whose weights move. Raises
    ValueError where it was not prepared."""
    order = None
    if mixture is not None:
        order = MixtureOrder(sources_of(mixture, load_report(prepared_dir)["train"]), seed, pieces)
    return Samples(load_split(prepared_dir, "train"), seed, unit, leave_out, order, load_answers(prepared_dir))


def _largest_subset(parts: list[tuple[int, str, int, int]]) -> str:
    """The subset with most tokens, the first of equals."""
    tokens: dict[str, int] = {}
    for _, subset, start, stop in parts:
        tokens[subset] = tokens.get(subset, 0) + stop - start
    return max(tokens, key=lambda subset: tokens[subset])
