"""The figures of a report: tables of evidence.py and arms.py in, PNG bytes out."""

import io
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from pipeline.evidence.ledger_tables import NOISE

_WIDTH = 8.5  # inches


_USUAL, _STANDS_OUT = "tab:blue", "tab:red"


_GROUPS = {"lowest": "tab:red", "middle": "tab:gray", "highest": "tab:blue"}


def score_bands(bands: list[dict[str, Any]]) -> bytes:
    """Quantile bands of the relative score over the run."""
    figure, [axis] = _new(1, 1, height=3.4)
    steps = [band["step"] for band in bands]
    for low, high, alpha in (("q05", "q95", 0.18), ("q25", "q75", 0.35)):
        lower, upper = ([band[key] for band in bands] for key in (low, high))
        axis.fill_between(
            steps, lower, upper, alpha=alpha, color=_USUAL, linewidth=0, label=f"{int(low[1:])} to {int(high[1:])} %"
        )
    axis.plot(steps, [band["q50"] for band in bands], color=_USUAL, label="median")
    axis.axhline(0, color="black", linewidth=0.6)
    axis.set(xlabel="optimizer step", ylabel="score / root mean square\nof the scores beside it")
    return _finish(figure, axis)


def participation(over_time: list[dict[str, Any]], counts: list[dict[str, Any]]) -> bytes:
    """Removal rates by subset over the run; beside them, where units came again, how often each was removed."""
    again = [row for row in counts if row["seen"] > 1]
    figure, axes = _new(1, 2 if again else 1, height=3.8, gridspec_kw={"width_ratios": [2, 1] if again else [1]})
    for subset in dict.fromkeys(row["subset"] for row in sorted(over_time, key=lambda row: row["subset"])):
        own = sorted((row for row in over_time if row["subset"] == subset), key=lambda row: row["step"])
        style, color = ("--", "black") if subset == NOISE else ("-", None)
        steps, rates = ([row[key] for row in own] for key in ("step", "rate"))
        axes[0].plot(steps, rates, style, color=color, marker=".", linewidth=1.2, label=subset)
    axes[0].set(xlabel="optimizer step", ylabel="removed, of the units seen")
    axes[0].yaxis.set_major_formatter(PercentFormatter(1.0))
    axes[0].set_ylim(bottom=0)
    if again:
        most = max(row["removed"] for row in again)
        totals = [sum(row["units"] for row in again if row["removed"] == times) for times in range(most + 1)]
        bars = axes[1].bar(range(most + 1), totals, color=_USUAL)
        axes[1].bar_label(bars, fmt="{:,.0f}", fontsize=8)
        axes[1].set(xlabel="times removed", ylabel="units seen more than once", yscale="log")
        axes[1].xaxis.set_major_locator(MaxNLocator(integer=True))
        axes[1].margins(y=0.15)
    return _finish(figure, axes[0], columns=4)


def trajectories(lines: list[dict[str, Any]]) -> bytes:
    """Ranks of single units over the epochs; crosses are removals."""
    figure, [axis] = _new(1, 1, height=3.6)
    for line in lines:
        name = f"{line['group']} at first sight"
        label = name if name not in axis.get_legend_handles_labels()[1] else None
        axis.plot(line["epochs"], line["ranks"], color=_GROUPS[line["group"]], marker="o", markersize=3, label=label)
        gone = [(e, r) for e, r, kept in zip(line["epochs"], line["ranks"], line["kept"], strict=True) if not kept]
        axis.plot(*zip(*gone, strict=True) if gone else ([], []), "x", color="black", markersize=8)
    axis.plot([], [], "x", color="black", markersize=8, label="removed")
    axis.set(xlabel="epoch", ylabel="rank of the score (0 lowest, 1 highest)", ylim=(-0.03, 1.03))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _finish(figure, axis)


def removals(rows: list[dict[str, Any]]) -> bytes:
    """Removal rates of the subsets with their 95 % intervals."""
    figure, [axis] = _new(1, 1, height=1.2 + 0.26 * len(rows))
    for place, row in enumerate(reversed(rows)):
        color = _STANDS_OUT if row["stands_out"] else _USUAL
        axis.plot([row["low"], row["high"]], [place, place], color=color, linewidth=2)
        axis.plot(row["rate"], place, "o", color=color, markersize=5)
    total = sum(row["removed"] for row in rows) / sum(row["units"] for row in rows)
    axis.axvline(total, color="black", linewidth=0.8, linestyle=":", label=f"all units: {100 * total:.1f} %")
    names = [f"{row['subset']}  ({row['units']:,})" for row in reversed(rows)]
    axis.set_yticks(range(len(rows)), names)
    axis.set(xlabel="removed, of the subset's units (their number in brackets); 95 % interval; red stands out")
    axis.xaxis.set_major_formatter(PercentFormatter(1.0))
    axis.set_xlim(left=0)
    return _finish(figure, axis)


def noise(lines: dict[str, list[float | None]], parts: Sequence[str]) -> bytes:
    """ROC-AUC over the quarters of the run; `lines`: the values by what they are of."""
    figure, [axis] = _new(1, 1, height=3.2)
    for name, values in lines.items():
        axis.plot(parts, [_nan(value) for value in values], marker="o", markersize=4, label=name)
    axis.axhline(0.5, color="black", linewidth=0.8, linestyle=":", label="chance")
    axis.set(xlabel="quarter of the run", ylabel="ROC-AUC of a low score\nas a sign of noise", ylim=(-0.02, 1.02))
    return _finish(figure, axis)


def differences(rows: list[dict[str, Any]], metric: str, unit: str) -> bytes:
    """Each arm's held-out difference to the baseline: a dot a seed, their mean and spread; at half and full length."""
    figure, axes = _new(1, 2, height=1.4 + 0.4 * len(rows), sharex=True, sharey=True)
    for axis, length in zip(axes, ("half", "full"), strict=True):
        for place, row in enumerate(reversed(rows)):
            found = (row[f"{length}.{metric}"] or {}).get("difference")
            if not found:
                continue
            axis.plot(
                list(found["values"].values()), [place] * len(found["values"]), "o", color="tab:gray", markersize=4
            )
            axis.errorbar(found["mean"], place, xerr=found["spread"], fmt="D", color=_USUAL, capsize=4, markersize=6)
        axis.axvline(0, color="black", linewidth=0.8, linestyle=":")
        axis.set_title(f"{length} length")
        axis.set_ylim(-0.6, len(rows) - 0.4)
    axes[0].set_yticks(range(len(rows)), [textwrap.fill(row["arm"], 24) for row in reversed(rows)])
    figure.supxlabel(f"{unit}, difference to none (left of 0: better)", fontsize="medium")
    return _finish(figure, None)


def _new(rows: int, columns: int, height: float, **options: Any) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns, **options)).ravel()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, list(axes)


def _finish(figure: Figure, legend_of: Axes | None, columns: int = 3) -> bytes:
    """The PNG, with a legend below the figure where it hides nothing."""
    if legend_of is not None:
        figure.legend(*legend_of.get_legend_handles_labels(), loc="outside lower center", ncols=columns, fontsize=8,
                      frameon=False)  # fmt: skip
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=130, metadata={"Software": None})
    return stream.getvalue()


def _nan(value: float | None) -> float:
    return float("nan") if value is None else value
