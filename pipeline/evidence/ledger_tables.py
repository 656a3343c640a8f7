"""What the ledger of a run says about its scores: tables from rows. Pure.

Scores mean something only among units that were scored against the same reference, so nothing here compares raw scores:
they are replaced by their rank among these units, or divided by their root mean square.
"""

from typing import Any

import numpy as np
import pandas as pd

from pipeline.data.planted import PREFIX
from pipeline.record.subset_rates import wilson

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


ALL_KINDS = "all kinds"


OTHERS = "all others"


NOISE = "planted noise"


def comparable(rows: pd.DataFrame, scope: str) -> pd.DataFrame:
    """The rows of a ledger, with the `units` that each is and those `removed` (`ledger.scored_and_removed`), with three
    more columns.

    rank: (place - 1/2) / n of the score among the n units scored together (a global micro-batch; with `scope` step a
    whole step), ties sharing their mean place: 0 lowest, 1 highest, 1/2 on average. relative: the score over their root
    mean square. unit: a number for what was scored, the same whenever it comes again. NaN where nothing was scored.
    """
    keys = ["step"] if scope == "step" else ["step", "micro_step"]
    together = rows.groupby(keys)["score"]
    mean_square = (rows["score"] ** 2).groupby([rows[key] for key in keys]).transform("mean")
    documents = rows["document_ids"].map(tuple)
    return rows.assign(
        rank=(together.rank() - 0.5) / together.transform("count"),
        relative=rows["score"] / np.sqrt(mean_square).replace(0.0, np.nan),
        unit=rows.assign(documents=documents).groupby(["sample_id", "documents"], sort=False).ngroup(),
    )


def score_bands(rows: pd.DataFrame, parts: int = 40) -> list[dict[str, Any]]:
    """QUANTILES of the relative score in each of at most `parts` stretches of the run (Figure 2A of arXiv
    2510.16007): step (its middle), units, q05 to q95. Empty where nothing was scored."""
    scored = rows.dropna(subset=["relative"])
    bands = []
    for steps, part in scored.groupby(_stretches(scored["step"], parts)):
        quantiles = part["relative"].quantile(QUANTILES)
        named = {f"q{round(100 * q):02d}": float(value) for q, value in quantiles.items()}
        bands.append({"step": float(np.mean(steps)), "units": len(part), **named})
    return bands


def removed_over_time(rows: pd.DataFrame, parts: int = 12, subsets: int = 6) -> list[dict[str, Any]]:
    """Removal rates of the `subsets` with most units, of all others together (OTHERS) and of planted noise (NOISE), in
    each of at most `parts` stretches of the run: subset, step (its middle), first and last step, units, removed, rate,
    low and high (its 95 % interval, None without units)."""
    names = rows["subset"].mask(rows["subset"].str.startswith(PREFIX), NOISE)
    largest = names[names != NOISE].value_counts().index[:subsets]
    names = names.where(names.isin([*largest, NOISE]), OTHERS)
    found = []
    for (subset, steps), part in rows.groupby([names, _stretches(rows["step"], parts)]):
        units, removed = int(part["units"].sum()), int(part["removed"].sum())
        low, high = wilson(removed, units) if units else (None, None)
        size = {"units": units, "removed": removed, "rate": removed / max(units, 1), "low": low, "high": high}
        found.append({"subset": subset, "step": float(np.mean(steps)), "first": steps[0], "last": steps[1], **size})
    return found


