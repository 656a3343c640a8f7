"""All that is settled before a run's first step: what it reads, trains and goes on from, and where it is recorded."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.config.deepspeed_json import read_deepspeed_config
from pipeline.config.schema import Config
from pipeline.data import order
from pipeline.data.batch import Batch
from pipeline.data.document import Split, document_ids
from pipeline.data.leave_out import left_out
from pipeline.data.mixture import plan
from pipeline.data.prepared import load_answers, load_fingerprint, load_report, load_split
from pipeline.data.samples import Samples, training_samples
from pipeline.engine import checkpoint_files, collectives, deepspeed_engine
from pipeline.engine.checkpoints import (
    Progress,
    find_checkpoint,
    identity_of,
    move_aside,
    refuse_foreign,
    settings_of,
)
from pipeline.engine.due import ALL
from pipeline.engine.json_check import check_deepspeed_json, notes
from pipeline.engine.resume import changed_settings, refuse_earlier_end
from pipeline.influence.ngram import Ngram
from pipeline.influence.scorer import ControlScorer
from pipeline.influence.table import check_effect, owns_accumulation
from pipeline.models.adapters import adapter_settings
from pipeline.models.load import load_model
from pipeline.models.reference_model import load_reference_model
from pipeline.record.comparison import comparison
from pipeline.record.recorder import Recorder
from pipeline.record.starts import Start, keep_start
from pipeline.training.influence_engine import InfluenceEngine
from pipeline.training.mixing import Mixing
from pipeline.training.model_check import check_before_training
from pipeline.training.opening import opening
from pipeline.training.preparing import prepare_on_rank_0
from pipeline.training.rules import without_effect

COUNTED = 4096
"""Sequences of the corpus and of the reference, at most, in which `ngram` counts, the first of the sample order."""


@dataclass
class Run:
    """A run that is about to go on from `engine.step`."""

    samples: Samples
    ds_engine: deepspeed_engine.DeepSpeedEngine
    engine: InfluenceEngine
    progress: Progress
    checkpoint: Path | None
    """What it goes on from."""
    identity: dict[str, Any]
    """What its checkpoints must have in common with whoever loads them."""
    settings: dict[str, Any]
    """The DeepSpeed JSON that it runs under."""
    recorder: Recorder | None
    """On rank 0 only."""
    mixing: Mixing | None
    """Where the weights of sources move."""


def begin(config: Config, end: int) -> Run:
    """Make or load all that `config` asks for, to run to step `end`. Collective. Raises ValueError, on all ranks, where
    it does not go together, with each other or with the checkpoint."""
    settings = read_deepspeed_config(config)
    check_deepspeed_json(config, settings)
    prepare_on_rank_0(config)
    refuse_unknown_best(config)
    collectives.on_rank_0(lambda: comparison(config))  # before it takes long
    world = collectives.world_size()
    leave_out = left_out(config.data, document_ids(load_report(config.data.prepared_dir)["train"]))
    collectives.agree({"data.leave_out": str(leave_out)})
    said = notes(config, settings) + check_effect(config, settings, world) + without_effect(config)
    checkpoint = collectives.broadcast(collectives.on_rank_0(lambda: find_checkpoint(config)))
    written_under, changed = settings, list[str]()
    if owns_accumulation(config.influence, config.policy):
        settings["managed_gradient_accumulation"] = False
    if checkpoint:
        refuse_earlier_end(checkpoint, end)
        settings = deepspeed_engine.config_to_load(checkpoint, identity_of(checkpoint)["engine"], settings)
        changed = changed_settings(checkpoint, settings_of(checkpoint), written_under)
    samples = training_samples(
        config.data.prepared_dir, config.seed, config.influence.unit, config.data.mixture, leave_out
    )
    answers, planned = load_answers(config.data.prepared_dir), list[str]()
    if samples.mixture and config.policy.rule != "mixture":
        position, step = 0, 0
        if checkpoint:
            position = checkpoint_files.checkpoint_position(checkpoint)
            step = int(checkpoint.name.removeprefix("step-"))
        together = settings["train_micro_batch_size_per_gpu"] * settings.get("gradient_accumulation_steps", 1) * world
        planned = plan(samples.mixture, position, step, together * (config.policy.pool or 1), config.max_steps)
    reference = None
    if config.influence.reference == "validation":
        rows = load_split(config.data.prepared_dir, "reference")
        reference = Samples(rows, config.seed, "sequence", answers=answers)
    model = load_model(config.model, config.seed, settings, answers)
    check_before_training(config, model, answers)
    ds_engine = deepspeed_engine.initialize(model, settings)
    reference_model = None
    if config.influence.reference_model:
        reference_model = deepspeed_engine.frozen(load_reference_model(config, settings, answers), ds_engine, settings)
    scorer = None
    if config.influence.estimator == "ngram":
        assert reference is not None
        counted = _first_of(reference, "reference", config), _first_of(samples, "train", config)
        scorer = ControlScorer(Ngram(*counted, ds_engine.device), by_token=config.influence.unit == "token")
    engine = InfluenceEngine(
        ds_engine,
        config.influence,
        config.policy,
        config.seed,
        reference,
        norms_every_steps=config.observe.every_steps,
        audit_every_steps=config.observe.audit_every_steps,
        scorer=scorer,
        reference_model=reference_model,
    )
    identity = {
        "seed": config.seed,
        "unit": config.influence.unit,
        "order": order.KIND,
        "engine": deepspeed_engine.identity(ds_engine),
        "dataset": load_fingerprint(config.data.prepared_dir),
    } | ({"adapter": adapter_settings(config.model.peft)} if config.model.peft else {})
    mixing = None
    if samples.mixture:
        identity["mixture"] = samples.mixture.identity
        if config.policy.rule == "mixture":
            identity["mixture_moves"] = True
            policy = config.policy
            mixing = Mixing(samples.mixture, policy.mixture_rate, policy.mixture_floor, policy.warmup_steps)
    progress = Progress({}, {})
    if checkpoint:
        refuse_foreign(checkpoint, identity)
        progress = Progress(**deepspeed_engine.load_checkpoint(ds_engine, checkpoint, Progress.__annotations__))
        changed += engine.load_state_dict(progress.influence)
        if mixing:
            mixing.load_state_dict(progress.influence["mixture"])

    def open_records() -> Recorder:
        report = load_report(config.data.prepared_dir)["train"]
        print(opening(config, settings, report, ds_engine.module, engine), flush=True)
        for what in [f"note: {each}" for each in said + planned] + [f"resume: {each}" for each in changed]:
            print(what, flush=True)
        if checkpoint is None or checkpoint.parent.resolve() != Path(config.run_dir, "checkpoints").resolve():
            move_aside(Path(config.run_dir))
        where = (engine.step, engine.position, world, engine.size * world, engine.micro_batches)
        pool = config.policy.pool or 1
        keep_start(config, Start(*where, str(checkpoint or "") or None, changed, leave_out, pool, planned))
        recorder = Recorder(config, samples, engine.step, monitor=deepspeed_engine.monitor_of(ds_engine))
        if mixing:
            recorder.mixture(engine.step, mixing.piece, mixing.sources)
        return recorder

    recorder = collectives.on_rank_0(open_records)
    return Run(samples, ds_engine, engine, progress, checkpoint, identity, written_under, recorder, mixing)


def refuse_unknown_best(config: Config) -> None:
    """Raises ValueError where `checkpoint.best_of` names no subset of the held-out text."""
    best_of = config.checkpoint.best_of
    if best_of in (None, ALL):
        return
    subsets = load_report(config.data.prepared_dir)["eval"]["subsets"]
    if best_of not in subsets:
        raise ValueError(
            f"checkpoint.best_of: '{best_of}' is no subset of the held-out text; choose {ALL}, or one of "
            f"{', '.join(sorted(subsets))}"
        )


def _first_of(samples: Samples, split: Split, config: Config) -> Iterator[Batch]:
    """The same on every rank, whatever there are."""
    size = min(len(load_split(config.data.prepared_dir, split)), COUNTED)
    if samples.mixture and samples.mixture.end is not None:
        size = min(size, samples.mixture.end)
    for position in range(0, size, 64):
        yield samples.batch(position, min(64, size - position), torch.device("cpu"))
