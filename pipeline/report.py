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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from rich.console import Console
from rich.table import Table

from pipeline import arms, evidence, ledger, removal
from pipeline.config import exit_on_user_error
from pipeline.page import beyond, pm, to_html

_IMPORTANCE_ROWS = 10


@dataclass(frozen=True)
class Run:
    """A run directory as it was read. `missing`: why it is incomplete, empty where it is not."""

    directory: Path
    config: dict[str, Any]
    summary: dict[str, Any] | None
    rows: pd.DataFrame
    fidelity: list[dict[str, Any]]
    missing: str


def read_run(directory: Path) -> Run:
    """Raises ValueError where `directory` is no run directory."""
    if not (directory / "config.yaml").is_file() or not (directory / "ledger").is_dir():
        raise ValueError(f"{directory} is no run directory: config.yaml or ledger/ is missing")
    config = yaml.safe_load((directory / "config.yaml").read_text())
    summary, fidelity = (_json(directory / name) for name in ("summary.json", "fidelity.json"))
    table = ledger.read(directory)
    rows = evidence.comparable(table.to_pandas(), config["influence"].get("scope", "micro_step"))
    last, planned = int(rows["step"].max()) if len(rows) else 0, config["max_steps"]
    missing = ""
    if last < planned or summary is None:
        missing = f"its ledger ends at step {last} of {planned}" if last < planned else "it has no summary.json"
    return Run(directory, config, summary, rows, _shown_fidelity((fidelity or {}).get("rows", []), config), missing)


def _shown_fidelity(rows: list[dict[str, Any]], config: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of one reference, Adam's geometry where it was measured, with the run's own `include_self`: what fits
    into one table. fidelity.json has all."""
    own_term = "in" if config["influence"].get("include_self", True) else "out"
    measured = [row for row in rows if row["pearson_mean"] is not None and row["own_term"] == own_term]
    wanted = [name for name in ("ip_adam", "ip") if any(row["reference"] == name for row in measured)]
    return [row for row in measured if row["reference"] in wanted[:1]]


def evidence_of(run: Run) -> dict[str, Any]:
    """All tables of one run, as plain values: see evidence.py and removal.py. Raises ValueError without rows."""
    rows = run.rows
    if rows.empty:
        raise ValueError(f"{run.directory}: its ledger has no rows yet; they come with the first checkpoint")
    warmup = run.config["policy"]["warmup_steps"]
    ordered = evidence.importance(rows)
    mean_ranks = rows.groupby("subset")["rank"].mean()
    units = rows.groupby("subset")["kept"].agg(units="size", kept="sum")
    counts = {str(name): (int(row.units), int(row.units - row.kept)) for name, row in units.iterrows()}
    return {
        "run_dir": str(run.directory),
        "seed": run.config["seed"],
        "incomplete": run.missing,
        "steps": int(rows["step"].max()),
        "units": len(rows),
        "removed": int((~rows["kept"]).sum()),
        "epochs": int(rows["epoch"].max()) + 1,
        "fidelity": run.fidelity,
        "score_bands": evidence.score_bands(rows),
        "removed_over_time": evidence.removed_over_time(rows),
        "participation": evidence.participation(rows),
        "trajectories": evidence.trajectories(rows),
        "agreement_between_epochs": evidence.agreement_between_epochs(rows),
        "removals": [
            row | {"mean_rank": None if pd.isna(mean_ranks[row["subset"]]) else float(mean_ranks[row["subset"]])}
            for row in removal.by_subset(counts)
        ],
        "noise": evidence.noise_found(rows, warmup),
        "importance": {
            "lowest": ordered.head(_IMPORTANCE_ROWS).to_dict("records"),
            "highest": ordered.tail(_IMPORTANCE_ROWS)[::-1].to_dict("records"),
        },
    }


def report(runs: Sequence[Run]) -> dict[str, Any]:
    """warnings, arms (see `arms.compare`; of complete runs only) and runs (see `evidence_of`, with the arm's name).

    Raises ValueError where no run has rows, or two are the same arm with the same seed.
    """
    found = [run for run in runs if not run.rows.empty]
    if not found:
        evidence_of(runs[0])
    names = arms.labels([arms.settings(run.config) for run in runs])
    warnings = [
        f"{run.directory} is incomplete: {run.missing}; it is left out of the comparison" for run in runs if run.missing
    ]
    for key, values in arms.other_differences([run.config for run in runs]).items():
        warnings.append(f"the runs differ in {key} ({', '.join(values)}), so their arms do not compare")
    tables = [{"arm": name, **evidence_of(run)} for run, name in zip(runs, names, strict=True) if not run.rows.empty]
    complete = {str(run.directory): run for run in runs if not run.missing}
    results = [_result(table, complete[table["run_dir"]]) for table in tables if table["run_dir"] in complete]
    return {"warnings": warnings, "arms": arms.compare(results), "runs": tables}


def _result(tables: dict[str, Any], run: Run) -> dict[str, Any]:
    """What of a run enters the comparison of arms."""
    assert run.summary is not None
    evaluations = {int(step): figures for step, figures in run.summary.get("evaluations", {}).items()}
    last = run.summary["steps"]
    noise: dict[str, Any] = next(
        (row for row in tables["noise"] if row["part"] == "all" and row["kind"] == evidence.ALL_KINDS), {}
    )
    return {
        **{key: tables[key] for key in ("arm", "seed", "run_dir", "removed")},
        "removed_fraction": tables["removed"] / tables["units"],
        "half": evaluations[last // 2]["all"] if last // 2 in evaluations else None,
        "full": (evaluations.get(last) or run.summary["evaluation_after"] or {}).get("all"),
        "noise_auc": noise.get("auc"),
        "noise_recall": noise.get("recall"),
    }


def _json(path: Path) -> Any:
    """None where there is no such file. Raises ValueError where it is not JSON."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}; remove it, or write it again") from None


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
            raise ValueError(f"--output: {output} does not end in .html")
        content = report([read_run(directory) for directory in directories])
        output.parent.mkdir(parents=True, exist_ok=True)
        output.with_suffix(".json").write_text(json.dumps(content, indent=2, default=_plain))
        output.write_text(to_html(content))
        _print(content)
        print(f"{output}\n{output.with_suffix('.json')}")


def _plain(value: Any) -> Any:
    """numpy's numbers and arrays as JSON has them."""
    return value.tolist()


def _print(content: dict[str, Any]) -> None:
    console = Console()
    if content["arms"]:
        title = "held-out bits per byte by arm, mean ± spread over seeds; AUC of planted noise"
        table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False)
        for column in ("arm", "seeds", "half", "full", "full - none", "beyond", "removed %", "AUC"):
            table.add_column(column, justify="right", no_wrap=True)
        table.columns[0].justify, table.columns[0].no_wrap, table.columns[0].min_width = "left", False, 12
        for row in content["arms"]:
            half, full, removed = (row[key] for key in ("half.bits_per_byte", "full.bits_per_byte", "removed_fraction"))
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
                console.print(f"stands out: {removal.in_words(row)}", style="yellow", markup=False, soft_wrap=True)
    for warning in content["warnings"]:
        console.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
