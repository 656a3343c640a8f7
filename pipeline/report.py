"""The evidence of one run or many, on one page: do the scores mean something, who is removed, does dropping help?

python -m pipeline.report RUN_DIR... [--output FILE.html]

Writes one HTML file with everything in it, and the same tables as JSON beside it. With several runs it compares arms:
runs that differ in more than the seed (launch/arms.sh makes such runs). Exit code 2, with a message, where a directory
is no run or there is nothing to report.
"""

import argparse
import base64
import html
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

from pipeline import arms, evidence, figures, ledger, removal
from pipeline.config import exit_on_user_error

_IMPORTANCE_ROWS = 10
_QUARTERS = ["1/4", "2/4", "3/4", "4/4"]


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


# The comparison of arms


def _arms_table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and cells of the comparison on the page."""
    columns = ["arm", "seeds", "perplexity half", "perplexity full", "bits/byte half", "bits/byte full", "full - none"]
    columns += ["beyond spread", "removed", "removed %", "noise AUC", "noise recall"]
    cells = []
    for row in rows:
        half, full = row["half.bits_per_byte"], row["full.bits_per_byte"]
        difference = (full or {}).get("difference")
        cells.append([
            row["arm"], str(len(row["seeds"])),
            _pm(row["half.perplexity"], 2), _pm(row["full.perplexity"], 2), _pm(half, 4), _pm(full, 4),
            _pm(difference, 4, sign=True), _beyond(difference),
            _pm(row["removed"], 0, spread=False), _pm(row["removed_fraction"], 1, scale=100, spread=False),
            _pm(row["noise_auc"], 3), _pm(row["noise_recall"], 3),
        ])  # fmt: skip
    return columns, cells


def _pm(value: dict[str, Any] | None, digits: int, sign: bool = False, scale: float = 1, spread: bool = True) -> str:
    if value is None:
        return "-"
    text = f"{scale * value['mean']:{'+' if sign else ''},.{digits}f}"
    return text if value["spread"] is None or not spread else f"{text} ± {scale * value['spread']:,.{digits}f}"


def _beyond(difference: dict[str, Any] | None) -> str:
    return "-" if difference is None else {None: "-", True: "yes", False: "no"}[difference["beyond_spread"]]


# The page

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em; color: #222 }
h1 { font-size: 1.6em } h2 { font-size: 1.3em; margin-top: 2em; border-bottom: 1px solid #ccc } h3 { margin-top: 1.6em }
img { max-width: 100%; display: block; margin: .5em 0 }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: 13px; margin: .7em 0 }
th, td { padding: .2em .7em; text-align: right; border-bottom: 1px solid #e4e4e4; white-space: nowrap }
th { border-bottom: 1px solid #888 } th:first-child, td:first-child { text-align: left }
.warning { background: #fff3d6; border-left: 4px solid #e0a000; padding: .4em .8em; margin: .5em 0 }
.note { color: #555; font-size: 13px; max-width: 75ch } summary { font-size: 1.15em; font-weight: 600; cursor: pointer }
details { margin: 1em 0 } code { overflow-wrap: anywhere }
"""


