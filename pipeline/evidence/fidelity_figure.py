"""The figure of pipeline.fidelity, in the form of Figure 1 of arXiv 2510.16007."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib import pyplot as plt

from pipeline.evidence.config import FidelityRun
from pipeline.evidence.correlation import Comparison, widths

matplotlib.use("Agg")


_MOST_SCATTERS = 4


def draw(config: FidelityRun, comparisons: Sequence[Comparison], path: Path) -> None:
    """Above, score against reference at up to four checkpoints; below, the mean correlation over checkpoints and the
    spread of the batches' correlations, by estimator.

    The reference is the config's first that was measured, with the run's own setting of `include_self`; the scatters
    show the run's own estimator where it was measured.
    """
    own_term = "target" if config.fidelity.target_sequences else "in" if config.influence.include_self else "out"
    measured = {comparison.reference for comparison in comparisons}
    reference = next(name for name in config.fidelity.references if name in measured)
    shown = [c for c in comparisons if c.reference == reference and c.own_term == own_term]
    names = list(dict.fromkeys(c.name for c in shown))
    checkpoints = list(dict.fromkeys(c.checkpoint for c in shown))

    influence = config.influence
    wanted = (influence.estimator, influence.precondition, widths(influence))
    own = next((c.name for c in shown if (c.estimator, c.precondition, c.sketch) == wanted), names[0])
    # Evenly over the run, its first and last among them.
    picked = np.unique(np.linspace(0, len(checkpoints) - 1, _MOST_SCATTERS).round().astype(int))
    scatters = [c for c in shown if c.name == own and c.checkpoint in {checkpoints[index] for index in picked}]

    figure = plt.figure(figsize=(14, 10), layout="constrained")
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=(2, 3))[:, 0]
    for axes, comparison in zip(above.subplots(1, len(scatters), squeeze=False)[0], scatters, strict=True):
        for scores, values in comparison.pairs:
            axes.scatter(values, scores, s=12)
        axes.set(
            title=f"{comparison.checkpoint}: r = {np.mean(comparison.correlations):.2f}",
            xlabel=reference,
            ylabel="score",
        )
    of = "on a validation set" if own_term == "target" else f"self-influence {own_term}"
    above.suptitle(f"{own} against {reference}, {of}; a colour a batch")

    lines, violins = below.subplots(1, 2)
    spreads: list[list[float]] = []
    lines.set_prop_cycle(
        cycler(linestyle=["-", "--", ":"]) * cycler(color=[plt.get_cmap("tab10")(index) for index in range(10)])
    )
    for name in names:
        parts = [c for c in shown if c.name == name]
        lines.plot([c.checkpoint for c in parts], [np.mean(c.correlations) for c in parts], marker="o", label=name)
        finite = [r for c in parts for r in c.correlations if np.isfinite(r)]
        spreads.append(finite or [0.0])
    lines.set(ylabel="correlation (mean over batches)", ylim=(-1.05, 1.05))
    lines.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    lines.tick_params("x", rotation=30)
    violins.violinplot(spreads, showmeans=True)
    violins.set_xticks(range(1, len(names) + 1), names, rotation=45, ha="right", fontsize=7)
    violins.set(ylabel="correlation of a batch", ylim=(-1.05, 1.05))
    figure.savefig(path, dpi=120)
    plt.close(figure)
