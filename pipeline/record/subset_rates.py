"""Who gets removed: rates by subset with their uncertainty, and the subsets that stand out. Pure."""

import math
from collections.abc import Mapping
from typing import Any

import torch

Z95 = 1.959964


LEVEL = 0.01
"""A subset stands out where chance alone would do as much, in any of the subsets, in at most this share of runs."""


MIN_UNITS = 30
"""Subsets of fewer units are not judged."""


def wilson(removed: int, units: int) -> tuple[float, float]:
    """95 % interval of a rate of `removed` in `units` > 0, after Wilson (1927): right also near 0 and 1."""
    rate, z2 = removed / units, Z95**2
    center = (rate + z2 / (2 * units)) / (1 + z2 / units)
    half = Z95 / (1 + z2 / units) * math.sqrt(rate * (1 - rate) / units + z2 / (4 * units**2))
    return max(center - half, 0.0), min(center + half, 1.0)


def by_subset(counts: Mapping[str, tuple[int, int]], independent: bool = True) -> list[dict[str, Any]]:
    """A row for each subset of `counts` (units, removed), the highest rate first: subset, units, removed, rate, low and
    high (its 95 % interval), rest (the rate of all others, None where there are none), p_value and stands_out.

    p_value: two-sided, of as many removals in the subset, had those of all subsets fallen on units at random (Fisher's
    exact test against the rest); None for fewer than MIN_UNITS. stands_out: `more` or `less` where it is at most
    LEVEL / subsets judged (Bonferroni), else empty. Units count as independent: samples that come back in every epoch
    make the test too sure, a removal rate fixed in each micro-batch makes it too careful. Where they are not at all
    `independent`, as the tokens of a text, none is judged, and the interval is too narrow.
    """
    all_units = sum(units for units, _ in counts.values())
    all_removed = sum(removed for _, removed in counts.values())
    judged = [name for name, (units, _) in counts.items() if independent and MIN_UNITS <= units < all_units]
    rows = []
    for name, (units, removed) in counts.items():
        low, high = wilson(removed, units)
        rate, others = removed / units, all_units - units
        rest = (all_removed - removed) / others if others else None
        p_value = _fisher(removed, units, all_removed, all_units) if name in judged else None
        clear = p_value is not None and p_value <= LEVEL / len(judged)
        rows.append(
            {"subset": name, "units": units, "removed": removed, "rate": rate, "low": low, "high": high, "rest": rest,
             "p_value": p_value, "stands_out": ("more" if rate > (rest or 0.0) else "less") if clear else ""}
        )  # fmt: skip
    return sorted(rows, key=lambda row: (-row["rate"], row["subset"]))


def standing_out(counts: Mapping[str, tuple[int, int]], independent: bool = True) -> list[dict[str, Any]]:
    """The rows of `by_subset` that stand out."""
    return [row for row in by_subset(counts, independent) if row["stands_out"]]


def in_words(row: dict[str, Any]) -> str:
    """What to tell a person of a row that stands out."""
    return (
        f"{row['subset']}: {100 * row['rate']:.1f} % of {row['units']} units removed "
        f"(95 % interval {100 * row['low']:.1f} to {100 * row['high']:.1f}), {row['stands_out']} than the "
        f"{100 * row['rest']:.1f} % of all others"
    )


def _fisher(removed: int, units: int, all_removed: int, all_units: int) -> float:
    """Twice the smaller tail of the hypergeometric distribution, at most 1."""
    lowest, highest = max(0, all_removed + units - all_units), min(units, all_removed)
    found = torch.arange(lowest, highest + 1, dtype=torch.float64)
    logs = _log_choose(units, found) + _log_choose(all_units - units, all_removed - found)
    chances = (logs - logs.logsumexp(0)).exp()
    index = removed - lowest
    return min(1.0, 2 * min(float(chances[: index + 1].sum()), float(chances[index:].sum())))


def _log_choose(total: int, taken: torch.Tensor) -> torch.Tensor:
    return math.lgamma(total + 1) - torch.lgamma(taken + 1) - torch.lgamma(total - taken + 1)
