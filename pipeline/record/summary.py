"""The end of a run on one screen."""

from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from pipeline.record import subset_rates
from pipeline.record.headline import WORDS, headline


def print_summary(summary: dict[str, Any]) -> None:
    """The end of a run on one screen: the held-out figure before and after, units scored and removed, by subset."""
    before, after = summary["evaluation_before"], summary["evaluation_after"]
    units = summary["units_by_subset"]
    table = Table(title=f"{summary['run_dir']}: {summary['steps']} steps", title_justify="left")
    table.add_column("subset")
    for name in (f"{WORDS[headline(after)]} before", "after", "units", "removed", "removed %"):
        table.add_column(name, justify="right")
    for subset in sorted({*units, *(before or {}).get("subsets", {})}):
        scored, removed = units.get(subset, (0, 0))
        table.add_row(subset, *_bits(before, after, subset), str(scored), str(removed), _percent(removed, scored))
    scored, removed = (int(number) for number in np.sum([*units.values(), (0, 0)], axis=0))
    table.add_section()
    table.add_row("all", *_bits(before, after, None), str(scored), str(removed), _percent(removed, scored))
    console = Console()
    console.print(table)
    for row in summary["standing_out"]:
        console.print(f"stands out: {subset_rates.in_words(row)}", style="yellow", markup=False, soft_wrap=True)
    console.print(
        f"scoring took {_percent(summary['scoring_fraction'] or 0, 1)} % of the time of a step\n"
        f"ledger:      {summary['run_dir']}/ledger/*.parquet (one row per scored unit)\n"
        f"model:       {summary['run_dir']}/model (Hugging Face format)\n"
        + (f"best:        {summary['best_checkpoint']} (of all evaluated)\n" if summary["best_checkpoint"] else "")
        + f"TensorBoard: tensorboard --logdir {summary['run_dir']}/tensorboard",
        highlight=False,
        soft_wrap=True,
    )


def _bits(before: dict[str, Any] | None, after: dict[str, Any] | None, subset: str | None) -> list[str]:
    found = [e and (e["subsets"].get(subset) if subset else e["all"]) for e in (before, after)]
    return [f"{e[headline(after)]:.3f}" if e else "-" for e in found]


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f}" if whole else "-"
