"""One row per scored unit, in parquet: which document, which score, what became of it and why."""

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.config.writing import not_written

SCHEMA = pa.schema(
    [
        ("step", pa.int64()),  # optimizer step, from 1
        ("micro_step", pa.int32()),  # micro-batch within it, from 0
        ("rank", pa.int32()),
        ("epoch", pa.int64()),
        ("position", pa.int64()),  # global position in the sample order
        ("sample_id", pa.int64()),  # row of the prepared dataset
        ("document_ids", pa.list_(pa.int64())),
        ("subset", pa.string()),  # the one with most of the unit's tokens
        ("tokens", pa.int32()),  # labelled ones
        ("loss", pa.float32()),  # mean over them, nats; null where it is not finite
        ("score", pa.float32()),  # positive helps; null where nothing was scored or it is not finite
        ("kept", pa.bool_()),
        ("reason", pa.string()),  # why it was not kept as it was, or why a flagged unit was
        ("weight", pa.float32()),  # of its tokens in the loss: 0 dropped, 1 kept, else reweighted
    ]
)


_ROW_GROUP = 65_536


class Ledger:
    """Rows collected by one process, rank 0. They become a part file, whole or not at all, at every `commit`.

    A part is named after the steps in it, `steps-00000001-00000050.parquet`; until it is committed it is a `.partial`
    file that no reader takes for a part.
    """

    def __init__(self, run_dir: Path, step: int) -> None:
        """Go on after checkpoint `step`: rows of later steps belong to a future that did not happen; discard them."""
        self._directory = run_dir / "ledger"
        self._directory.mkdir(parents=True, exist_ok=True)
        self._next_step = step + 1
        self._rows: list[pa.Table] = []
        self._writer: pq.ParquetWriter | None = None
        for partial in self._directory.glob("*.partial"):
            partial.unlink()
        for part in self._directory.glob("*.parquet"):
            first, last = (int(number) for number in part.stem.split("-")[1:])
            if first > step:
                part.unlink()
            elif last > step:
                # Written between two checkpoints, of which only an older one is resumed from.
                kept = pq.read_table(part, schema=SCHEMA).filter(pc.field("step") <= step)
                self._publish(kept, first, step)
                part.unlink()

    def append(self, rows: pa.Table) -> None:
        self._rows.append(rows)
        if sum(len(table) for table in self._rows) >= _ROW_GROUP:
            self._write()

    def commit(self, step: int) -> None:
        """Publish all rows up to and including `step`, the step of the checkpoint just written.

        Raises OSError where there is no room: the checkpoint must then not become the newest.
        """
        try:
            self._write()
            if self._writer is None:
                return
            self._writer.close()
        except OSError as error:
            before = (self._directory.parent / "checkpoints" / "latest").is_file()
            whole = "Whole are the newest checkpoint and its rows" if before else ""
            raise not_written(self._directory, error, whole) from error
        self._writer = None
        self._partial.rename(self._part(self._next_step, step))
        self._next_step = step + 1

    def _write(self) -> None:
        if not self._rows:
            return
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._partial, SCHEMA)
        self._writer.write_table(pa.concat_tables(self._rows))
        self._rows.clear()

    def _publish(self, rows: pa.Table, first: int, last: int) -> None:
        pq.write_table(rows, self._partial)
        self._partial.rename(self._part(first, last))

    @property
    def _partial(self) -> Path:
        return self._directory / "rows.partial"

    def _part(self, first: int, last: int) -> Path:
        return self._directory / f"steps-{first:08d}-{last:08d}.parquet"


def table(columns: dict[str, Any]) -> pa.Table:
    """Rows from columns: lists, or one value for all rows. Losses and scores that are not finite become
    null."""
    length = len(columns["position"])
    full = {name: value if isinstance(value, list) else [value] * length for name, value in columns.items()}
    for name in ("loss", "score"):
        full[name] = [value if math.isfinite(value) else None for value in full[name]]
    return pa.table(full, schema=SCHEMA)


def read(run_dir: Path) -> pa.Table:
    """All committed rows of a run, in the order of the steps."""
    parts = sorted((Path(run_dir) / "ledger").glob("steps-*.parquet"))
    return pa.concat_tables([pq.read_table(part, schema=SCHEMA) for part in parts] or [SCHEMA.empty_table()])


def counts_by_subset(rows: pa.Table, unit: str = "sequence") -> dict[str, tuple[int, int]]:
    """(units, removed) of every subset; `unit`: `influence.unit` of the run."""
    scored, removed = scored_and_removed(rows, unit)
    counted = pa.table({"subset": rows["subset"], "scored": scored, "removed": removed})
    grouped = counted.group_by("subset").aggregate([("scored", "sum"), ("removed", "sum")])
    return {row["subset"]: (row["scored_sum"], row["removed_sum"]) for row in grouped.to_pylist()}


def scored_and_removed(rows: pa.Table, unit: str) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """How many units each row is, and how many of these were removed: 1, and whether it was not kept; with `unit` token
    its labelled tokens, and those without weight."""
    if unit != "token":
        removed = pc.cast(pc.invert(rows["kept"]), pa.int64())
        return pc.add(pc.multiply(removed, 0), 1), removed
    tokens = pc.cast(rows["tokens"], pa.int64())
    # Kept tokens have weight 1; a mean above it is of tokens reweighted.
    gone = pc.multiply(tokens, pc.subtract(1.0, pc.min_element_wise(rows["weight"], 1.0)))
    return tokens, pc.cast(pc.round(gone), pa.int64())
