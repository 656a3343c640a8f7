"""The model card of an exported model: what it was trained on, what was removed and why, what it gained."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from huggingface_hub import ModelCardData

from pipeline.config.schema import Config
from pipeline.data.hub import hub_corpus
from pipeline.record import ledger, subset_rates
from pipeline.record.headline import headline

PAPER = "https://arxiv.org/abs/2510.16007"


def model_card(
    config: Config, rows: pa.Table, step: int, evaluations: Mapping[int, dict[str, Any]], policy: str
) -> str:
    """README.md of the model after `step`, in the Hugging Face hub's form. `rows`: the ledger up to there;
    `evaluations`: held-out figures by step; `policy`: what became of units, in a sentence, empty where none was
    scored."""
    base = config.model.name_or_path
    scratch = base.endswith(".json")
    sources = [
        entry
        for files in config.data.train_sources.values()
        for entry in ([files] if isinstance(files, str) else files)
    ]
    facts = ModelCardData(
        base_model=None if scratch or Path(base).exists() else base,
        datasets=[corpus.name for source in sources if (corpus := hub_corpus(source))] or None,
        library_name="peft" if config.model.peft else "transformers",
        pipeline_tag="text-classification" if config.task.classifies else "text-generation",
    )
    began = f"A model of `{base}`, from scratch" if scratch else f"`{base}`, trained further"
    tokens = sum(rows["tokens"].to_pylist())
    parts = [
        f"---\n{facts.to_yaml()}\n---\n\n# {Path(config.run_dir).name}, step {step:,}",
        f"{began}, for {step:,} optimizer steps; {tokens:,} tokens were read for them.",
        f"## Read, and removed\n\n{_removed(config, rows, policy)}\n\n{_subsets(rows, config.influence.unit)}",
        _held_out(evaluations, step),
        "## Files\n\n" + "\n".join(f"- `{source}`" for source in sources),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _removed(config: Config, rows: pa.Table, policy: str) -> str:
    if not policy:
        return "Nothing was scored and nothing was removed."
    reasons = Counter(rows.filter(pc.invert(rows["kept"]))["reason"].to_pylist())
    why = ", ".join(f"{count:,} for `{reason}`" for reason, count in reasons.most_common()) or "none"
    return (
        f"Estimator `{config.influence.estimator}`, reference `{config.influence.reference}` (influence as in "
        f"[arXiv 2510.16007]({PAPER})): {policy}. Not trained on: {why}."
    )


def _subsets(rows: pa.Table, unit: str) -> str:
    """A line a subset, the largest first."""
    counts = ledger.counts_by_subset(rows, unit)
    lines = [
        f"| {subset} | {units:,} | {removed:,} | {removed / max(units, 1):.1%} |"
        for subset, (units, removed) in sorted(counts.items(), key=lambda item: -item[1][0])
    ]
    marked = subset_rates.standing_out(counts, independent=unit != "token")
    standing_out = [f"\n{subset_rates.in_words(row)}." for row in marked]
    return "\n".join([f"| subset | {unit}s read | removed | |", "|---|---|---|---|", *lines, *standing_out])


def _held_out(evaluations: Mapping[int, dict[str, Any]], step: int) -> str:
    """Bits per byte, or accuracy, by subset, before the first step and at `step`, where they are known; else empty."""
    before, after = evaluations.get(0), evaluations.get(step)
    if after is None:
        return ""
    every = {"all": after["all"], **after["subsets"]}
    shown = headline(after["all"])
    lines = [f"| {name} | {_figure(before, name, shown.key)} | {row[shown.key]:.3f} |" for name, row in every.items()]
    head = [f"| held-out text | {shown.short} before | after |", "|---|---|---|"]
    return "\n".join(["## Held-out text\n", *head, *lines])


def _figure(figures: dict[str, Any] | None, name: str, key: str) -> str:
    found = figures and {"all": figures["all"], **figures["subsets"]}.get(name)
    return f"{found[key]:.3f}" if found else "-"
