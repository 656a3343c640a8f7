"""Continue pre-training, and know at every step which samples help.

deepspeed --num_accelerators 2 --module pipeline.train --config launch/quickstart.yaml [--influence.estimator lli ...]
"""

import math
import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline import collectives, engine
from pipeline.checkpoint import Progress, find_checkpoint, identity_of, move_aside, publish, refuse_foreign
from pipeline.config import Config, exit_on_user_error, parse, read_deepspeed_config
from pipeline.data import Batch, Samples, UnitTable
from pipeline.estimator import Estimator
from pipeline.evaluate import evaluate_engine
from pipeline.export import finish
from pipeline.fingerprint import startup_identity
from pipeline.loss import Visitor, token_losses, weighted_mean
from pipeline.model import load_model
from pipeline.observe import Recorder, print_summary
from pipeline.policy import Decision, decide
from pipeline.preflight import rehearse
from pipeline.prepare import ensure_prepared, load_fingerprint, load_split
from pipeline.timing import Stopwatch


def train(config: Config, until: int | None = None) -> dict[str, Any] | None:
    """Run `config` from its start, or from its checkpoint, to `max_steps` or until a signal asks for a stop.

    `until` ends it earlier, as if it were done. Returns the summary of a run that is done, on rank 0. Collective.
    """
    end = until or config.max_steps
    with exit_on_user_error("pipeline.train"):
        ensure_prepared(config)
        device = engine.join_process_group()
        rank, world = collectives.rank(), collectives.world_size()
        collectives.agree(startup_identity(config))
        checkpoint = collectives.broadcast(find_checkpoint(config) if rank == 0 else None)
        deepspeed_config = read_deepspeed_config(config)
        if checkpoint:
            deepspeed_config = engine.config_to_load(checkpoint, identity_of(checkpoint)["engine"], deepspeed_config)
        samples = Samples(load_split(config.data.prepared_dir, "train"), config.seed, config.influence.unit)
        model = load_model(config.model, config.seed, deepspeed_config)
        timed = Stopwatch(device)
        estimator = Estimator(config.influence, model, config.seed, device, timed)
        ds_engine = engine.initialize(model, deepspeed_config)
        identity = {
            "seed": config.seed,
            "unit": config.influence.unit,
            "engine": engine.identity(ds_engine),
            "dataset": load_fingerprint(config.data.prepared_dir),
        }
        progress = Progress(0, 0, {}, {})
        if checkpoint:
            refuse_foreign(checkpoint, identity)
            progress = Progress(**engine.load_checkpoint(ds_engine, checkpoint, Progress.__annotations__))
            estimator.load_state_dict(progress.estimator)

    size = ds_engine.train_micro_batch_size_per_gpu()
    accumulation = ds_engine.gradient_accumulation_steps()
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

    def forward(batch: Batch, micro_batch: int, visit: Visitor | None = None) -> tuple[Tensor, Tensor | None]:
        """Loss of every position, and what `visit` keeps of the gradient at the logits."""
        _seed_dropout(config.seed, micro_batch, rank)
        logits_BTV = ds_engine(input_ids=batch.input_ids_BT, use_cache=False).logits
        return token_losses(logits_BTV, batch.labels_BT, visit)

    def score(batch: Batch, micro_batch: int) -> Tensor:
        """The forward that scores; returns the loss of every position."""
        with estimator.capture():
            losses_BT, feedback_NG = forward(batch, micro_batch, estimator.visit)
        estimator.add(batch, losses_BT.detach(), feedback_NG)
        return losses_BT

    def decide_together(step: int, group: int) -> tuple[UnitTable, Decision]:
        """On what was just scored: all ranks see all its units, in one gather, and decide alike."""
        scored = estimator.scores()
        with timed("decide"):
            units = UnitTable.gather(rank, scored, stop.requested)
            decision = decide(units.scores, units.tokens, units.finite, config.policy, step, config.seed, group)
            return units, decision

    if not checkpoint:
        hold_out()
    stop, unhealthy = StopSignal(), 0
    while progress.step < end and not stop.agreed and unhealthy < config.policy.stop_after_non_finite:
        step, first, learning_rate = progress.step + 1, progress.step * accumulation, ds_engine.get_lr()[0]
        healthy, skipped, disagreements = True, ds_engine.skipped_steps, 0
        with timed("step"):
            starts = [progress.position + m * size * world for m in range(accumulation)]
            batches = [samples.batch(start + rank * size, size, device) for start in starts]
            if config.influence.scope == "step":
                with timed("scoring forward"), torch.no_grad():
                    for m, batch in enumerate(batches):
                        score(batch, first + m)
                units_of_step, decision_of_step = decide_together(step, progress.step)

            for m, batch in enumerate(batches):
                if config.influence.scope == "step":
                    losses_BT, _ = forward(batch, first + m)
                    part = units_of_step.micro_steps == m
                    units, decision = units_of_step.of(part), decision_of_step.of(part)
                    alone = decide(
                        units.micro_scores, units.tokens, units.finite, config.policy, step, config.seed, first + m
                    )
                    disagreements += int(((alone.weights > 0) != (decision.weights > 0)).sum())
                else:
                    losses_BT = score(batch, first + m)
                    units, decision = decide_together(step, first + m)

                own = units.ranks == rank
                if not units.finite.all():
                    # Weight 0 is not enough: 0 * NaN = NaN. Train on the same shapes without what was in them.
                    losses_BT, _ = forward(batch.blank(~units.finite[own]), first + m)
                    _refuse_broken_weights(losses_BT, step)
                weights_BT = batch.spread_over_tokens(decision.weights[own])
                kept_tokens = float((decision.weights * units.tokens).sum())
                ds_engine.backward(weighted_mean(losses_BT, weights_BT, kept_tokens, world))
                gradient_norm = engine.take_step(ds_engine)

                if recorder:
                    where = {"step": step, "micro_step": m, "position": starts[m]}
                    recorder.micro_batch(where, size * world, units, decision)
                healthy &= bool(units.finite.all())
                stop.agreed |= units.stop
        progress.step, progress.position = step, starts[-1] + size * world
        unhealthy = 0 if healthy and ds_engine.skipped_steps == skipped else unhealthy + 1
        if recorder:
            scalars = {
                "train/lr": learning_rate,
                "train/grad_norm": math.nan if gradient_norm is None else gradient_norm,
                "train/skipped_steps": ds_engine.skipped_steps,
                "train/memory_gb": engine.peak_memory() / 1e9,
            }
            if config.influence.scope == "step":
                scalars["influence/scope_disagreement"] = disagreements / len(units_of_step.scores)
            recorder.step(step, scalars, timed.read(), estimator.norms())
        if config.observe.eval_every_steps and step % config.observe.eval_every_steps == 0 and not stop.agreed:
            hold_out()
        ending = step == end or stop.agreed or unhealthy == config.policy.stop_after_non_finite
        if step % config.checkpoint.every_steps == 0 or ending:
            progress.estimator = estimator.state_dict()
            checkpoint = Path(config.run_dir, "checkpoints", f"step-{step}")
            engine.save_checkpoint(ds_engine, checkpoint, vars(progress))
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


def _seed_dropout(seed: int, micro_batch: int, rank: int) -> None:
    """Draws are a function of where the run is, so a resumed run draws as an unbroken one."""
    torch.manual_seed(int(np.random.SeedSequence([seed, micro_batch, rank]).generate_state(1)[0]))


def _refuse_broken_weights(losses_BT: Tensor, step: int) -> None:
    """Collective: all ranks raise or none does."""
    if collectives.all_reduce_sum((~losses_BT.isfinite()).sum()) > 0:
        raise FloatingPointError(
            f"step {step}: the loss is not finite even without the samples in question, so the weights are broken; "
            "nothing was updated. The newest checkpoint is from before: lower the learning rate and resume"
        )


def main(argv: list[str] | None = None) -> None:
    config = parse("pipeline.train", argv)
    with collectives.exit_on_lost_contact("pipeline.train"):
        if config.dry_run:
            with exit_on_user_error("pipeline.train"):
                rehearse(config, train)
        elif summary := train(config):
            print_summary(summary)
    collectives.leave()


if __name__ == "__main__":
    main()
