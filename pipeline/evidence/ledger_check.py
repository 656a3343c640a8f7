"""The proof from a ledger that nothing was lost or repeated."""

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.schema_data import SourceConfig
from pipeline.data.samples import Samples, training_samples
from pipeline.evidence.invariance import first_few
from pipeline.record import ledger
from pipeline.record.mixture_log import pieces_of
from pipeline.record.starts import Start, config_of_run, start_of, starts_of

_CHUNK = 512


def check_ledger(run_dir: Path) -> tuple[str, list[str]]:
    """What is in the ledger of `run_dir`, in one line, and everything in it that cannot be: none where no sample was
    lost or repeated.

    Sound is: every position from 0 (of a run that went on from another's checkpoint: from there) to the last scored
    once, in order (with `unit: document`, each document of it once); the sample and documents at each position are
    those that the seed puts there, where the prepared dataset still lies at `data.prepared_dir` (else no sample comes
    twice in an epoch); steps from 1, each of as many micro-batches of as many sequences as the start that it ran under
    (`record.starts`) says, or else as the others; parts named after their steps; kept exactly where the weight is
    positive, and of a candidate pool its share; no checkpoint of a later step (of an earlier one it may be: stopped
    between the two writes). Raises ValueError where there is no run.
    """
    config = config_of_run(run_dir)
    prepared_dir, mixture = config["data"]["prepared_dir"], config["data"].get("mixture")
    if mixture is not None:
        mixture = {name: SourceConfig(**source) for name, source in mixture.items()}
    rows, violations = _read_parts(run_dir / "ledger")
    last, saved = 0 if rows.empty else rows["step"].max(), _newest_checkpoint(run_dir)
    if saved > last:
        violations.append(f"the newest checkpoint is of step {saved}, the ledger ends at step {last}")
    if rows.empty:
        return "no units yet", violations
    starts = starts_of(run_dir)
    checks = [_gaps_and_repeats(rows, starts), _steps(rows, starts), _kept_without_weight(rows), _pools(rows, starts)]
    try:
        samples = training_samples(
            prepared_dir, config["seed"], config["influence"]["unit"], mixture, (), pieces_of(run_dir)
        )
    except ValueError:
        checks.append(_twice_in_an_epoch(rows, mixture is not None))
        how = f"order not recomputed: no prepared dataset at {prepared_dir}"
    else:
        checks.append(_out_of_order(rows, samples))
        how = f"order recomputed from seed {config['seed']} and {prepared_dir}"
    if saved < last:
        how += f"; the newest checkpoint is of step {saved}: a resume scores later steps again, in place of these"
    for check in checks:
        violations += first_few(check)
    steps, removed = rows["step"].nunique(), int((~rows["kept"]).sum())
    found = f"{len(rows)} units at positions 0..{rows['position'].max()}, {steps} steps, {removed} removed"
    if any(start.pool > 1 for start in starts):
        found += f", {len(rows) - removed} of those read trained on"
    return f"{found} ({how})", violations


def _read_parts(directory: Path) -> tuple[pd.DataFrame, list[str]]:
    """The rows of all parts, with the name of the `file` and `documents` that can be compared; and unsound parts."""
    tables, violations = [ledger.SCHEMA.empty_table().to_pandas().assign(file="")], []
    for part in sorted(directory.glob("steps-*.parquet")):
        try:
            rows = pq.read_table(part, schema=ledger.SCHEMA).to_pandas()
        except (OSError, pa.ArrowException) as error:
            violations.append(f"{part.name} cannot be read: {error}")
            continue
        first, last = rows["step"].min(), rows["step"].max()
        if [int(number) for number in re.findall(r"\d+", part.stem)] != [first, last]:
            violations.append(f"{part.name} holds steps {first} to {last}")
        tables.append(rows.assign(file=part.name))
    rows = pd.concat(tables[1:] or tables, ignore_index=True)
    return rows.assign(documents=rows["document_ids"].map(tuple)), violations


def _newest_checkpoint(run_dir: Path) -> int:
    """Its step, 0 where there is none."""
    latest = run_dir / "checkpoints" / "latest"
    return int(latest.read_text().strip().removeprefix("step-")) if latest.is_file() else 0


def _at(rows: pd.DataFrame, index: int) -> str:
    row = rows.loc[index]
    return f"position {row.position} (step {row.step}, micro-step {row.micro_step}, {row.file})"


