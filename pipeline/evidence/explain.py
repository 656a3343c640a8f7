"""A step's units, or a document's history, out of the ledger."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from transformers import AutoTokenizer

from pipeline.data.prepared import load_split
from pipeline.evidence.valued_corpus import by_document, sources_of
from pipeline.record import ledger
from pipeline.record.starts import config_of_run

_BEGINNING = 60
"""Characters of a text that stand in a table."""


_GAP = "\n[...]\n"
"""Where a part of a text was not read."""


class Explained(NamedTuple):
    title: str
    rows: pd.DataFrame
    text: str = ""


def explain_step(run_dir: Path, step: int, by: str, rows: int) -> Explained:
    """The units of a step, highest loss or lowest score first, with the files and the beginning of the text of each.
    Raises ValueError where the ledger has no such step."""
    config, table = config_of_run(run_dir), ledger.read(run_dir).to_pandas()
    part = table[table["step"] == step]
    if part.empty:
        raise ValueError(f"step {step} is not in the ledger of {run_dir}, {_range(table)}")
    first = part.sort_values(by, ascending=by == "score", na_position="first").head(rows)
    sources, texts = sources_of(config["data"]["prepared_dir"]), Texts(config["data"]["prepared_dir"])
    shown = first[["position", "subset", "tokens", "loss", "score", "reason"]].copy()
    shown["source"] = [source_of(sources, documents) for documents in first["document_ids"]]
    shown["text"] = [
        texts.of(sample, documents)[:_BEGINNING].replace("\n", " ")
        for sample, documents in zip(first["sample_id"], first["document_ids"], strict=True)
    ]
    kept = part[part["kept"]]
    mean = (kept["loss"] * kept["tokens"]).sum() / max(kept["tokens"].sum(), 1)
    title = f"step {step}: {len(part)} units, {len(part) - len(kept)} removed, mean loss of the rest {mean:.4f}"
    return Explained(title, shown.reset_index(drop=True))


def explain_document(run_dir: Path, document: int) -> Explained:
    """Every unit that had a part of the document, in order, and the text of these parts. Raises ValueError where there
    is no such document."""
    config = config_of_run(run_dir)
    sources = sources_of(config["data"]["prepared_dir"])
    if document not in sources.index:
        least, largest = sources.index.min(), sources.index.max()
        raise ValueError(
            f"document {document} is not in {config['data']['prepared_dir']}: the least id there is {least}, the "
            f"largest {largest}"
        )
    rows = by_document(ledger.read(run_dir).to_pandas())
    own = rows[rows["document_id"] == document]
    source = sources.loc[document]
    title = (
        f"document {document}: {source_of(sources, [document])}, subset {source.subset}, {source.tokens} tokens; units "
        f"that read it: {len(own)}, that trained on it: {int(own['kept'].sum())}"
    )
    shown = own[["step", "micro_step", "epoch", "position", "loss", "score", "weight", "reason"]]
    texts = Texts(config["data"]["prepared_dir"])
    parts = sorted(own["sample_id"].unique().tolist())
    text = "".join(
        _GAP * (index > 0 and sample != parts[index - 1] + 1) + texts.of(sample, [document])
        for index, sample in enumerate(parts)
    )
    return Explained(title, shown.reset_index(drop=True), text)


class Texts:
    """Of units, out of the prepared rows."""

    def __init__(self, prepared: str) -> None:
        self._rows = load_split(prepared, "train").with_format("numpy")
        self._tokenizer = AutoTokenizer.from_pretrained(Path(prepared, "tokenizer"))

    def of(self, sample_id: int, document_ids: Any) -> str:
        row = self._rows[int(sample_id)]
        return str(self._tokenizer.decode(row["input_ids"][np.isin(row["document_ids"], document_ids)]))


def source_of(sources: pd.DataFrame, documents: Any) -> str:
    """File and line of the first of a unit's documents, and how many more there are; of a labelled text its label, and
    the true one where that was replaced."""
    first = sources.loc[int(documents[0])]
    more = f" and {len(documents) - 1} more" if len(documents) > 1 else ""
    label = f", labelled {first.label}" if "label" in sources else ""
    true = f" in place of {first.true_label}" if label and first.label != first.true_label else ""
    return f"{first.file}:{first.line}{more}{label}{true}"


def _range(table: pd.DataFrame) -> str:
    return "which is empty" if table.empty else f"which has {table['step'].min()} to {table['step'].max()}"
