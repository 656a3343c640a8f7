"""Which texts helped and harmed, and who was removed when; or what lies in a packed sequence, before training.

python -m pipeline.inspect RUN_DIR [--rows 10]
python -m pipeline.inspect --prepared DIR [--row N]

--html FILE.html writes one page with everything in it, --json prints it as JSON. The history of one document is
pipeline.explain's: python -m pipeline.explain RUN_DIR --document ID. Exit code 2, with a message, where there is no
such run, dataset or row.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from pipeline.config.cli import exit_on_user_error
from pipeline.evidence.inspection import (
    documents_in_words,
    edges_in_words,
    fate,
    inspect_row,
    inspect_run,
    row_in_words,
    run_in_words,
)
from pipeline.evidence.inspection_page import row_page, run_page

_BEGINNING = 300
"""Characters of a text of a run that a terminal gets."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m pipeline.inspect", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run_dir", type=Path, nargs="?", metavar="RUN_DIR", help="run directory of a config")
    parser.add_argument("--rows", type=int, default=10, help="texts of each end that are shown (default: 10)")
    parser.add_argument("--prepared", type=Path, metavar="DIR", help="a prepared dataset instead: one packed sequence")
    parser.add_argument("--row", type=int, default=0, help="which one (default: 0)")
    parser.add_argument("--html", type=Path, metavar="FILE.html", help="write a page instead of printing")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    if (arguments.run_dir is None) == (arguments.prepared is None):
        parser.error("name a RUN_DIR, or a dataset with --prepared")
    if arguments.html and arguments.html.suffix != ".html":
        parser.error(f"--html: {arguments.html} does not end in .html; give it that ending")
    with exit_on_user_error("pipeline.inspect"):
        if arguments.prepared is not None:
            content, to_page, show = inspect_row(arguments.prepared, arguments.row), row_page, _show_row
        else:
            content, to_page, show = inspect_run(arguments.run_dir, arguments.rows), run_page, _show_run
        if arguments.html:
            arguments.html.parent.mkdir(parents=True, exist_ok=True)
            arguments.html.write_text(to_page(content), encoding="utf-8")
    if arguments.json:
        print(json.dumps(content, indent=2, ensure_ascii=False))
    elif arguments.html:
        print(arguments.html)
    else:
        show(content, Console(highlight=False))


def _show_run(content: dict[str, Any], console: Console) -> None:
    console.print(f"{content['run_dir']}: {run_in_words(content)}", markup=False)
    console.print(_over_time(content["over_time"]))
    for kind, style in (("harmful", "red"), ("helpful", "green")):
        console.print(f"\nthe most {kind} texts, by score over the root mean square of those beside it", style="bold")
        for row in content[kind]:
            loss = "-" if row["loss"] is None else f"{row['loss']:.3f}"
            head = Text(f"{row['relative']:+.2f} ×  ", style=style)
            head.append(f"score {row['score']:.3g}, loss {loss}, step {row['step']:,}, {row['subset']}, {fate(row)}, ")
            head.append(f"{documents_in_words(row)}, ")
            head.append(row["source"], style="cyan")
            console.print(head, soft_wrap=True)
            text = " ".join(row["text"][:_BEGINNING].split())
            console.print(Padding(Text(text, style="dim"), (0, 0, 0, 4)))
    console.print(
        f"\none document: python -m pipeline.explain {content['run_dir']} --document ID", markup=False, soft_wrap=True
    )


def _over_time(rows: list[dict[str, Any]]) -> Table:
    """A row a subset, a column a stretch of steps: the share that was removed, of how many."""
    table = Table(title="removed, of how many units, by steps", title_justify="left", box=None, pad_edge=False)
    table.add_column("subset", overflow="fold")
    stretches = sorted({(row["first"], row["last"]) for row in rows})
    for first, last in stretches:
        table.add_column(f"{first}-{last}", justify="right", no_wrap=True)
    by_place = {(row["subset"], row["first"]): row for row in rows}
    for subset in dict.fromkeys(row["subset"] for row in rows):
        found = [by_place.get((subset, first)) for first, _ in stretches]
        table.add_row(Text(subset), *(f"{row['rate']:.0%}/{row['units']}" if row else "-" for row in found))
    return table


def _show_row(content: dict[str, Any], console: Console) -> None:
    console.print(row_in_words(content), markup=False, style="bold")
    for document in content["documents"]:
        where = f"tokens {document['first']} to {document['stop'] - 1}, {edges_in_words(document)}"
        console.print()
        console.print(
            Text(f"document {document['document_id']}, {document['subset']}, {document['source']}, {where}", "cyan"),
            soft_wrap=True,
        )
        console.print(document["text"], markup=False)


if __name__ == "__main__":
    main()
