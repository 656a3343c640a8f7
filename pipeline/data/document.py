"""What reading gives: a document, or a problem in its place."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

Split = Literal["train", "eval", "reference"]


SHARD = 2**40
"""The training documents of a shard are numbered from this times its place on, from 0: ids are unique although no shard
knows how many documents the others have."""


def document_ids(part: Mapping[str, Any]) -> list[range]:
    """The ids of the documents of a split, of which `part` is the report: of each shard, where there are any."""
    counts = part.get("shards", [part["documents"]])
    return [range(place * SHARD, place * SHARD + count) for place, count in enumerate(counts)]


@dataclass(frozen=True)
class Document:
    text: str
    subset: str
    file: str
    line: int
    """Where it starts: line of the file, or row (hub, parquet, csv), from 1."""
    record: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)
    """What it was made of, where that is more than its text; only if asked for, or it would fill the memory."""


@dataclass(frozen=True)
class Problem:
    file: str
    line: int
    """As in `Document`; 0 for the file itself."""
    what: str
    """Its kind, in the same words wherever it occurs, so that kinds can be counted."""
    whole_file: bool = field(default=False, compare=False)
    """Whether the file is damaged, so that nobody knows how much of it is lost."""


class Encoded(NamedTuple):
    """A document as tokens."""

    ids: np.ndarray
    subset: str
    row: Mapping[str, Any] = {}
    """What else its row says, by column."""
    source: Mapping[str, Any] = {}
    """What else documents/*.parquet says of it."""
