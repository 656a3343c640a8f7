"""RUN_DIR/tensorboard: what a person looks at while a run goes on."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from pipeline.record import ledger, subset_rates
from pipeline.record.headline import headline

SHOWN_SUBSETS = 32
"""Subsets with curves of their own; the rest of hundreds share one, or the files grow without bound."""


ALL, OTHER = "all", "other"
"""Curves of several subsets. A subset of such a name is among the others, or two would share a curve."""


_TEXTS = 4


_TEXT_CHARACTERS = 1500


def _layout(held_out: bool, audited: bool, mixed: bool, moving: bool, answers: bool) -> dict[str, dict[str, list[Any]]]:
    """One tab, "Custom scalars", that shows what was removed at a glance; without charts that would stay empty."""
    training = {
        "loss of what was kept": ["Multiline", ["train/loss"]],
        "held-out bits per byte": ["Multiline", ["validation/bits_per_byte/.*"]] if held_out and not answers else None,
        "held-out accuracy": ["Multiline", ["validation/accuracy/.*"]] if held_out and answers else None,
        "scores against what losses did": ["Multiline", ["influence/audit_pearson"]] if audited else None,
        "share of the trained tokens by source": ["Multiline", ["trained_share_by_source/.*"]] if mixed else None,
        "weights of the sources": ["Multiline", ["mixture/.*"]] if moving else None,
    }
    return {
        "Removed": {
            "units in total": ["Multiline", ["influence/removed_total"]],
            "fraction of each step": ["Multiline", ["influence/removed_fraction$"]],
            "units by subset": ["Multiline", ["influence/removed_by_subset/.*"]],
            "fraction by subset": ["Multiline", ["removed_fraction_by_subset/.*"]],
        },
        "Training": {title: chart for title, chart in training.items() if chart},
    }


_FULL_WIDTH = str.maketrans({sign: chr(ord(sign) + 0xFEE0) for sign in r"()[]{}*+?^$|\\"})
"""Its custom scalars take a tag for a regular expression, and draw nothing in a chart in which one has these: a subset
`Wikipedia (en)` gets them as their full-width forms, which mean nothing there."""


class TensorBoard:
    """Writes RUN_DIR/tensorboard; one process, rank 0.

    Counts by subset go on from those in `rows`, the ledger so far; events after `step` are purged. `subsets`, the
    largest first: the first `SHOWN_SUBSETS` of them, then of the ledger's, have curves; the rest is `other`.
    `held_out`, `audited`, `mixed` (of sources), `moving` (their weights), `answers` (of a classifier): whether there
    will be such figures. `unit`: `influence.unit`, which is what is counted. `monitor` is shown all scalars, by their
    own tags.
    """

    def __init__(
        self,
        run_dir: Path,
        step: int,
        rows: pa.Table,
        subsets: Sequence[str] = (),
        held_out: bool = True,
        audited: bool = False,
        unit: str = "sequence",
        mixed: bool = False,
        moving: bool = False,
        answers: bool = False,
        monitor: Callable[[Mapping[str, float]], None] | None = None,
    ) -> None:
        self._unit, self._monitor = unit, monitor
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1 if step else None)
        self._units: Counter[str] = Counter()
        self._removed: Counter[str] = Counter()
        self._shown = dict.fromkeys([name for name in subsets if name != OTHER][:SHOWN_SUBSETS])
        self._count(rows)
        self._step = step
        self._seen_standing_out = {(row["subset"], row["stands_out"]) for row in self._standing_out()}
        self._writer.add_custom_scalars(_layout(held_out, audited, mixed, moving, answers))

    @property
    def removed(self) -> int:
        """Units removed since the run began."""
        return self._removed.total()

    def hyperparameters(self, config_yaml: str) -> None:
        self._writer.add_text("hyperparameters", _code(config_yaml))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """All of them in one event: `add_scalar` makes one for each, which takes seven times as long."""
        made = [Summary.Value(tag=tag.translate(_FULL_WIDTH), simple_value=value) for tag, value in values.items()]
        writer = self._writer.file_writer
        assert writer
        if made:
            writer.add_summary(Summary(value=made), step)
        if self._monitor:
            self._monitor(values)

    def influence(self, rows: pa.Table, step: int, histogram: bool) -> None:
        """Kept and removed units of one optimizer step, and in total and by subset since the run began.

        With `histogram` also that of the scores, and a warning where a subset begins to stand out."""
        of_step, gone = (sum(column) for column in zip(*self._count(rows).values(), strict=True))
        self._step = step
        total, units = self._removed.total(), self._units.total()
        self.scalars(
            {
                "influence/removed_total": total,
                "influence/removed_fraction": gone / max(of_step, 1),
                "influence/removed_fraction_total": total / max(units, 1),
                "kept/total": units - total,
            },
            step,
        )
        for subset, (units, removed) in self.by_subset().items():
            self.scalars(
                {
                    f"influence/removed_by_subset/{subset}": removed,
                    f"kept/by_subset/{subset}": units - removed,
                    f"removed_fraction_by_subset/{subset}": removed / max(units, 1),
                },
                step,
            )
        scores = rows["score"].drop_null().to_numpy()
        if histogram and len(scores):
            self._writer.add_histogram("influence/score", scores, step)
        if histogram:
            new = [r for r in self._standing_out() if (r["subset"], r["stands_out"]) not in self._seen_standing_out]
            self._seen_standing_out |= {(row["subset"], row["stands_out"]) for row in new}
            self._warn(new, step)

    def evaluation(self, figures: dict[str, Any], step: int) -> None:
        """Held-out loss and bits per byte: of all, of the subsets with curves, and of the others together. Subsets that
        training has not, the largest first, get the curves that are left."""
        rows = figures["subsets"]
        ranked = sorted(rows, key=lambda name: (name not in self._shown, -rows[name]["tokens"]))
        own = [name for name in ranked if name not in (ALL, OTHER)][:SHOWN_SUBSETS]
        shown = {ALL: figures["all"]} | {name: rows[name] for name in own}
        if rest := [row for name, row in rows.items() if name not in own]:
            shown[OTHER] = _together(rest)
        for name, row in shown.items():
            self.scalars({f"validation/{tag}/{name}": row[tag] for tag in ("loss", headline(row).key)}, step)

    def by_subset(self) -> dict[str, tuple[int, int]]:
        """(units, removed) since the run began, of the subsets that are shown; all others are `other` together."""
        counts: dict[str, tuple[int, int]] = {}
        for subset, units in self._units.items():
            name = self.shown(subset)
            before = counts.get(name, (0, 0))
            counts[name] = (before[0] + units, before[1] + self._removed[subset])
        return counts

    def shown(self, subset: str) -> str:
        """The name of the curve that a subset is part of."""
        return subset if subset in self._shown else OTHER

    def removed_texts(self, rows: pa.Table, text_of: Callable[[dict[str, Any]], str], step: int) -> None:
        """The worst few of the removed units among `rows`, decoded by `text_of(row)`, one after another."""
        removed = [row for row in rows.to_pylist() if not row["kept"]]
        worst = sorted(removed, key=lambda row: -math.inf if row["score"] is None else row["score"])[:_TEXTS]
        if worst:
            texts = "\n\n---\n\n".join(_described(row, text_of(row)) for row in worst)
            self._writer.add_text("influence/removed_text", texts, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        """Close the files; a last text says which subsets stand out at the end."""
        self._warn(self._standing_out(), self._step)
        self._writer.close()

    def _standing_out(self) -> list[dict[str, Any]]:
        counts = {name: (units, self._removed[name]) for name, units in self._units.items() if units}
        return subset_rates.standing_out(counts, independent=self._unit != "token")

    def _warn(self, rows: list[dict[str, Any]], step: int) -> None:
        if rows:
            text = "\n".join(f"- {subset_rates.in_words(row)}" for row in rows)
            self._writer.add_text("influence/standing_out", text, step)

    def _count(self, rows: pa.Table) -> dict[str, tuple[int, int]]:
        """Add them to the sums; returns what was added, (units, removed) by subset."""
        counts = ledger.counts_by_subset(rows, self._unit)
        for subset in sorted(counts, key=lambda subset: -counts[subset][0]):
            if len(self._shown) < SHOWN_SUBSETS and subset != OTHER:
                self._shown.setdefault(subset)
        for subset, (units, removed) in counts.items():
            self._units[subset] += units
            self._removed[subset] += removed
        return counts


def _together(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The figures of several subsets as one: nats per token predicted, and bits per byte of these;
    of answers nats per text, and accuracy."""
    nats, tokens = sum(row["loss"] * row["tokens"] for row in rows), sum(row["tokens"] for row in rows)
    if all("accuracy" in row for row in rows):
        return {"loss": nats / tokens, "accuracy": sum(row["accuracy"] * row["tokens"] for row in rows) / tokens}
    ratios = [row["bits_per_byte"] / row["loss"] if row["loss"] else math.inf for row in rows]
    size = sum(row["tokens"] / ratio for row, ratio in zip(rows, ratios, strict=True))
    return {"loss": nats / tokens, "bits_per_byte": nats / size if size else 0.0}


def _described(row: dict[str, Any], text: str) -> str:
    head = (
        f"**score {_number(row['score'])}** · loss {_number(row['loss'])} · {row['reason']} · subset `{row['subset']}` "
        f"· sample {row['sample_id']} · documents {', '.join(map(str, row['document_ids']))}"
    )
    return f"{head}\n\n{_code(text[:_TEXT_CHARACTERS])}"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def _code(text: str) -> str:
    """Indented, so that Markdown shows it as it is, whatever is in it."""
    return "\n".join("    " + line for line in text.replace("\x00", "\ufffd").splitlines())
