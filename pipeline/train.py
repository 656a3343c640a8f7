"""Continue pre-training, and know at every step which samples help.

deepspeed --num_accelerators 2 --module pipeline.train --config launch/quickstart.yaml [--influence.estimator lli ...]
"""

import signal
from pathlib import Path
from typing import Any

from pipeline.config.cli import exit_on_user_error, parse
from pipeline.config.deepspeed_json import read_deepspeed_config
from pipeline.config.schema import Config
from pipeline.config.timing import Stopwatch
from pipeline.data.prepared import ensure_prepared, load_fingerprint, load_split
from pipeline.data.samples import Samples
from pipeline.engine import collectives, deepspeed_engine, launch, lost_contact
from pipeline.engine.agreement import startup_identity
from pipeline.engine.checkpoints import Progress, find_checkpoint, identity_of, move_aside, publish, refuse_foreign
from pipeline.influence.estimator import Estimator
from pipeline.models.load import load_model
from pipeline.record.recorder import Recorder
from pipeline.record.summary import print_summary
from pipeline.training.dry_run import rehearse
from pipeline.training.evaluation import evaluate_engine
from pipeline.training.export import finish
from pipeline.training.step import Step


def train(config: Config, until: int | None = None) -> dict[str, Any] | None:
    """Run `config` from its start, or from its checkpoint, to `max_steps` or until a signal asks for a stop.

    `until` ends it earlier, as if it were done. Returns the summary of a run that is done, on rank 0. Collective.
    """
    end = until or config.max_steps
    with exit_on_user_error("pipeline.train"):
        ensure_prepared(config)
        device = launch.join_process_group()
        rank, world = collectives.rank(), collectives.world_size()
        collectives.agree(startup_identity(config))
        checkpoint = collectives.broadcast(find_checkpoint(config) if rank == 0 else None)
        deepspeed_config = read_deepspeed_config(config)
        if checkpoint:
            deepspeed_config = deepspeed_engine.config_to_load(
                checkpoint, identity_of(checkpoint)["engine"], deepspeed_config
            )
        samples = Samples(load_split(config.data.prepared_dir, "train"), config.seed, config.influence.unit)
        model = load_model(config.model, config.seed, deepspeed_config)
        timed = Stopwatch(device)
        estimator = Estimator(config.influence, model, config.seed, device, timed)
        ds_engine = deepspeed_engine.initialize(model, deepspeed_config)
        identity = {
            "seed": config.seed,
            "unit": config.influence.unit,
            "engine": deepspeed_engine.identity(ds_engine),
            "dataset": load_fingerprint(config.data.prepared_dir),
        }
        reference = None
        if config.influence.reference == "validation":
            reference = Samples(load_split(config.data.prepared_dir, "reference"), config.seed, "sequence")
        take = Step(ds_engine, estimator, config, samples, reference, timed)
        progress = Progress(0, 0, {}, {})
        if checkpoint:
            refuse_foreign(checkpoint, identity)
            progress = Progress(**deepspeed_engine.load_checkpoint(ds_engine, checkpoint, Progress.__annotations__))
            estimator.load_state_dict(progress.estimator)

    recorder = None
    if rank == 0:
        if checkpoint is None or checkpoint.parent.resolve() != Path(config.run_dir, "checkpoints").resolve():
            move_aside(Path(config.run_dir))
        recorder = Recorder(config, samples, progress.step)

    def hold_out() -> None:
        """Held-out figures of the model as it is, kept for the end and shown in TensorBoard."""
        if figures := evaluate_engine(ds_engine, config):
            progress.evaluations[progress.step] = figures
            if recorder:
                recorder.evaluation(figures, progress.step)

    if not checkpoint:
        hold_out()
    stop, unhealthy = StopSignal(), 0
    while progress.step < end and not stop.agreed and unhealthy < config.policy.stop_after_non_finite:
        step, learning_rate = progress.step + 1, ds_engine.get_lr()[0]
        with timed("step"):
            outcome = take(step, progress.position, stop.requested)
        if recorder:
            scalars = {
                "train/lr": learning_rate,
                "train/skipped_steps": ds_engine.skipped_steps,
                "train/memory_gb": deepspeed_engine.peak_memory() / 1e9,
            }
            recorder.step(step, outcome, take.size * world, scalars, timed.read(), estimator.norms())
        progress.step, progress.position = step, progress.position + take.size * world * take.accumulation
        stop.agreed |= outcome.stop
        unhealthy = 0 if outcome.healthy else unhealthy + 1
        if config.observe.eval_every_steps and step % config.observe.eval_every_steps == 0 and not stop.agreed:
            hold_out()
        ending = step == end or stop.agreed or unhealthy == config.policy.stop_after_non_finite
        if step % config.checkpoint.every_steps == 0 or ending:
            progress.estimator = estimator.state_dict()
            checkpoint = Path(config.run_dir, "checkpoints", f"step-{step}")
            deepspeed_engine.save_checkpoint(ds_engine, checkpoint, vars(progress))
            if recorder:
                # Rows first, the checkpoint's name last: a kill in between leaves rows that a resume discards; the
                # other way round it would lose them.
                recorder.commit(step)
                publish(checkpoint, identity, config.checkpoint.keep)

    summary = None
    if progress.step == end:
        if progress.step not in progress.evaluations:
            hold_out()
        summary = finish(ds_engine, config, progress, recorder)
    elif recorder:
        recorder.close()
    collectives.barrier()
    if unhealthy == config.policy.stop_after_non_finite:
        raise FloatingPointError(
            f"stopped after step {progress.step}: in {unhealthy} steps in a row a loss, score or gradient was not "
            "finite (policy.stop_after_non_finite); the ledger says which units. A checkpoint was written: lower the "
            "learning rate or leave these documents out, and resume"
        )
    if stop.agreed and rank == 0:
        print(f"stopped by a signal after step {progress.step}; --resume auto goes on from there", flush=True)
    return summary


class StopSignal:
    """SIGTERM or SIGINT at any rank: `requested` here, `agreed` once all ranks know, at the end of a step."""

    def __init__(self) -> None:
        self.requested = self.agreed = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._request)

    def _request(self, *_: object) -> None:
        self.requested = True


def main(argv: list[str] | None = None) -> None:
    config = parse("pipeline.train", argv)
    with lost_contact.exit_on_lost_contact("pipeline.train"):
        if config.dry_run:
            with exit_on_user_error("pipeline.train"):
                rehearse(config, train)
        elif summary := train(config):
            print_summary(summary)
    collectives.leave()


if __name__ == "__main__":
    main()