def to_html(content: dict[str, Any]) -> str:
    """The page of a `report`, with all figures in it."""
    runs = content["runs"]
    parts = ["<h1>Layer-aware influence: the evidence</h1>"]
    parts += [f'<p class="warning">{html.escape(text)}</p>' for text in content["warnings"]]
    if len(runs) > 1 and content["arms"]:
        parts += _arms(content)
    for run in runs:
        title = f"{run['arm']}, seed {run['seed']}"
        head = f"<p><code>{html.escape(run['run_dir'])}</code>: {run['steps']:,} steps, {run['epochs']} epochs begun, "
        head += f"{run['units']:,} units scored or seen, {run['removed']:,} removed.</p>"
        inside = "\n".join([head, *_run(run)])
        if len(runs) == 1:
            parts.append(f"<h2>{html.escape(title)}</h2>\n{inside}")
        else:
            parts.append(f"<details><summary>{html.escape(title)}</summary>\n{inside}\n</details>")
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Influence report</title>\n'
        f"<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _arms(content: dict[str, Any]) -> list[str]:
    rows = content["arms"]
    parts = ["<h2>Does dropping help? Arms against each other</h2>", _table(*_arms_table(rows))]
    parts.append(_note(
        "Held-out figures at half and full length: mean over seeds ± standard deviation between seeds. “full - none” "
        "is the difference in bits per byte to the run of arm none with the same seed, mean ± standard deviation of "
        "these differences; below 0 is better. It is “beyond spread” where the mean is larger than that deviation: "
        "with three seeds an indication, no proof. Noise AUC and recall: all kinds of planted noise together."
    ))  # fmt: skip
    compared = [row for row in rows if (row["full.bits_per_byte"] or {}).get("difference")]
    if compared:
        image = figures.differences(compared, "bits_per_byte", "bits per byte")
        parts.append(_image(image, "difference to none by arm"))
        parts.append(_note("Dots: seeds. Diamonds: their mean ± standard deviation."))
    else:
        parts.append("<p>No arm has a complete run of <code>none</code> with its seed and held-out figures to be "
                     "compared with.</p>")  # fmt: skip
    by_arm: dict[str, list[list[float | None]]] = {}
    for run in content["runs"]:
        if values := _by_quarter(run["noise"], evidence.ALL_KINDS):
            by_arm.setdefault(run["arm"], []).append(values)
    means = {arm: [_mean(column) for column in zip(*values, strict=True)] for arm, values in by_arm.items()}
    means = {arm: values for arm, values in means.items() if any(value is not None for value in values)}
    if means:
        parts += ["<h3>Is planted noise found?</h3>", _image(figures.noise(means, _QUARTERS), "noise AUC by arm")]
        parts.append(_note("All kinds together, mean over seeds."))
    return parts


def _run(run: dict[str, Any]) -> list[str]:
    scored = bool(run["score_bands"])
    nothing = "<p>Nothing was scored in this run.</p>"
    parts = ["<h3>Are the scores right?</h3>"]
    if run["fidelity"]:
        parts.append(_image(Path(run["run_dir"], "fidelity.png").read_bytes(), "fidelity over checkpoints"))
        keys = ("checkpoint", "pearson_mean", "pearson_std", "pearson_min", "spearman_mean", "sign_agreement")
        cells = [[_fidelity_name(row), *(_cell(row.get(key)) for key in keys)] for row in run["fidelity"]]
        parts.append(_table(["estimator", *(key.replace("_", " ") for key in keys)], cells))
        parts.append(_note("Against inner products of true gradients. The figure is pipeline.fidelity's own."))
    else:
        parts.append("<p>Not measured: there is no fidelity.json (<code>python -m pipeline.fidelity</code>).</p>")

    parts.append("<h3>Scores over time</h3>")
    parts.append(_image(figures.score_bands(run["score_bands"]), "score bands") if scored else nothing)
    if scored:
        parts.append(_note("Scores compare only with those of the same reference: each is divided by the root mean "
                           "square of the scores beside it. Below 0: opposes the batch."))  # fmt: skip

    parts.append("<h3>Who takes part?</h3>")
    if run["removed"]:
        parts.append(_image(figures.participation(run["removed_over_time"], run["participation"]), "participation"))
    else:
        parts.append("<p>Everything: nothing was removed.</p>")
    if max(row["seen"] for row in run["participation"]) == 1:
        parts.append(_note("Every unit was seen once, so it was kept or removed once."))

    parts.append("<h3>Single samples over the epochs</h3>")
    if run["trajectories"]:
        parts.append(_image(figures.trajectories(run["trajectories"]), "trajectories of single samples"))
        cells = [
            [f"{a['epochs'][0]} → {a['epochs'][1]}", f"{a['units']:,}", _cell(a["spearman"])]
            for a in run["agreement_between_epochs"]
        ]
        parts.append(_table(["epochs", "units in both", "Spearman correlation of their ranks"], cells))
        parts.append(
            _note("Of the units scored most often, four each of the lowest, middle and highest at first sight.")
        )
    else:
        parts.append("<p>Every sample was scored once, so there is nothing to follow.</p>" if scored else nothing)

    parts += ["<h3>Who is removed?</h3>", *_removals(run["removals"])]
    if run["noise"]:
        parts += ["<h3>Is planted noise found?</h3>", *_noise(run["noise"])]
    if scored:
        parts += ["<h3>Sample importance</h3>", *_importance(run["importance"])]
    return parts