def _gaps_and_repeats(rows: pd.DataFrame, starts: Sequence[Start]) -> Iterator[str]:
    """A sequence scored as a whole has one list of documents, so a repeated position repeats its documents too."""
    position = rows["position"].to_numpy()
    for index in _where(rows.duplicated(["position", "documents"])):
        yield f"{_at(rows, index)} was scored before: documents {list(rows['documents'][index])}"
    for before, after in pairwise(np.unique(np.append(position, starts[0].position - 1 if starts else -1))):
        if after != before + 1:
            at = _at(rows, int(np.argmax(position == after)))
            yield f"positions {before + 1}..{after - 1} are missing before {at}"
    for index in _where(np.diff(position, prepend=0) < 0):
        yield f"{_at(rows, index)} comes after position {position[index - 1]}"


def _where(mask: Any) -> list[int]:
    return np.flatnonzero(mask).tolist()


def _steps(rows: pd.DataFrame, starts: Sequence[Start]) -> Iterator[str]:
    first = starts[0].step + 1 if starts else 1
    for missing in sorted(set(range(first, rows["step"].max() + 1)) - set(rows["step"])):
        yield f"step {missing} is missing"
    for index in _where(np.diff(rows["step"] * len(rows) + rows["micro_step"], prepend=0) < 0):
        yield f"{_at(rows, index)} comes after a later step"
    sequences = rows.groupby(["step", "micro_step"])["position"].nunique()
    usual, often = sequences.mode()[0], rows.groupby("step")["micro_step"].nunique().mode()[0]
    others = "others" if not starts else "its run then"
    for (step, micro_step), count in sequences.items():
        right = start_of(starts, step).sequences if starts else usual
        if count != right:
            yield f"step {step}, micro-step {micro_step} has {count} sequences, {others} {right}"
    for step, micro_steps in rows.groupby("step")["micro_step"].unique().items():
        accumulation = start_of(starts, step).accumulation if starts else often
        if sorted(micro_steps) != list(range(accumulation)):
            found = sorted(map(int, micro_steps))
            yield f"step {step} has micro-steps {found}, not 0..{accumulation - 1} as {others}"


def _kept_without_weight(rows: pd.DataFrame) -> Iterator[str]:
    for index in _where(rows["kept"] != (rows["weight"] > 0)):
        yield f"{_at(rows, index)} has kept {rows['kept'][index]} at weight {rows['weight'][index]}"


def _pools(rows: pd.DataFrame, starts: Sequence[Start]) -> Iterator[str]:
    """Of a candidate pool exactly the sequences of a step are kept, fewer only where too few were finite."""
    for step, part in rows.groupby("step"):
        pool = start_of(starts, step).pool if starts else 1
        if pool == 1:
            continue
        right = min(len(part) // pool, int((part["reason"] != "non_finite").sum()))
        if (kept := int(part["kept"].sum())) != right:
            yield f"step {step} read {len(part)} sequences and trained on {kept}, not on {right}, one of {pool}"


def _twice_in_an_epoch(rows: pd.DataFrame, mixed: bool) -> Iterator[str]:
    """All that can be said of the order without the dataset; the sources of a mixture have epochs of their own."""
    again = rows.drop_duplicates("position").duplicated(["epoch", "sample_id"])
    for index in again[again].index:
        yield f"{_at(rows, index)} has sample {rows['sample_id'][index]} again in epoch {rows['epoch'][index]}"
    for index in [] if mixed else _where(~np.isin(np.diff(rows["epoch"], prepend=0), (0, 1))):
        yield f"{_at(rows, index)} jumps to epoch {rows['epoch'][index]}"


def _out_of_order(rows: pd.DataFrame, samples: Samples) -> Iterator[str]:
    """Where a unit is not what the seed puts there; also all over, if the dataset was prepared anew since the run."""
    for chunk, part in rows.groupby(rows["position"] // _CHUNK):
        start, stop = chunk * _CHUNK, int(part["position"].max()) + 1
        scored = set(part["position"])
        units = [unit for unit in samples.units(start, stop - start) if unit.position in scored]
        columns = (part[name] for name in ("position", "epoch", "sample_id", "documents"))
        found = set(zip(*columns, strict=True))
        right = {(u.position, samples.epoch(u.position), u.sample_id, tuple(u.document_ids)) for u in units}
        for verb, wrong in (("holds", found - right), ("should hold", right - found)):
            for position, epoch, sample, documents in sorted(wrong):
                at = _at(part, part.index[part["position"] == position][0])
                yield f"{at} {verb} sample {sample} of epoch {epoch}, documents {list(map(int, documents))}"
