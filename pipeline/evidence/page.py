"""The page of a report: tables and figures as one HTML file."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.evidence import figures, ledger_tables
from pipeline.record import subset_rates
from pipeline.record.headline import ANSWERS, TEXT, Headline

_QUARTERS = ["1/4", "2/4", "3/4", "4/4"]


# The comparison of arms


def compared_by(rows: list[dict[str, Any]]) -> Headline:
    """The figure by which the arms of `arms.compare` are compared."""
    return ANSWERS if rows and f"full.{ANSWERS.key}" in rows[0] else TEXT


def _arms_table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and cells of the comparison on the page."""
    key, short, _, other, _ = compared_by(rows)
    columns = ["arm", "seeds", f"{other} half", f"{other} full", f"{short} half", f"{short} full", "full - none"]
    columns += ["beyond spread", "removed", "removed %", "noise AUC", "noise recall"]
    cells = []
    for row in rows:
        half, full = row[f"half.{key}"], row[f"full.{key}"]
        difference = (full or {}).get("difference")
        cells.append([
            row["arm"], str(len(row["seeds"])),
            pm(row[f"half.{other}"], 2), pm(row[f"full.{other}"], 2), pm(half, 4), pm(full, 4),
            pm(difference, 4, sign=True), beyond(difference),
            pm(row["removed"], 0, spread=False), pm(row["removed_fraction"], 1, scale=100, spread=False),
            pm(row["noise_auc"], 3), pm(row["noise_recall"], 3),
        ])  # fmt: skip
    return columns, cells


def pm(value: dict[str, Any] | None, digits: int, sign: bool = False, scale: float = 1, spread: bool = True) -> str:
    """Mean ± spread of a figure over seeds, as `arms.compare` has them."""
    if value is None:
        return "-"
    text = f"{scale * value['mean']:{'+' if sign else ''},.{digits}f}"
    return text if value["spread"] is None or not spread else f"{text} ± {scale * value['spread']:,.{digits}f}"


def beyond(difference: dict[str, Any] | None) -> str:
    """Whether a difference is larger than its spread, in a word."""
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
    rows, shown = content["arms"], compared_by(content["arms"])
    parts = ["<h2>Does dropping help? Arms against each other</h2>", _table(*_arms_table(rows))]
    parts.append(_note(
        "Held-out figures at half and full length: mean over seeds ± standard deviation between seeds. “full - none” "
        f"is the difference in {shown.words} to the run of arm none with the same seed, mean ± standard deviation "
        f"of these differences; {shown.better} 0 is better. It is “beyond spread” where "
        "the mean is larger than that deviation: with three seeds an indication, no proof. Noise AUC and recall: all "
        "kinds of planted noise together."
    ))  # fmt: skip
    compared = [row for row in rows if (row[f"full.{shown.key}"] or {}).get("difference")]
    if compared:
        image = figures.differences(compared, shown.key, shown.words)
        parts.append(_image(image, "difference to none by arm"))
        parts.append(_note("Dots: seeds. Diamonds: their mean ± standard deviation."))
    else:
        parts.append("<p>No arm has a complete run of <code>none</code> with its seed and held-out figures to be "
                     "compared with.</p>")  # fmt: skip
    by_arm: dict[str, list[list[float | None]]] = {}
    for run in content["runs"]:
        if values := _by_quarter(run["noise"], ledger_tables.ALL_KINDS):
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
        if (figure := Path(run["run_dir"], "fidelity.png")).is_file():
            parts.append(_image(figure.read_bytes(), "fidelity over checkpoints"))
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
    parts = [f'<p class="warning">{html.escape(subset_rates.in_words(row))}</p>' for row in standing]
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
        f"{subset_rates.LEVEL} / subsets judged (Bonferroni), from {subset_rates.MIN_UNITS} units on. Units count as "
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
    return ", ".join([str(row["estimator"]), *shown, *(["self-influence out"] if row.get("own_term") == "out" else [])])


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
