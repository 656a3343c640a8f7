"""Run directories read into tables: one run's evidence, and several runs as arms."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline.evidence import arms, ledger_tables
from pipeline.record import ledger, subset_rates
from pipeline.record.starts import config_of_run

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
    config = config_of_run(directory)
    summary, fidelity = (_json(directory / name) for name in ("summary.json", "fidelity.json"))
    table = ledger.read(directory)
    influence = config["influence"]
    scored, gone = ledger.scored_and_removed(table, influence.get("unit", "sequence"))
    counted = table.to_pandas().assign(units=scored.to_pandas(), removed=gone.to_pandas())
    rows = ledger_tables.comparable(counted, influence.get("scope", "micro_step"))
    last, planned = int(rows["step"].max()) if len(rows) else 0, config["max_steps"]
    missing = ""
    if last < planned or summary is None:
        missing = f"its ledger ends at step {last} of {planned}" if last < planned else "it has no summary.json"
    return Run(directory, config, summary, rows, _shown_fidelity((fidelity or {}).get("rows", []), config), missing)


def _shown_fidelity(rows: list[dict[str, Any]], config: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of one reference, Adam's geometry where it was measured, with the run's own `include_self`: what fits
    into one table. fidelity.json has all."""
    own_term = "in" if config["influence"].get("include_self", True) else "out"
    measured = [row for row in rows if row["pearson_mean"] is not None and row["own_term"] in (own_term, "target")]
    wanted = [name for name in ("ip_adam", "ip") if any(row["reference"] == name for row in measured)]
    return [row for row in measured if row["reference"] in wanted[:1]]


def evidence_of(run: Run) -> dict[str, Any]:
    """All tables of one run, as plain values: see evidence.py and removal.py. Raises ValueError without rows."""
    rows = run.rows
    refuse_empty(run)
    warmup = run.config["policy"]["warmup_steps"]
    ordered = ledger_tables.importance(rows)
    mean_ranks = rows.groupby("subset")["rank"].mean()
    units = rows.groupby("subset")[["units", "removed"]].sum()
    counts = {str(name): (int(row.units), int(row.removed)) for name, row in units.iterrows() if row.units}
    return {
        "run_dir": str(run.directory),
        "seed": run.config["seed"],
        "incomplete": run.missing,
        "steps": int(rows["step"].max()),
        "units": int(rows["units"].sum()),
        "removed": int(rows["removed"].sum()),
        "epochs": int(rows["epoch"].max()) + 1,
        "fidelity": run.fidelity,
        "score_bands": ledger_tables.score_bands(rows),
        "removed_over_time": ledger_tables.removed_over_time(rows),
        "participation": ledger_tables.participation(rows),
        "trajectories": ledger_tables.trajectories(rows),
        "agreement_between_epochs": ledger_tables.agreement_between_epochs(rows),
        "removals": [
            row | {"mean_rank": None if pd.isna(mean_ranks[row["subset"]]) else float(mean_ranks[row["subset"]])}
            for row in subset_rates.by_subset(counts, independent=run.config["influence"].get("unit") != "token")
        ],
        "noise": ledger_tables.noise_found(rows, warmup),
        "importance": {
            "lowest": ordered.head(_IMPORTANCE_ROWS).to_dict("records"),
            "highest": ordered.tail(_IMPORTANCE_ROWS)[::-1].to_dict("records"),
        },
    }


def refuse_empty(run: Run) -> None:
    """Raises ValueError where a run has nothing to show yet."""
    if run.rows.empty:
        raise ValueError(f"{run.directory}: its ledger has no rows yet; they come with the first checkpoint")


def report(runs: Sequence[Run]) -> dict[str, Any]:
    """warnings, arms (see `arms.compare`; of complete runs only) and runs (see `evidence_of`, with the arm's name).

    Raises ValueError where no run has rows, or two are the same arm with the same seed.
    """
    found = [run for run in runs if not run.rows.empty]
    if not found:
        refuse_empty(runs[0])
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
        (row for row in tables["noise"] if row["part"] == "all" and row["kind"] == ledger_tables.ALL_KINDS), {}
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


def _plain(value: Any) -> Any:
    """numpy's numbers and arrays as JSON has them."""
    return value.tolist()
