"""Scores of an estimator against what samples really did: correlations, and how they are named. Pure."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.config.schema_influence import InfluenceConfig, SketchConfig


@dataclass
class Comparison:
    """One estimator against one reference at one checkpoint: (scores, values) of each batch, (B,) each."""

    checkpoint: str
    estimator: str
    precondition: str
    sketch: str
    reference: str
    own_term: str
    pairs: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Of the estimator, for people."""
        form = self.estimator if self.precondition == "none" else f"{self.estimator}/{self.precondition}"
        return form if self.sketch == "none" else f"{form} {self.sketch}"

    @property
    def correlations(self) -> list[float]:
        """Pearson's, of each batch; NaN where one side is constant."""
        return [pearson(*pair) for pair in self.pairs]

    def row(self) -> dict[str, Any]:
        """`sign_agreement`: fraction of samples whose score and value have one sign."""
        scores, values = (np.concatenate(side) for side in zip(*self.pairs, strict=True))
        of_batches = np.array(self.correlations)
        numbers = {
            "pearson_mean": of_batches.mean(),
            "pearson_std": of_batches.std(),
            "pearson_min": of_batches.min(),
            "spearman_mean": np.mean([spearman(*pair) for pair in self.pairs]),
            "sign_agreement": np.mean(np.sign(scores) == np.sign(values)),
        }
        keys = ("checkpoint", "estimator", "precondition", "sketch", "reference", "own_term")
        return {
            **{key: getattr(self, key) for key in keys},
            **{key: float(number) if np.isfinite(number) else None for key, number in numbers.items()},
            "batches": len(self.pairs),
        }


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Linear correlation, -1 to 1; NaN where one side is constant."""
    x, y = x - x.mean(), y - y.mean()
    norms = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / norms) if norms > 0 else math.nan


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Rank correlation, equal values sharing the mean of their ranks."""
    ranks = [(np.searchsorted(np.sort(v), v) + np.searchsorted(np.sort(v), v, "right")) / 2 for v in (x, y)]
    return pearson(*ranks)


def widths(influence: InfluenceConfig) -> str:
    """The sketch as text: `KxG`, or `none`."""
    sketch = influence.sketch
    if not isinstance(sketch, SketchConfig):
        return "none"
    return f"{sketch.hidden_width if influence.estimator == 'ghost' else sketch.input_width}x{sketch.logit_width}"
