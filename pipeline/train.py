"""Continue pre-training, and know at every step which samples help.

deepspeed --num_accelerators 2 --module pipeline.train --config launch/quickstart.yaml [--influence.estimator lli ...]
python -m pipeline.train --model.name_or_path MODEL --data.train_files FILES      what else it takes, it says
"""

if __name__ == "__main__":
    from pipeline.config.launcher import say

    say("pipeline.train has started; importing PyTorch and DeepSpeed takes seconds")

import signal
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.config import cli
from pipeline.config.cli import exit_on_refused_file, exit_on_user_error
from pipeline.config.ownership import owned
from pipeline.config.schema import CheckpointConfig, Config
from pipeline.engine import collectives, deepspeed_engine, launch
from pipeline.engine.agreement import startup_identity
from pipeline.engine.checkpoints import publish, refuse_foreign_run_dir
from pipeline.engine.due import Due, held_out_losses
from pipeline.engine.lost_contact import exit_on_lost_contact
from pipeline.record.summary import print_summary
from pipeline.training.defaults import defaults
from pipeline.training.dry_run import dry_run
from pipeline.training.evaluation import evaluate_engine
from pipeline.training.export import finish
from pipeline.training.rules import check_run
from pipeline.training.start import Run, begin


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
        run = begin(config, end)
    ds_engine, engine, recorder = run.ds_engine, run.engine, run.recorder
    progress, checkpoint = run.progress, run.checkpoint
    rank, world, device = collectives.rank(), collectives.world_size(), launch.device()

    def hold_out() -> None:
        """Held-out figures of the model as it is, kept for the end and shown in TensorBoard."""
        if figures := evaluate_engine(ds_engine, config):
            progress.evaluations[engine.step] = figures
            if recorder:
                recorder.evaluation(figures, engine.step)

    if not checkpoint:
        hold_out()
    stop, due, unhealthy = StopSignal(), Due(config.checkpoint), 0
    while engine.step < end and not stop.agreed and unhealthy < config.policy.stop_after_non_finite:
        learning_rate = ds_engine.get_lr()[0]
        batches = run.samples.micro_batches(engine.position, rank, world, engine.size, engine.micro_batches, device)
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
                "train/memory_held_gb": deepspeed_engine.held_memory() / 1e9,
            }
            recorder.step(outcome, engine.size * world, scalars, seconds)
        if run.mixing:
            run.mixing.move(outcome, engine.position)
            if recorder:
                recorder.mixture(step, run.mixing.piece, run.mixing.sources)
        stop.agreed |= outcome.stop
        unhealthy = 0 if outcome.healthy else unhealthy + 1
        every = config.observe.eval_every_steps
        judged = step == end and config.checkpoint.best_of is not None
        if (judged or (every and step % every == 0)) and not stop.agreed:
            hold_out()
        ending = step == end or stop.agreed or unhealthy == config.policy.stop_after_non_finite
        if due(step, progress.evaluations) or ending:
            progress.influence = engine.state_dict() | ({"mixture": run.mixing.state_dict()} if run.mixing else {})
            checkpoint = Path(config.run_dir, "checkpoints", f"step-{step}")
            deepspeed_engine.save_checkpoint(ds_engine, checkpoint, vars(progress))
            collectives.on_rank_0(partial(keep, run, step, checkpoint, config.checkpoint))

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


def keep(run: Run, step: int, checkpoint: Path, rules: CheckpointConfig) -> None:
    """Make the checkpoint of `step` and the rows up to it what a resume goes on from; remove those that `rules` do not
    keep. On rank 0; a large checkpoint takes minutes to remove.

    Rows first, the checkpoint's name last: a kill in between leaves rows that a resume discards; the other way round it
    would lose them.
    """
    assert run.recorder is not None
    run.recorder.commit(step)
    losses = held_out_losses(run.progress.evaluations, rules.best_of)
    publish(checkpoint, run.identity, rules.keep, run.settings, losses)


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
    return cli.parse(prog, argv, Config, check_run, fill=defaults)


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