def _removals(rows: list[dict[str, Any]]) -> list[str]:
    standing = [row for row in rows if row["stands_out"]]
    parts = [f'<p class="warning">{html.escape(removal.in_words(row))}</p>' for row in standing]
    if any(row["removed"] for row in rows):
        parts.append(_image(figures.removals(rows), "removal rates by subset"))
    cells = [
        [row["subset"], f"{row['units']:,}", f"{row['removed']:,}", _percent(row["rate"]),
         f"{_percent(row['low'])} to {_percent(row['high'])}", _percent(row["rest"]), _p_value(row["p_value"]),
         row["stands_out"] or "-", _cell(row["mean_rank"])]
        for row in rows
    ]  # fmt: skip
    columns = ["subset", "units", "removed", "%", "95 % interval", "others %", "p", "stands out", "mean rank"]
    parts.append(_table(columns, cells))
    parts.append(_note(
        "Wilson intervals. p: Fisher's exact test of the subset against all others, two-sided; it stands out at "
        f"{removal.LEVEL} / subsets judged (Bonferroni), from {removal.MIN_UNITS} units on. Units count as "
        "independent, which those of several epochs are not."
    ))  # fmt: skip
    return parts


def _noise(rows: list[dict[str, Any]]) -> list[str]:
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    parts = []
    lines = {kind: _by_quarter(rows, kind) for kind in kinds}
    if any(value is not None for values in lines.values() for value in values):
        parts.append(_image(figures.noise(lines, _QUARTERS), "noise AUC over the run"))
    cells = [
        [row["kind"], row["part"], f"{row['units']:,}", f"{row['removed']:,}",
         *(_cell(row[key]) for key in ("precision", "recall", "auc"))]
        for row in rows
    ]  # fmt: skip
    parts.append(_table(["kind", "part of the run", "units", "removed", "precision", "recall", "ROC-AUC"], cells))
    parts.append(_note(
        "Each kind against the sequences that were not planted, other kinds left out. ROC-AUC: the chance that a noisy "
        "sequence ranks lower than a real one (0.5: chance), by rank among what was scored together. Precision: share "
        "of noise among what was removed; recall: share of the noise removed; both after the policy's warm-up."
    ))  # fmt: skip
    return parts


def _importance(ends: dict[str, list[dict[str, Any]]]) -> list[str]:
    cells = [
        [end, _cell(row["importance"]), str(row["sample_id"]), row["subset"], str(row["seen"]), str(row["removed"]),
         _few(row["document_ids"])]
        for end, rows in ends.items()
        for row in rows
    ]  # fmt: skip
    columns = ["", "importance", "sample", "subset", "times seen", "removed", "documents"]
    note = "A unit's mean rank over the times it was scored (0 lowest, 1 highest): our definition, not the paper's."
    return [_table(columns, cells), _note(note)]


def _fidelity_name(row: dict[str, Any]) -> str:
    shown = [
        f"{key} {row[key]}"
        for key in ("precondition", "sketch", "reference")
        if row.get(key) not in (None, "none", "batch")
    ]
    return ", ".join([str(row["estimator"]), *shown, *(["own term out"] if row.get("own_term") == "out" else [])])


def _by_quarter(rows: list[dict[str, Any]], kind: str) -> list[float | None]:
    by_part = {row["part"]: row["auc"] for row in rows if row["kind"] == kind}
    return [by_part.get(part) for part in _QUARTERS] if by_part else []


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _image(png: bytes, text: str) -> str:
    return f'<img alt="{html.escape(text)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _table(columns: list[str], cells: list[list[str]]) -> str:
    def line(tag: str, values: list[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(value)}</{tag}>" for value in values) + "</tr>"

    return (
        '<div class="wide"><table>'
        + "\n".join([line("th", columns), *(line("td", row) for row in cells)])
        + "</table></div>"
    )


def _note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>'


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return "-" if value is None else str(value)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _p_value(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def _few(values: Sequence[int]) -> str:
    return ", ".join(str(value) for value in values[:6]) + (", ..." if len(values) > 6 else "")


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
                row["arm"], str(len(row["seeds"])), _pm(half, 3, spread=False), _pm(full, 3),
                _pm(difference, 3, sign=True), _beyond(difference), _pm(removed, 1, scale=100, spread=False),
                _pm(row["noise_auc"], 3, spread=False),
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
