"""The end of a run on one screen."""

from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from pipeline.record import subset_rates
from pipeline.record.headline import headline


def print_summary(summary: dict[str, Any]) -> None:
    """The end of a run on one screen: the held-out figure before and after, units scored and removed, by subset."""
    before, after = summary["evaluation_before"], summary["evaluation_after"]
    units = summary["units_by_subset"]
    table = Table(title=f"{summary['run_dir']}: {summary['steps']} steps", title_justify="left")
    table.add_column("subset")
    other = summary.get("compared_with")
    names = ("after", f"less {Path(other['run_dir']).name}") if other else ("after",)
    for name in (f"{headline(after and after['all']).short} before", *names, "units", "removed", "removed %"):
        table.add_column(name, justify="right")
    for subset in sorted({*units, *(before or {}).get("subsets", {})}):
        scored, removed = units.get(subset, (0, 0))
        table.add_row(
            subset, *_figures(before, after, other, subset), str(scored), str(removed), _percent(removed, scored)
        )
    scored, removed = (int(number) for number in np.sum([*units.values(), (0, 0)], axis=0))
    table.add_section()
    table.add_row("all", *_figures(before, after, other, None), str(scored), str(removed), _percent(removed, scored))
    console, best = Console(), summary["best_checkpoint"]
    console.print(table)
    for row in summary["standing_out"]:
        console.print(f"stands out: {subset_rates.in_words(row)}", style="yellow", markup=False, soft_wrap=True)
    console.print(
        f"scoring took {_percent(summary['scoring_fraction'] or 0, 1)} % of the time of a step\n"
        f"ledger:      {summary['run_dir']}/ledger/*.parquet (one row per scored unit)\n"
        f"model:       {summary['run_dir']}/model (Hugging Face format)\n"
        + (f"best:        {best} (python -m pipeline.export makes a model of it)\n" if best else "")
        + f"TensorBoard: tensorboard --logdir {summary['run_dir']}/tensorboard",
        highlight=False,
        soft_wrap=True,
    )


def _figures(
    before: dict[str, Any] | None, after: dict[str, Any] | None, other: dict[str, Any] | None, subset: str | None
) -> list[str]:
    """Before, after, and where there is another run how much more than its after."""
    found = [e and (e["subsets"].get(subset) if subset else e["all"]) for e in (before, after)]
    key = headline(after and after["all"]).key
    shown = [f"{e[key]:.3f}" if e else "-" for e in found]
    if other is None:
        return shown
    its = other["evaluation"]["subsets"].get(subset) if subset else other["evaluation"]["all"]
    return [*shown, f"{found[1][key] - its[key]:+.3f}" if found[1] and its else "-"]


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f}" if whole else "-"