def participation(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """How many units were removed how often of the times they were seen (Figure 2B): seen, removed, units."""
    times = rows.groupby("unit")["kept"].agg(seen="size", kept="sum")
    counts = (times.assign(removed=times["seen"] - times["kept"])).groupby(["seen", "removed"]).size()
    return [{"seen": int(seen), "removed": int(out), "units": int(n)} for (seen, out), n in counts.items()]


def trajectories(rows: pd.DataFrame, each: int = 4) -> list[dict[str, Any]]:
    """The rank of single units over the epochs (Figure 2C): `each` of the lowest, middle and highest at first sight,
    among those scored in most epochs. Empty where every unit was scored once.

    Rows: group (which of the three), sample_id, document_ids, subset, epochs, ranks, kept.
    """
    scored = rows.dropna(subset=["rank"])
    seen = scored.groupby("unit").size()
    if seen.empty or seen.max() < 2:
        return []
    again = scored[scored["unit"].isin(seen.index[seen == seen.max()])].sort_values(["epoch", "position"])
    order = again.groupby("unit")["rank"].first().sort_values(kind="stable").index
    middle = max((len(order) - each) // 2, 0)
    groups = {"lowest": order[:each], "middle": order[middle : middle + each], "highest": order[-each:]}
    found = []
    for group, units in groups.items():
        for unit in units:
            own = again[again["unit"] == unit]
            found.append({"group": group, **_named(own.iloc[0]), "epochs": own["epoch"].tolist(),
                          "ranks": own["rank"].tolist(), "kept": own["kept"].tolist()})  # fmt: skip
    return found


def agreement_between_epochs(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """Whether a unit keeps its rank: the Spearman correlation of the ranks in two epochs that follow each other, over
    the units scored in both: epochs, units, spearman."""
    ranks = rows.dropna(subset=["rank"]).pivot_table(index="unit", columns="epoch", values="rank")
    found = []
    for before, after in zip(ranks.columns[:-1], ranks.columns[1:], strict=True):
        both = ranks[[before, after]].dropna().rank()
        if len(both) > 2:
            spearman = _number(both[before].corr(both[after]))
            found.append({"epochs": [int(before), int(after)], "units": len(both), "spearman": spearman})
    return found


def importance(rows: pd.DataFrame) -> pd.DataFrame:
    """Sample importance: a unit's mean rank over the times it was scored, 0 to 1, the lowest first, with sample_id,
    document_ids, subset, seen, removed. (Our definition, for want of the paper's.)"""
    scored = rows.dropna(subset=["rank"])
    first = scored.drop_duplicates("unit").set_index("unit")[["sample_id", "document_ids", "subset"]]
    by_unit = scored.groupby("unit")
    seen, kept = by_unit.size(), by_unit["kept"].sum()
    table = first.assign(seen=seen, removed=seen - kept, importance=by_unit["rank"].mean())
    return table.sort_values("importance", kind="stable").reset_index(drop=True)


def noise_found(rows: pd.DataFrame, warmup_steps: int) -> list[dict[str, Any]]:
    """How well planted noise is found, by kind, in the whole run and in each quarter of its steps; empty where none
    was planted.

    Rows: part (`all`, `1/4` ...), kind (or ALL_KINDS), units, removed, auc, precision, recall; None where there is no
    value. Each kind stands against the rows that were not planted, other kinds left out. auc: the chance that a noisy
    unit has a lower rank than a real one (ties half). precision: share of noise among what was removed; recall: share
    of the noise that was removed; both after the warm-up of the policy, in which nothing is.
    """
    noisy = rows["subset"].str.startswith(PREFIX)
    if not noisy.any():
        return []
    kinds = [ALL_KINDS, *sorted(rows["subset"][noisy].unique())]
    quarters = np.array_split(np.sort(rows["step"].unique()), 4)
    parts = {"all": rows} | {f"{q}/4": rows[rows["step"].isin(steps)] for q, steps in enumerate(quarters, 1)}
    found = []
    for name, part in parts.items():
        is_noisy = part["subset"].str.startswith(PREFIX)
        real = part[~is_noisy]
        for kind in kinds:
            noise = part[is_noisy if kind == ALL_KINDS else part["subset"] == kind]
            gone = [int(some["removed"][some["step"] > warmup_steps].sum()) for some in (noise, real)]
            acted_on = int(noise["units"][noise["step"] > warmup_steps].sum())
            found.append({
                "part": name, "kind": kind.removeprefix(PREFIX),
                "units": int(noise["units"].sum()), "removed": int(noise["removed"].sum()),
                "auc": auc(noise["rank"].dropna().to_numpy(), real["rank"].dropna().to_numpy()),
                "precision": gone[0] / sum(gone) if sum(gone) else None,
                "recall": gone[0] / acted_on if acted_on else None,
            })  # fmt: skip
    return found


def auc(low: np.ndarray, high: np.ndarray) -> float | None:
    """The chance that a random one of `low` lies below a random one of `high`, ties half (the area under the ROC
    curve, Mann and Whitney's U over all pairs); None where either is empty."""
    if not len(low) or not len(high):
        return None
    places = pd.Series(np.concatenate([low, high])).rank().to_numpy()
    above = places[len(low) :].sum() - len(high) * (len(high) + 1) / 2
    return float(above / (len(low) * len(high)))


def _stretches(steps: pd.Series, parts: int) -> pd.Series:
    """For every row (first, last) of its stretch of steps; stretches are as long as each other, within a step."""
    names: dict[int, tuple[int, int]] = {}
    for stretch in np.array_split(np.sort(steps.unique()), max(min(parts, steps.nunique()), 1)):
        names |= {step: (int(stretch[0]), int(stretch[-1])) for step in stretch}
    return steps.map(names)


def _named(row: pd.Series) -> dict[str, Any]:
    return {"sample_id": int(row["sample_id"]), "document_ids": [int(d) for d in row["document_ids"]],
            "subset": row["subset"]}  # fmt: skip


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
