"""The evidence of one run or many, on one page: do the scores mean something, who is removed, does dropping help?

python -m pipeline.report RUN_DIR... [--output FILE.html]

Writes one HTML file with everything in it, and the same tables as JSON beside it. With several runs it compares arms:
runs that differ in more than the seed (launch/arms.sh makes such runs). Exit code 2, with a message, where a directory
is no run or there is nothing to report.
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.config.cli import exit_on_user_error
from pipeline.evidence.page import beyond, compared_by, pm, to_html
from pipeline.evidence.runs import _plain, read_run, report
from pipeline.record import subset_rates

# The command


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m pipeline.report", description="The evidence of runs on one page.")
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="run directory of a config")
    parser.add_argument(
        "--output", metavar="FILE.html",
        help="where the page goes, and FILE.json beside it (default: report.html in RUN_DIR, or in the directory that "
        "holds all of them)",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    directories = [Path(directory) for directory in dict.fromkeys(os.path.normpath(d) for d in arguments.run_dirs)]
    with exit_on_user_error("pipeline.report"):
        output = Path(arguments.output or Path(os.path.commonpath([d.resolve() for d in directories]), "report.html"))
        if output.suffix != ".html":
            raise ValueError(f"--output: {output} does not end in .html; give it that ending")
        content = report([read_run(directory) for directory in directories])
        output.parent.mkdir(parents=True, exist_ok=True)
        output.with_suffix(".json").write_text(json.dumps(content, indent=2, default=_plain))
        output.write_text(to_html(content))
        _print(content)
        print(f"{output}\n{output.with_suffix('.json')}")


def _print(content: dict[str, Any]) -> None:
    console = Console()
    if content["arms"]:
        shown = compared_by(content["arms"])
        title = f"held-out {shown.words} by arm, mean ± spread over seeds; AUC of planted noise"
        table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False)
        for column in ("arm", "seeds", "half", "full", "full - none", "beyond", "removed %", "AUC"):
            table.add_column(column, justify="right", no_wrap=True)
        table.columns[0].justify, table.columns[0].no_wrap, table.columns[0].min_width = "left", False, 12
        for row in content["arms"]:
            half, full, removed = (row[key] for key in (f"half.{shown.key}", f"full.{shown.key}", "removed_fraction"))
            difference = (full or {}).get("difference")
            table.add_row(
                row["arm"], str(len(row["seeds"])), pm(half, 3, spread=False), pm(full, 3),
                pm(difference, 3, sign=True), beyond(difference), pm(removed, 1, scale=100, spread=False),
                pm(row["noise_auc"], 3, spread=False),
            )  # fmt: skip
        console.print(table)
    for run in content["runs"]:
        for row in run["removals"]:
            if row["stands_out"] and len(content["runs"]) == 1:
                console.print(f"stands out: {subset_rates.in_words(row)}", style="yellow", markup=False, soft_wrap=True)
    for warning in content["warnings"]:
        console.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
