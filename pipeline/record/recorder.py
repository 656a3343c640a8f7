"""What is taken down of a run: ledger, TensorBoard, progress bar."""

import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm
from transformers import AutoTokenizer

from pipeline.config.cli import to_yaml
from pipeline.config.schema import Config
from pipeline.config.timing import outermost
from pipeline.data.mixture import Piece
from pipeline.data.planted import PREFIX
from pipeline.data.prepared import load_report
from pipeline.data.samples import Samples
from pipeline.record import ledger, mixture_log
from pipeline.record.eta import Eta
from pipeline.record.outcome import Decided, Outcome
from pipeline.record.tensorboard import TensorBoard


class Recorder:
    """Takes down what happens in a run: ledger, TensorBoard, progress bar. Exists on rank 0 only.

    `step` is the optimizer step that the run goes on from, 0 for a new one; `quiet`: without the progress bar.
    `monitor` is shown all scalars too.
    """

    def __init__(
        self,
        config: Config,
        samples: Samples,
        step: int,
        quiet: bool = False,
        monitor: Callable[[Mapping[str, float]], None] | None = None,
    ) -> None:
        run_dir = Path(config.run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(to_yaml(config))
        self._observe, self._samples = config.observe, samples
        self._tokenizer = None
        if config.observe.log_texts:
            self._tokenizer = AutoTokenizer.from_pretrained(Path(config.data.prepared_dir, "tokenizer"))
        self._ledger = ledger.Ledger(run_dir, step)
        rows = ledger.read(run_dir)
        self._trained = np.zeros(len(samples.mixture.sources) if samples.mixture else 0)
        self._shares(rows)
        moving = samples.mixture is not None and config.policy.rule == "mixture"
        self._board = TensorBoard(
            run_dir,
            step,
            rows,
            _largest_subsets(config),
            held_out=config.data.holds_out,
            audited=config.observe.audit_every_steps is not None,
            unit=config.influence.unit,
            mixed=samples.mixture is not None,
            moving=moving,
            answers=config.task.classifies,
            monitor=monitor,
        )
        self._mixture = mixture_log.MixtureLog(run_dir, step) if moving else None
        if not step:
            self._board.hyperparameters(to_yaml(config))
        # A log file gets a line now and then instead of a bar that moves.
        interval = 1.0 if sys.stderr.isatty() else 15.0
        self._bar = tqdm(
            total=config.max_steps,
            initial=step,
            unit="step",
            desc="train",
            dynamic_ncols=True,
            mininterval=interval,
            disable=quiet,
        )
        self._seconds: Counter[str] = Counter()
        self._eta = Eta(step, config.max_steps)

    def step(
        self, outcome: Outcome, sequences: int, scalars: Mapping[str, float], seconds: Mapping[str, float]
    ) -> None:
        """An optimizer step, of global micro-batches of `sequences` each: a ledger row for every unit; `scalars` and
        `seconds` by part (`Stopwatch.read`) for TensorBoard."""
        step = outcome.step
        parts = [
            self._rows({"step": step, "micro_step": m, "position": position}, sequences, part)
            for m, (position, part) in enumerate(zip(outcome.positions, outcome.micro_batches, strict=True))
        ]
        rows = pa.concat_tables(parts)
        self._ledger.append(rows)
        self._seconds.update(seconds)
        rate, loss = sum(rows["tokens"].to_pylist()) / seconds["step"], outcome.loss
        scoring = _scoring(seconds) / seconds["step"]
        self._board.scalars(
            {
                "train/loss": loss,
                "train/grad_norm": math.nan if outcome.gradient_norm is None else outcome.gradient_norm,
                "train/tokens_per_second": rate,
                "train/scoring_fraction": scoring,
                **scalars,
            },
            step,
        )
        if outcome.disagreement is not None:
            self._board.scalars({"influence/scope_disagreement": outcome.disagreement}, step)
        if outcome.audit is not None:
            self._board.scalars({"influence/audit_pearson": outcome.audit}, step)
        self._board.scalars(self._shares(rows), step)
        self._board.scalars({f"time/{part.removeprefix('step/')}": value for part, value in seconds.items()}, step)
        detailed = step % self._observe.every_steps == 0
        self._board.influence(rows, step, histogram=detailed)
        if detailed:
            self._board.scalars(
                {f"layers/activation_norm/{name}": float(norm) for name, norm in outcome.norms.items()}, step
            )
            if self._tokenizer:
                self._board.removed_texts(rows, self._text_of, step)
        self._bar.set_postfix(loss=f"{loss:.3f}", removed=self._board.removed, tok_s=f"{rate:.0f}", refresh=False)
        self._bar.update()
        if told := self._eta.after(step):
            tqdm.write(told)  # above the bar, on standard output

    def _rows(self, where: dict[str, int], size: int, part: Decided) -> pa.Table:
        """Ledger rows of the global micro-batch of `size` sequences at `where`: its step, micro_step and position."""
        units, table = self._samples.units(where["position"], size), part.units
        tokens = [int(count) for count in table.tokens.tolist()]
        weights, reasons = part.decision.weights.tolist(), list(part.decision.reasons)
        for index, unit in enumerate(units):
            if unit.left_out and not reasons[index]:
                reasons[index] = "left_out"
                # Without a label its weight never mattered.
                weights[index] = weights[index] if tokens[index] else 0.0
        return ledger.table(
            {
                **where,
                "rank": table.ranks.tolist(),
                "epoch": [self._samples.epoch(unit.position) for unit in units],
                "position": [unit.position for unit in units],
                "sample_id": [unit.sample_id for unit in units],
                "document_ids": [unit.document_ids for unit in units],
                "subset": [unit.subset for unit in units],
                "tokens": tokens,
                "loss": [loss / max(count, 1) for loss, count in zip(table.losses.tolist(), tokens, strict=True)],
                "score": table.scores.tolist(),
                "kept": [weight > 0 for weight in weights],
                "reason": reasons,
                "weight": weights,
            }
        )

    def _shares(self, rows: pa.Table) -> dict[str, float]:
        """Each source's share of the tokens trained on since the run began, `rows` and all before; none without a
        mixture."""
        mixture = self._samples.mixture
        if mixture is None or not len(rows):
            return {}
        tokens = rows["tokens"].to_numpy() * rows["kept"].to_numpy()
        sources = mixture.sources_of_rows(rows["sample_id"].to_numpy())
        self._trained += np.bincount(sources, tokens, len(mixture.sources))
        shares = self._trained / max(self._trained.sum(), 1)
        names = (f"trained_share_by_source/{source.name}" for source in mixture.sources)
        return dict(zip(names, shares.tolist(), strict=True))

    def mixture(self, step: int, piece: Piece, sources: dict[str, dict[str, float | None]]) -> None:
        """The weights that hold after `step`, and the influence that moved them."""
        assert self._mixture
        self._mixture.append(step, piece, sources)
        weights = {f"mixture/{name}": values["weight"] for name, values in sources.items()}
        self._board.scalars({tag: weight for tag, weight in weights.items() if weight is not None}, step)

    def evaluation(self, figures: dict[str, Any], step: int) -> None:
        """Held-out figures. (summary.json has those of every subset.)"""
        self._board.evaluation(figures, step)

    def commit(self, step: int) -> None:
        """Publish all rows up to `step`: a checkpoint of it was just written."""
        self._ledger.commit(step)
        self._board.flush()

    def close(self) -> float | None:
        """Close all files; returns the fraction of the time of its steps that this process spent on scoring, if any."""
        self._bar.close()
        self._board.close()
        if self._mixture:
            self._mixture.close()
        return _scoring(self._seconds) / self._seconds["step"] if self._seconds else None

    def _text_of(self, row: dict[str, Any]) -> str:
        assert self._tokenizer
        return str(self._tokenizer.decode(self._samples.tokens_of(row["sample_id"], row["document_ids"])))


def _largest_subsets(config: Config) -> list[str]:
    """Of the training split, the largest first; none where nothing was prepared."""
    try:
        part = load_report(config.data.prepared_dir)["train"]
    except ValueError:
        return []
    planted = [PREFIX + kind for kind in part.get("planted", {})]
    return planted + sorted(part["subsets"], key=lambda name: (-part["subsets"][name]["tokens"], name))


def _scoring(seconds: Mapping[str, float]) -> float:
    """What scoring took: all named parts of a step but audits, each second once."""
    return sum(value for part, value in outermost(seconds, "step").items() if part != "audit")
