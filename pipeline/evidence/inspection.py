"""What a run made of its texts, and what lies in a packed sequence: what `pipeline.inspect` shows, as plain values."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from transformers import AutoTokenizer

from pipeline.data.batch import PADDING
from pipeline.data.prepared import load_split
from pipeline.evidence import ledger_tables
from pipeline.evidence.explain import Texts, source_of
from pipeline.evidence.runs import read_run, refuse_empty
from pipeline.evidence.valued_corpus import sources_of

CHARACTERS = 2_000
"""Of a text, at most."""

STRETCHES = 8
"""Of a run, at most, in which removal rates are counted."""


def inspect_run(run_dir: Path, rows: int) -> dict[str, Any]:
    """The `rows` most harmful and the most helpful texts of a run, and its removal rates over time.

    run_dir, steps, units, removed, unscored (ledger rows that are in neither list: their score is no number, or all
        beside it are 0);
    harmful, helpful: each unit once, at its worst and at its best: step, subset, source, document_ids, score,
        relative, loss, kept, reason, text. In the order of `relative`, the score over the root mean square of those
        beside it: scores themselves shrink as a model learns, and those of two steps do not compare;
    over_time: `ledger_tables.removed_over_time`.

    Raises ValueError where there is no run, no row, or no dataset that says where texts came from.
    """
    run = read_run(run_dir)
    refuse_empty(run)
    prepared = run.config["data"]["prepared_dir"]
    sources, texts = sources_of(prepared), Texts(prepared)
    scored = run.rows.dropna(subset=["relative"])

    def first(ascending: bool) -> list[dict[str, Any]]:
        ordered = scored.sort_values("relative", ascending=ascending, kind="stable").drop_duplicates("unit")
        return [_unit(row, sources, texts) for row in ordered.head(rows).itertuples()]

    return {
        "run_dir": str(run_dir),
        "steps": int(run.rows["step"].max()),
        "units": int(run.rows["units"].sum()),
        "removed": int(run.rows["removed"].sum()),
        "unscored": len(run.rows) - len(scored),
        "harmful": first(ascending=True),
        "helpful": first(ascending=False),
        "over_time": ledger_tables.removed_over_time(run.rows, STRETCHES),
    }


def _unit(row: Any, sources: pd.DataFrame, texts: Texts) -> dict[str, Any]:
    return {
        "step": int(row.step),
        "subset": row.subset,
        "source": source_of(sources, row.document_ids),
        "document_ids": [int(number) for number in row.document_ids],
        "score": float(row.score),
        "relative": float(row.relative),
        "loss": None if pd.isna(row.loss) else float(row.loss),
        "kept": bool(row.kept),
        "reason": row.reason or "",
        "text": _cut(texts.of(row.sample_id, row.document_ids)),
    }


def inspect_row(prepared_dir: Path, row: int) -> dict[str, Any]:
    """A packed training sequence of a prepared dataset, as a model will read it, special tokens too.

    prepared_dir, row, rows (of the dataset), tokens, padding; documents, in order: document_id, subset, source, first
    and stop (its tokens here, stop not included), begins and ends (here, or in another row), text.

    Raises ValueError where there is no such dataset or row.
    """
    rows = load_split(prepared_dir, "train").with_format("numpy")
    if not 0 <= row < len(rows):
        raise ValueError(f"--row {row} is not in {prepared_dir}: 0 to {len(rows) - 1} are")
    sources, tokenizer = sources_of(str(prepared_dir)), AutoTokenizer.from_pretrained(prepared_dir / "tokenizer")
    ids_T, owners_T = rows[row]["input_ids"], rows[row]["document_ids"]
    before = int(rows[row - 1]["document_ids"][-1]) if row else PADDING
    after = int(rows[row + 1]["document_ids"][0]) if row + 1 < len(rows) else PADDING
    documents = []
    numbers = [int(number) for number in dict.fromkeys(owners_T.tolist()) if number != PADDING]
    for number, subset in zip(numbers, rows[row]["subset"], strict=True):
        places = np.flatnonzero(owners_T == number)
        documents.append(
            {
                "document_id": number,
                "subset": str(subset),
                "source": source_of(sources, [number]),
                "first": int(places[0]),
                "stop": int(places[-1]) + 1,
                "begins": number != before,
                "ends": number != after,
                "text": str(tokenizer.decode(ids_T[places].tolist())),
            }
        )
    padding = int((owners_T == PADDING).sum())
    return {
        "prepared_dir": str(prepared_dir),
        "row": row,
        "rows": len(rows),
        "tokens": len(ids_T) - padding,
        "padding": padding,
        "documents": documents,
    }


def run_in_words(content: dict[str, Any]) -> str:
    """A run of `inspect_run` in a sentence or two."""
    share, unscored = content["removed"] / max(content["units"], 1), content["unscored"]
    left_out = f" {unscored:,} have no score to compare and stand in neither list." if unscored else ""
    removed = f"{content['removed']:,} removed ({share:.1%})"
    return f"{content['steps']:,} steps, {content['units']:,} units, {removed}.{left_out}"


def row_in_words(content: dict[str, Any]) -> str:
    """A packed sequence of `inspect_row` in a sentence."""
    padding = f", {content['padding']:,} of padding" if content["padding"] else ""
    return (
        f"{content['prepared_dir']}, row {content['row']:,} of 0 to {content['rows'] - 1:,}: {content['tokens']:,} "
        f"tokens of {len(content['documents'])} document{'s' * (len(content['documents']) != 1)}{padding}"
    )


def edges_in_words(document: dict[str, Any]) -> str:
    """Whether a document of a packed sequence is all there."""
    if document["begins"] and document["ends"]:
        return "whole"
    before = "" if document["begins"] else "begins before"
    after = "" if document["ends"] else "goes on behind"
    return " and ".join(filter(None, (before, after)))


def documents_in_words(row: dict[str, Any]) -> str:
    """The ids of a unit's documents, which `pipeline.explain --document` takes."""
    numbers = row["document_ids"]
    shown = ", ".join(str(number) for number in numbers[:4]) + (", ..." if len(numbers) > 4 else "")
    return f"document{'s' * (len(numbers) != 1)} {shown}"


def fate(row: dict[str, Any]) -> str:
    """What became of a unit, in a word or two."""
    reason = f" ({row['reason']})" if row["reason"] else ""
    return f"{'kept' if row['kept'] else 'removed'}{reason}"


def _cut(text: str) -> str:
    return text if len(text) <= CHARACTERS else f"{text[:CHARACTERS]} [...]"
