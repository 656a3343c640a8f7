"""The corpus as a run valued it: what became of every document, and the records of those that are worth keeping."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.rules import fractions
from pipeline.config.schema import Config
from pipeline.data.corpus import read_documents
from pipeline.data.document import Document
from pipeline.record import ledger
from pipeline.record.starts import config_of_run

VALUES = "influence"
"""Key of a written record that holds what the run made of it."""


@dataclass(frozen=True)
class Keep:
    """Which documents are written; all that is set must hold."""

    best: float | None = None
    """This fraction of the documents that were read, by their mean score, the highest."""
    min_score: float | None = None
    """Of a mean score of at least this, in the units of the score: only within one run."""
    min_trained: float | None = None
    """Trained on in at least this fraction of the times that it was read."""
    without_reason: list[str] = field(default_factory=list)
    """Never removed for one of these reasons, as the ledger names them: threshold, rate, top, non_finite."""
    unread: bool = False
    """Also what the run never read."""

    def __post_init__(self) -> None:
        fractions({f"--{n}": value for n in ("best", "min_trained") if (value := getattr(self, n)) is not None})


def sources_of(prepared_dir: str) -> pd.DataFrame:
    """Where every training document came from, by its id. Raises ValueError where that is not known."""
    path = Path(prepared_dir, "documents", "train.parquet")
    if not path.exists():  # a directory of such files where the dataset was put together from shards
        raise ValueError(f"{path} is missing: it says where documents came from; prepare the run's dataset again")
    return pq.read_table(path).to_pandas().set_index("document_id")


def by_document(rows: pd.DataFrame) -> pd.DataFrame:
    """Ledger rows, one for each document of each unit, with its `document_id`."""
    return rows.rename(columns={"document_ids": "document_id"}).explode("document_id").astype({"document_id": "int64"})


def documents_of(run_dir: Path) -> pd.DataFrame:
    """Every training document by its id: file, line, subset, tokens, and of the run `times_read` (units with a part of
    it that were scored), `times_trained` (those with a weight above 0), `score` and `loss` (means over those units),
    `reasons` (that any of them was removed for). A unit of several documents counts for each."""
    sources = sources_of(config_of_run(run_dir)["data"]["prepared_dir"])
    rows = by_document(ledger.read(run_dir).to_pandas())
    grouped = rows.groupby("document_id")
    found = pd.DataFrame(
        {
            "times_read": grouped.size(),
            "times_trained": grouped["kept"].sum(),
            "score": grouped["score"].mean(),
            "loss": grouped["loss"].mean(),
            "reasons": rows[~rows["kept"]].groupby("document_id")["reason"].agg(lambda names: sorted(set(names))),
        }
    )
    joined = sources.join(found)
    joined["reasons"] = [names if isinstance(names, list) else [] for names in joined["reasons"]]
    counts = ["times_read", "times_trained"]
    return joined.fillna(dict.fromkeys(counts, 0)).astype(dict.fromkeys(counts, "int64"))


def chosen(documents: pd.DataFrame, keep: Keep) -> pd.DataFrame:
    """Those that are kept."""
    read = documents["times_read"] > 0
    wanted = read.copy()
    if keep.best is not None:
        order = np.argsort(-documents["score"].where(read).to_numpy(), kind="stable")  # what has no score comes last
        wanted &= pd.Series(True, documents.index[order[: round(keep.best * int(read.sum()))]]).reindex(
            documents.index, fill_value=False
        )
    if keep.min_score is not None:
        wanted &= documents["score"] >= keep.min_score
    if keep.min_trained is not None:
        wanted &= documents["times_trained"] >= keep.min_trained * documents["times_read"]
    removed_for = set(keep.without_reason)
    wanted &= documents["reasons"].map(lambda names: not removed_for & set(names))
    return documents[wanted | (~read if keep.unread else False)]


def blend(documents: pd.DataFrame, kept: pd.DataFrame) -> dict[str, dict[str, float]]:
    """By subset: documents and tokens kept, the share of its tokens that is (`kept`), and its share of all tokens that
    are kept (`weight`): the blend of a corpus sampled like this one."""
    before, after = (table.groupby("subset")["tokens"].sum() for table in (documents, kept))
    counts = kept.groupby("subset").size()
    return {
        subset: {
            "documents": int(counts.get(subset, 0)),
            "tokens": int(after.get(subset, 0)),
            "kept": float(after.get(subset, 0) / tokens),
            "weight": float(after.get(subset, 0) / max(after.sum(), 1)),
        }
        for subset, tokens in before.items()
    }


def records_of(config: Config, kept: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """The input's own records of these documents, in the input's order, each with `VALUES`. Raises ValueError where
    the files no longer hold them."""
    values = {(row.file, row.line): (index, row) for index, row in zip(kept.index, kept.itertuples(), strict=True)}
    sources = config.data.train_sources.values()
    documents = chain(*(read_documents(files, config.data, "train", whole_records=True) for files in sources))
    for document in documents:
        if isinstance(document, Document) and (found := values.pop((document.file, document.line), None)):
            number, row = found
            own = {"document_id": number, "times_read": row.times_read, "times_trained": row.times_trained}
            own |= {name: None if pd.isna(value := getattr(row, name)) else float(value) for name in ("score", "loss")}
            yield {**(document.record or {config.data.text_field: document.text}), VALUES: own}
    if values:
        file, line = next(iter(values))
        keys = " and ".join(f"data.{key}" for key in config.data.train_sources)
        raise ValueError(
            f"{keys} no longer hold {len(values)} of the documents, the first at {file}:{line}; give the files that "
            "the run was prepared from"
        )


def write(records: Iterator[dict[str, Any]], output: Path) -> int:
    """`.jsonl` or `.parquet`; returns how many. It appears whole or not at all."""
    partial, count = output.with_name(f"{output.name}.partial"), 0
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix == ".jsonl":
        with open(partial, "w", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                count += 1
    else:
        rows = list(records)
        count = len(rows)
        pq.write_table(pa.Table.from_pylist(rows), partial)
    partial.rename(output)
    return count
