"""What was it? The units of a step, worst loss first, or the history and text of one document.

python -m pipeline.explain RUN_DIR --step N [--by loss|score] [--rows 20]
python -m pipeline.explain RUN_DIR --document ID

Exit code 2, with a message, where there is no such step or document.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.config.cli import exit_on_user_error
from pipeline.evidence.explain import Explained, explain_document, explain_step


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m pipeline.explain", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="run directory of a config")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--step", type=int, help="optimizer step, from 1: what made this loss?")
    what.add_argument("--document", type=int, metavar="ID", help="document, by its id in the ledger")
    parser.add_argument("--by", choices=("loss", "score"), default="loss", help="highest loss or lowest score first")
    parser.add_argument("--rows", type=int, default=20, help="units of a step that are shown (default: 20)")
    arguments = parser.parse_args(argv)
    with exit_on_user_error("pipeline.explain"):
        if arguments.step is not None:
            found = explain_step(arguments.run_dir, arguments.step, arguments.by, arguments.rows)
        else:
            found = explain_document(arguments.run_dir, arguments.document)
    _print(found)


def _print(found: Explained) -> None:
    """A line a row, whatever the width: what does not fit of a source or a text is cut."""
    console = Console()
    table = Table(title=found.title, title_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False, expand=True)
    for column in found.rows.columns:
        wide = {"source": 3, "text": 2}.get(str(column))
        table.add_column(
            str(column),
            justify="left" if wide or column in ("subset", "reason") else "right",
            ratio=wide,
            no_wrap=True,
            overflow="ellipsis",
        )
    for row in found.rows.itertuples(index=False):
        table.add_row(*map(_shown, row))
    console.print(table)
    if found.text:
        console.print(found.text, markup=False, highlight=False)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.4g}"
    return str(value)


if __name__ == "__main__":
    main()
