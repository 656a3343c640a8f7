"""Continue pre-training, and know at every step which samples help.

deepspeed --num_accelerators 2 --module pipeline.train --config launch/quickstart.yaml [--influence.estimator lli ...]
"""

import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pipeline.config import cli
from pipeline.config.cli import exit_on_refused_file, exit_on_user_error
from pipeline.config.deepspeed_json import read_deepspeed_config
from pipeline.config.ownership import owned
from pipeline.config.schema import Config
from pipeline.data.leave_out import left_out
from pipeline.data.prepared import load_fingerprint, load_report, load_split
from pipeline.data.samples import Samples
from pipeline.engine import collectives, deepspeed_engine, launch
from pipeline.engine.agreement import startup_identity
from pipeline.engine.checkpoints import (
    Progress,
    find_checkpoint,
    identity_of,
    move_aside,
    publish,
    refuse_foreign,
    refuse_foreign_run_dir,
    settings_of,
)
from pipeline.engine.json_check import check_deepspeed_json, notes
from pipeline.engine.lost_contact import exit_on_lost_contact
from pipeline.engine.resume import changed_settings, refuse_earlier_end
from pipeline.influence.table import check_effect, owns_accumulation
from pipeline.models.adapters import adapter_settings
from pipeline.models.load import load_model
from pipeline.models.reference_model import load_reference_model
from pipeline.record.recorder import Recorder
from pipeline.record.starts import Start, keep_start
from pipeline.record.summary import print_summary
from pipeline.training.dry_run import dry_run
from pipeline.training.evaluation import evaluate_engine
from pipeline.training.export import finish
from pipeline.training.influence_engine import InfluenceEngine
from pipeline.training.model_check import check_before_training
from pipeline.training.preparing import prepare_on_rank_0
from pipeline.training.rules import check_run, without_effect


def train(config: Config, until: int | None = None) -> dict[str, Any] | None:
    """Run `config` from its start, or from its checkpoint, to `max_steps` or until a signal asks for a stop.

    `until` ends it earlier, as if it were done. Returns the summary of a run that is done, on rank 0. Collective.
    """
    with ExitStack() as ownership:

        def own() -> None:
            ownership.enter_context(owned(config.run_dir, "run_dir"))
            refuse_foreign_run_dir(Path(config.run_dir))

        with exit_on_user_error("pipeline.train"):
            launch.join_process_group()
            collectives.agree(startup_identity(config))
            collectives.on_rank_0(own)
        return _train(config, until)


