"""Do the scores mean what they say? Every estimator against what samples really do, at the checkpoints of a run.

python -m pipeline.fidelity --config RUN_DIR/config.yaml [--fidelity.key value ...]

One process, no launcher. Scores come from the code that training runs; the references, in float64, from shapley.py.
Writes RUN_DIR/fidelity.json and RUN_DIR/fidelity.png.
"""

from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from pipeline.config.cli import exit_on_user_error, parse
from pipeline.engine.json_check import check_deepspeed_json
from pipeline.evidence.config import FidelityRun
from pipeline.evidence.fidelity_scores import measure


def print_table(rows: list[dict[str, Any]]) -> None:
    """Pearson's correlation, the mean over checkpoints and batches."""
    columns = list(dict.fromkeys((row["reference"], row["own_term"]) for row in rows))
    title = "correlation with the references (self-influence in, out; or on a target)"
    table = Table(title=title, title_justify="left")
    for name in ("estimator", "sketch"):
        table.add_column(name, no_wrap=True)
    for reference, own_term in columns:
        table.add_column(f"{reference} {own_term}".replace("_", " ").replace(" ", "\n"), justify="right", min_width=5)
    for key in dict.fromkeys((row["estimator"], row["precondition"], row["sketch"]) for row in rows):
        cells = []
        for column in columns:
            numbers = [
                row["pearson_mean"]
                for row in rows
                if (row["estimator"], row["precondition"], row["sketch"]) == key
                and (row["reference"], row["own_term"]) == column
                and row["pearson_mean"] is not None
            ]
            cells.append(f"{np.mean(numbers):.2f}" if numbers else "-")
        estimator, precondition, sketch = key
        name = estimator if precondition == "none" else f"{estimator}/{precondition}"
        table.add_row(name, sketch, *cells)
    Console().print(table)


def main(argv: list[str] | None = None) -> None:
    config = parse("pipeline.fidelity", argv, FidelityRun, check_deepspeed_json)
    with exit_on_user_error("pipeline.fidelity"):
        report = measure(config)
    print_table(report["rows"])
    print(f"{config.run_dir}/fidelity.json and fidelity.png hold the rest")


if __name__ == "__main__":
    main()
