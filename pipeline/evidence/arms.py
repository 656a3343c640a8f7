"""Runs against each other: grouped into arms that differ in nothing but the seed, compared seed by seed. Pure."""

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.config.cli import to_dict
from pipeline.config.differences import flat
from pipeline.config.schema_influence import InfluenceConfig, PolicyConfig
from pipeline.record.headline import headline

BASELINE = "none"


_CONTROLS = ("influence.estimator", "influence.unit", "influence.scope", "influence.oracle_subsets")


_OWN = ("run_dir", "seed", "resume", "dry_run", "influence", "policy", "checkpoint", "observe", "fidelity", "benchmark")


_WEIGHT = re.compile(r"data\.mixture\..*\.weight")


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What makes an arm: the weights of a mixture, and all keys of `influence` and `policy` that the estimator uses,
    flat. `none` uses no other; `loss`, `random` and `oracle` those of _CONTROLS.

    `config` is a run's config.yaml, parsed; keys that it lacks were added since and have their defaults.
    """
    defaults = {"influence": to_dict(InfluenceConfig()), "policy": to_dict(PolicyConfig())}
    found: dict[str, Any] = {"data.mixture": _weights(config.get("data", {}).get("mixture") or {})}
    for section, values in defaults.items():
        found |= flat(section, values | config.get(section, {}))
    if found["influence.estimator"] == BASELINE:
        return {key: found[key] for key in ("influence.estimator", "data.mixture")}
    if found["influence.estimator"] in ("loss", "random", "oracle"):
        shared = (*_CONTROLS, "data.mixture")
        return {key: value for key, value in found.items() if key in shared or key.startswith("policy.")}
    return found


def _weights(mixture: Mapping[str, Mapping[str, Any]]) -> str:
    """In a few words, the largest first."""
    weights = {name: source["weight"] for name, source in mixture.items() if source.get("weight") is not None}
    if not weights:
        return "by size"
    if len(set(weights.values())) == 1:
        return "alike"
    total = sum(weights.values())
    shares = sorted(((weight / total, name) for name, weight in weights.items()), reverse=True)
    return " ".join(f"{name} {share:.4g}" for share, name in shares)


def labels(arms: Sequence[dict[str, Any]]) -> list[str]:
    """A short name for each of the `settings`: the estimator, and what differs among them and is no default."""
    defaults = settings({})
    keys = dict.fromkeys(key for arm in arms for key in arm if key != "influence.estimator")
    differing = [key for key in keys if _differs(key, arms)]
    names = []
    for arm in arms:
        shown = [
            f"{key.split('.', 1)[1]} {arm[key]}" for key in differing if key in arm and arm[key] != defaults.get(key)
        ]
        names.append(", ".join([arm["influence.estimator"], *shown]))
    return names


def _differs(key: str, arms: Sequence[dict[str, Any]]) -> bool:
    """Whether the arms that have it have different values, or some arms of an estimator have it and some do not."""
    values = {repr(arm[key]) for arm in arms if key in arm}
    presence = {(arm["influence.estimator"], key in arm) for arm in arms}
    return len(values) > 1 or len(presence) > len({estimator for estimator, _ in presence})


def other_differences(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Keys in which the runs differ that make neither an arm nor a seed, with their values: such runs do not
    compare."""
    flats = [flat("", {key: value for key, value in config.items() if key not in _OWN}) for config in configs]
    flats = [{key: value for key, value in one.items() if not _WEIGHT.fullmatch(key)} for one in flats]
    found = {}
    for key in sorted({key for one in flats for key in one}):
        values = list(dict.fromkeys(repr(one.get(key)) for one in flats))
        if len(values) > 1:
            found[key] = values
    return found


def compare(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each arm, the baseline first: arm, seeds, and for everything measured its mean and spread.

    `runs`: arm, seed, half and full (held-out figures at half and full length, or None), removed, removed_fraction,
    noise_auc, noise_recall (None where unknown). A row has, beside these, for the headline figure and the one beside it
    at half and full length, as `full.bits_per_byte`: mean, spread, values (by seed), difference. spread is the standard
    deviation between seeds (n - 1; None for one). difference is to the baseline's run of the same seed: mean, spread,
    seeds, values, and beyond_spread, whether the mean's size exceeds the spread (None below two seeds): with three
    seeds that is a t of 1.7, an indication and no proof. Raises ValueError where two runs have arm and seed in common.
    """
    by_arm: dict[str, dict[int, dict[str, Any]]] = {}
    for run in sorted(runs, key=lambda run: (run["arm"] != BASELINE, run["arm"], run["seed"])):
        own = by_arm.setdefault(run["arm"], {})
        if run["seed"] in own:
            both = f"{own[run['seed']]['run_dir']} and {run['run_dir']}"
            raise ValueError(f"{both} are the same arm ({run['arm']}) with the same seed: give one of them")
        own[run["seed"]] = run
    shown = headline(next((run["full"] for run in runs if run["full"]), None))
    rows = []
    for arm, own in by_arm.items():
        row: dict[str, Any] = {"arm": arm, "seeds": list(own)}
        for name in ("removed", "removed_fraction", "noise_auc", "noise_recall"):
            row[name] = _summary({seed: run[name] for seed, run in own.items() if run[name] is not None})
        for length in ("half", "full"):
            for metric in (shown.beside, shown.key):
                mine, base = (
                    {seed: run[length][metric] for seed, run in group.items() if run[length]}
                    for group in (own, by_arm.get(BASELINE, {}))
                )
                paired = {seed: value - base[seed] for seed, value in mine.items() if seed in base}
                figures = _summary(mine)
                if figures and arm != BASELINE and (difference := _summary(paired)):
                    spread = difference["spread"]
                    beyond = None if spread is None else abs(difference["mean"]) > spread
                    figures["difference"] = {**difference, "beyond_spread": beyond}
                row[f"{length}.{metric}"] = figures
        rows.append(row)
    return rows


def _summary(values: dict[int, float]) -> dict[str, Any] | None:
    if not values:
        return None
    numbers = list(values.values())
    spread = statistics.stdev(numbers) if len(numbers) > 1 else None
    return {"mean": statistics.fmean(numbers), "spread": spread, "values": values}