def _train(config: Config, until: int | None) -> dict[str, Any] | None:
    end = until or config.max_steps
    with exit_on_user_error("pipeline.train"):
        settings = read_deepspeed_config(config)
        check_deepspeed_json(config, settings)
        prepare_on_rank_0(config)
        rank, world, device = collectives.rank(), collectives.world_size(), launch.device()
        leave_out = left_out(config.data, load_report(config.data.prepared_dir)["train"]["documents"])
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
        train_split = load_split(config.data.prepared_dir, "train")
        samples = Samples(train_split, config.seed, config.influence.unit, leave_out)
        reference = None
        if config.influence.reference == "validation":
            reference = Samples(load_split(config.data.prepared_dir, "reference"), config.seed, "sequence")
        model = load_model(config.model, config.seed, settings)
        check_before_training(config, model)
        ds_engine = deepspeed_engine.initialize(model, settings)
        reference_model = None
        if config.influence.reference_model:
            reference_model = deepspeed_engine.frozen(load_reference_model(config, settings), ds_engine, settings)
        engine = InfluenceEngine(
            ds_engine,
            config.influence,
            config.policy,
            config.seed,
            reference,
            norms_every_steps=config.observe.every_steps,
            audit_every_steps=config.observe.audit_every_steps,
            reference_model=reference_model,
        )
        identity = {
            "seed": config.seed,
            "unit": config.influence.unit,
            "engine": deepspeed_engine.identity(ds_engine),
            "dataset": load_fingerprint(config.data.prepared_dir),
        } | ({"adapter": adapter_settings(config.model.peft)} if config.model.peft else {})
        progress = Progress({}, {})
        if checkpoint:
            refuse_foreign(checkpoint, identity)
            progress = Progress(**deepspeed_engine.load_checkpoint(ds_engine, checkpoint, Progress.__annotations__))
            changed += engine.load_state_dict(progress.influence)

        def open_records() -> Recorder:
            for what in [f"note: {each}" for each in said] + [f"resume: {each}" for each in changed]:
                print(what, flush=True)
            if checkpoint is None or checkpoint.parent.resolve() != Path(config.run_dir, "checkpoints").resolve():
                move_aside(Path(config.run_dir))
            where = (engine.step, engine.position, world, engine.size * world, engine.micro_batches)
            pool = config.policy.pool or 1
            keep_start(config, Start(*where, str(checkpoint or "") or None, changed, leave_out, pool))
            return Recorder(config, samples, engine.step)

        recorder = collectives.on_rank_0(open_records)

    def hold_out() -> None:
        """Held-out figures of the model as it is, kept for the end and shown in TensorBoard."""
        if figures := evaluate_engine(ds_engine, config):
            progress.evaluations[engine.step] = figures
            if recorder:
                recorder.evaluation(figures, engine.step)

    if not checkpoint:
        hold_out()
    stop, unhealthy = StopSignal(), 0
    while engine.step < end and not stop.agreed and unhealthy < config.policy.stop_after_non_finite:
        learning_rate = ds_engine.get_lr()[0]
        batches = samples.micro_batches(engine.position, rank, world, engine.size, engine.micro_batches, device)
        try:
            outcome = engine.train_step(batches, stop.requested)
        except FloatingPointError as error:
            raise FloatingPointError(f"{error}. {what_now(checkpoint)}") from error
        step, seconds = outcome.step, engine.timed.read()
        if recorder:
            scalars = {
                "train/lr": learning_rate,
                "train/skipped_steps": ds_engine.skipped_steps,
                "train/memory_gb": deepspeed_engine.peak_memory() / 1e9,
            }
            recorder.step(outcome, engine.size * world, scalars, seconds)
        stop.agreed |= outcome.stop
        unhealthy = 0 if outcome.healthy else unhealthy + 1
        if config.observe.eval_every_steps and step % config.observe.eval_every_steps == 0 and not stop.agreed:
            hold_out()
        ending = step == end or stop.agreed or unhealthy == config.policy.stop_after_non_finite
        if step % config.checkpoint.every_steps == 0 or ending:
            progress.influence = engine.state_dict()
            checkpoint = Path(config.run_dir, "checkpoints", f"step-{step}")
            deepspeed_engine.save_checkpoint(ds_engine, checkpoint, vars(progress))
            if recorder:
                # Rows first, the checkpoint's name last: a kill in between leaves rows that a resume discards; the
                # other way round it would lose them.
                recorder.commit(step)
                publish(checkpoint, identity, config.checkpoint.keep, written_under)

    summary = None
    if engine.step == end:
        if engine.step not in progress.evaluations:
            hold_out()
        summary = finish(ds_engine, config, engine, progress, recorder)
    elif recorder:
        recorder.close()
    collectives.barrier()
    if unhealthy == config.policy.stop_after_non_finite:
        raise FloatingPointError(
            f"stopped after step {engine.step}: in {unhealthy} steps in a row a loss, score or gradient was not "
            f"finite (policy.stop_after_non_finite); the ledger says which units. {what_now(checkpoint)}"
        )
    if stop.agreed and rank == 0:
        print(f"stopped by a signal after step {engine.step}; --resume auto goes on from there", flush=True)
    return summary


def what_now(checkpoint: Path | None) -> str:
    """What to do after numbers that are not finite, with the newest checkpoint, where there is one."""
    mend = "lower the learning rate in the DeepSpeed JSON, or leave documents out (data.leave_out, ids of the ledger)"
    if checkpoint:
        return f"{checkpoint} is whole: {mend}, and go on with --resume {checkpoint}"
    return f"There is no checkpoint yet: {mend}, and start anew"


class StopSignal:
    """SIGTERM or SIGINT at any rank: `requested` here, `agreed` once all ranks know, at the end of a step."""

    def __init__(self) -> None:
        self.requested = self.agreed = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._request)

    def _request(self, *_: object) -> None:
        self.requested = True


def parse(prog: str, argv: list[str] | None = None) -> Config:
    """The config of a run; what does not go together ends the process with a message."""
    return cli.parse(prog, argv, Config, check_run)


def main(argv: list[str] | None = None) -> None:
    config = parse("pipeline.train", argv)
    with exit_on_refused_file("pipeline.train"), exit_on_lost_contact("pipeline.train"):
        if config.dry_run:
            with exit_on_user_error("pipeline.train"):
                dry_run(config, train)
        elif summary := train(config):
            print_summary(summary)
    collectives.leave()


if __name__ == "__main__":
    main()
