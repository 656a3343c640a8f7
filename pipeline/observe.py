"""What a person looks at: progress bar, TensorBoard, the table at the end of a run; and the ledger that feeds them."""

import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import AutoTokenizer

from pipeline import ledger, removal
from pipeline.config import Config, to_yaml
from pipeline.data import Samples, UnitTable
from pipeline.policy import Decision

_TEXTS = 4
_TEXT_CHARACTERS = 1500
# One tab, "Custom scalars", that shows what was removed at a glance.
_LAYOUT = {
    "Removed": {
        "units in total": ["Multiline", ["influence/removed_total"]],
        "fraction of each step": ["Multiline", ["influence/removed_fraction$"]],
        "units by subset": ["Multiline", ["influence/removed_by_subset/.*"]],
        "fraction by subset": ["Multiline", ["removed_fraction_by_subset/.*"]],
    },
    "Training": {
        "loss of what was kept": ["Multiline", ["train/loss"]],
        "held-out bits per byte": ["Multiline", ["validation/bits_per_byte/.*"]],
        "scores against what losses did": ["Multiline", ["influence/audit_pearson"]],
    },
}


class Recorder:
    """Takes down what happens in a run: ledger, TensorBoard, progress bar. Exists on rank 0 only.

    `step` is the optimizer step that the run goes on from, 0 for a new one.
    """

    def __init__(self, config: Config, samples: Samples, step: int) -> None:
        run_dir = Path(config.run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(to_yaml(config))
        self._observe, self._samples = config.observe, samples
        self._tokenizer = AutoTokenizer.from_pretrained(Path(config.data.prepared_dir, "tokenizer"))
        self._ledger = ledger.Ledger(run_dir, step)
        self._board = TensorBoard(run_dir, step, ledger.read(run_dir))
        if not step:
            self._board.hyperparameters(to_yaml(config))
        # A log file gets a line now and then instead of a bar that moves.
        interval = 1.0 if sys.stderr.isatty() else 15.0
        self._bar = tqdm(
            total=config.max_steps, initial=step, unit="step", desc="train", dynamic_ncols=True, mininterval=interval
        )
        self._rows: list[pa.Table] = []
        self._losses: list[float] = []
        self._seconds: Counter[str] = Counter()

    def micro_batch(self, where: dict[str, int], size: int, table: UnitTable, decision: Decision) -> None:
        """One ledger row for every unit of the global micro-batch of `size` sequences at `where`: its step,
        micro_step and first position."""
        units = self._samples.units(where["position"], size)
        tokens, losses, weights = table.tokens.tolist(), table.losses.tolist(), decision.weights.tolist()
        self._rows.append(
            ledger.table(
                {
                    **where,
                    "rank": table.ranks.tolist(),
                    "epoch": [self._samples.epoch(unit.position) for unit in units],
                    "position": [unit.position for unit in units],
                    "sample_id": [unit.sample_id for unit in units],
                    "document_ids": [unit.document_ids for unit in units],
                    "subset": [unit.subset for unit in units],
                    "tokens": [int(count) for count in tokens],
                    "loss": [loss / max(count, 1) for loss, count in zip(losses, tokens, strict=True)],
                    "score": table.scores.tolist(),
                    "kept": [weight > 0 for weight in weights],
                    "reason": decision.reasons,
                    "weight": weights,
                }
            )
        )
        kept = sum(weight * count for weight, count in zip(weights, tokens, strict=True))
        lost = sum(weight * loss for weight, loss in zip(weights, losses, strict=True) if weight)
        self._losses.append(lost / kept if kept else 0.0)

    def step(self, step: int, scalars: dict[str, float], seconds: dict[str, float], norms: dict[str, Tensor]) -> None:
        """The end of an optimizer step: `scalars` for TensorBoard, `seconds` by part, `norms` of layer inputs."""
        rows = pa.concat_tables(self._rows)
        self._rows.clear()
        self._ledger.append(rows)
        self._seconds.update(seconds)
        rate = sum(rows["tokens"].to_pylist()) / seconds["step"]
        loss = sum(self._losses) / len(self._losses)
        self._losses.clear()
        scoring = _scoring(seconds) / seconds["step"]
        self._board.scalars(
            {"train/loss": loss, "train/tokens_per_second": rate, "train/scoring_fraction": scoring, **scalars}, step
        )
        self._board.scalars({f"time/{part}": value for part, value in seconds.items()}, step)
        detailed = step % self._observe.every_steps == 0
        self._board.influence(rows, step, histogram=detailed)
        if detailed:
            self._board.scalars({f"layers/activation_norm/{name}": float(norm) for name, norm in norms.items()}, step)
            if self._observe.log_texts:
                self._board.removed_texts(rows, self._text_of, step)
        self._bar.set_postfix(loss=f"{loss:.3f}", removed=self._board.removed, tok_s=f"{rate:.0f}", refresh=False)
        self._bar.update()

    def evaluation(self, figures: dict[str, Any], step: int) -> None:
        for name, row in [("all", figures["all"]), *figures["subsets"].items()]:
            self._board.scalars({f"validation/{tag}/{name}": row[tag] for tag in ("loss", "bits_per_byte")}, step)

    def commit(self, step: int) -> None:
        """Publish all rows up to `step`: a checkpoint of it was just written."""
        self._ledger.commit(step)
        self._board.flush()

    def close(self) -> float | None:
        """Close all files; returns the fraction of the time of its steps that this process spent on scoring, if any."""
        self._bar.close()
        self._board.close()
        return _scoring(self._seconds) / self._seconds["step"] if self._seconds else None

    def _text_of(self, row: dict[str, Any]) -> str:
        return str(self._tokenizer.decode(self._samples.tokens_of(row["sample_id"], row["document_ids"])))


class TensorBoard:
    """Writes RUN_DIR/tensorboard; one process, rank 0.

    Counts by subset go on from those in `rows`, the ledger so far; events after `step` are purged.
    """

    def __init__(self, run_dir: Path, step: int, rows: pa.Table) -> None:
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1 if step else None)
        self._units: Counter[str] = Counter()
        self._removed: Counter[str] = Counter()
        self._count(rows)
        self._step = step
        self._seen_standing_out = {(row["subset"], row["stands_out"]) for row in self._standing_out()}
        self._writer.add_custom_scalars(_LAYOUT)

    @property
    def removed(self) -> int:
        """Units removed since the run began."""
        return self._removed.total()

    def hyperparameters(self, config_yaml: str) -> None:
        self._writer.add_text("hyperparameters", _code(config_yaml))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def influence(self, rows: pa.Table, step: int, histogram: bool) -> None:
        """Kept and removed units of one optimizer step, and in total and by subset since the run began.

        With `histogram` also that of the scores, and a warning where a subset begins to stand out."""
        self._count(rows)
        self._step = step
        removed = len(rows) - rows["kept"].to_pylist().count(True)
        total, units = self._removed.total(), self._units.total()
        self.scalars(
            {
                "influence/removed_total": total,
                "influence/removed_fraction": removed / len(rows),
                "influence/removed_fraction_total": total / units,
                "kept/total": units - total,
            },
            step,
        )
        for subset, units in self._units.items():
            removed = self._removed[subset]
            self.scalars(
                {
                    f"influence/removed_by_subset/{subset}": removed,
                    f"kept/by_subset/{subset}": units - removed,
                    f"removed_fraction_by_subset/{subset}": removed / units,
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
        return removal.standing_out({name: (units, self._removed[name]) for name, units in self._units.items()})

    def _warn(self, rows: list[dict[str, Any]], step: int) -> None:
        if rows:
            text = "\n".join(f"- {removal.in_words(row)}" for row in rows)
            self._writer.add_text("influence/standing_out", text, step)

    def _count(self, rows: pa.Table) -> None:
        for subset, (units, removed) in ledger.counts_by_subset(rows).items():
            self._units[subset] += units
            self._removed[subset] += removed


def _scoring(seconds: Mapping[str, float]) -> float:
    """What scoring took: all named parts of a step. A forward for scoring alone has two of them inside."""
    inside = {"step", "audit", *({"layer inputs", "logit gradient"} if "scoring forward" in seconds else ())}
    return sum(value for part, value in seconds.items() if part not in inside)


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


def print_summary(summary: dict[str, Any]) -> None:
    """The end of a run on one screen: held-out bits per byte before and after, units scored and removed, by subset."""
    before, after = summary["evaluation_before"], summary["evaluation_after"]
    units = summary["units_by_subset"]
    table = Table(title=f"{summary['run_dir']}: {summary['steps']} steps", title_justify="left")
    table.add_column("subset")
    for name in ("bits/byte before", "after", "units", "removed", "removed %"):
        table.add_column(name, justify="right")
    for subset in sorted({*units, *(before or {}).get("subsets", {})}):
        scored, removed = units.get(subset, (0, 0))
        table.add_row(subset, *_bits(before, after, subset), str(scored), str(removed), _percent(removed, scored))
    scored, removed = (int(number) for number in np.sum([*units.values(), (0, 0)], axis=0))
    table.add_section()
    table.add_row("all", *_bits(before, after, None), str(scored), str(removed), _percent(removed, scored))
    console = Console()
    console.print(table)
    for row in summary["standing_out"]:
        console.print(f"stands out: {removal.in_words(row)}", style="yellow", markup=False, soft_wrap=True)
    console.print(
        f"scoring took {_percent(summary['scoring_fraction'] or 0, 1)} % of the time of a step\n"
        f"ledger:      {summary['run_dir']}/ledger/*.parquet (one row per scored unit)\n"
        f"model:       {summary['run_dir']}/model (Hugging Face format)\n"
        f"TensorBoard: tensorboard --logdir {summary['run_dir']}/tensorboard",
        highlight=False,
        soft_wrap=True,
    )


def _bits(before: dict[str, Any] | None, after: dict[str, Any] | None, subset: str | None) -> list[str]:
    found = [e and (e["subsets"].get(subset) if subset else e["all"]) for e in (before, after)]
    return [f"{e['bits_per_byte']:.3f}" if e else "-" for e in found]


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f}" if whole else "-"
