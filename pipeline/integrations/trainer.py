"""`transformers.Trainer` with DeepSpeed, its optimizer step replaced by one that scores and drops."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer
from transformers.trainer_utils import has_length

from pipeline.config.schema_influence import InfluenceConfig, PolicyConfig
from pipeline.engine import collectives
from pipeline.record.outcome import Outcome
from pipeline.training.influence_engine import InfluenceEngine

STATE_NAME = "influence.pt"
"""In each of Trainer's checkpoints: what scoring goes on from."""


class InfluenceTrainer(Trainer):
    """Takes every optimizer step with an `InfluenceEngine`, over the gradient_accumulation_steps micro-batches of it.

        arguments = TrainingArguments(deepspeed="ds.json", ...)
        InfluenceTrainer(model, arguments, train_dataset=rows, influence=..., policy=...).train()

    Data, schedule, evaluation, checkpoints and callbacks are Trainer's; `reference` is `InfluenceEngine`'s, and
    `args.seed` its seed. The loss that is logged is `Outcome.loss`, that of what was kept; beside it stand
    `influence/removed`, the units removed in a step, and `influence/removed_fraction`, of all units, both means since
    the last log. `ghost`, and `passes: score_first`, need "managed_gradient_accumulation": false in the DeepSpeed JSON.

    Batches may be smaller than per_device_train_batch_size, but a step takes gradient_accumulation_steps of them: an
    epoch that ends with fewer is refused before the first step, if its length is known. If not, these are left out.

    Raises ValueError where Trainer has no DeepSpeed, or where what is asked for does not go together: the loss is that
    of a causal LM, computed here, so what would change it is refused too.
    """

    def __init__(
        self,
        *args: Any,
        influence: InfluenceConfig | None = None,
        policy: PolicyConfig | None = None,
        reference: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if not self.is_deepspeed_enabled:
            raise ValueError("InfluenceTrainer trains with DeepSpeed: give TrainingArguments(deepspeed=...)")
        seen, ranks = self.args.world_size, collectives.world_size()
        if seen != ranks:
            raise ValueError(
                f"Trainer sees {seen} of {ranks} ranks, and each would train by itself: on a CPU, give "
                "TrainingArguments(use_cpu=True)"
            )
        if given := [name for name in _NO_PART_IN_IT if getattr(self, name) is not None]:
            raise ValueError(f"InfluenceTrainer computes the loss of a causal LM itself, without {', '.join(given)}")
        self._set_signature_columns_if_needed()
        # These columns are not the model's and must stay.
        self._signature_columns += ["unit_ids", "metadata"]  # type: ignore[operator]
        if policy and policy.rule == "top":
            raise ValueError(
                "policy.rule 'top' reads more than Trainer hands over: choose another, or use InfluenceEngine itself"
            )
        if policy and policy.rule == "mixture":
            raise ValueError("policy.rule 'mixture' moves the order of pipeline.train's own data: choose another rule")
        self._influence, self._policy, self._reference = influence, policy or PolicyConfig(), reference
        self.influence_engine: InfluenceEngine | None = None
        self.outcome: Outcome | None = None
        """Of the last optimizer step."""

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """With DeepSpeed's engine, made and loaded by Trainer, ours around it."""
        batches = len(train_dataloader) if has_length(train_dataloader) else 0
        steps, rest = divmod(batches, self.args.gradient_accumulation_steps)
        if rest and max_steps > steps:
            raise ValueError(
                f"an epoch has {batches} batches on each rank, and the last of its steps would have only {rest} of its "
                f"{self.args.gradient_accumulation_steps}: choose other gradient_accumulation_steps, or leave the "
                f"samples of {rest} batches out of train_dataset"
            )
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        engine = InfluenceEngine(prepared[0], self._influence, self._policy, self.args.seed, self._reference)
        if resume_from_checkpoint:
            path = Path(resume_from_checkpoint, STATE_NAME)
            here = collectives.rank() == 0 and path.is_file()
            state = collectives.broadcast(torch.load(path, weights_only=True) if here else None)
            if state is None:
                raise ValueError(f"resume_from_checkpoint: no file {path}: no InfluenceTrainer wrote this checkpoint")
            for what in engine.load_state_dict(state):
                logging.getLogger(__name__).warning("resume_from_checkpoint: %s", what)
        self.influence_engine, self._unhealthy = engine, 0
        self._held: list[Mapping[str, Any]] = []
        self._removed: list[tuple[int, int]] = []  # of how many, in each step since the last log
        return prepared

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.influence_engine and collectives.rank() == 0:
            torch.save(self.influence_engine.state_dict(), Path(output_dir, STATE_NAME))

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The micro-batches of a step, or none."""
        self._held = []
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        return (batches if len(batches) == self.args.gradient_accumulation_steps else []), items

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Holds a micro-batch until it is the last of its step, which is then taken. Returns the loss of the step then,
        and 0 before: Trainer adds them up."""
        engine = self.influence_engine
        assert engine is not None
        self._held.append(self._prepare_inputs(inputs))
        if len(self._held) < self.args.gradient_accumulation_steps:
            return torch.zeros((), device=self.args.device)
        model.train()
        self.outcome = outcome = engine.train_step(self._held)
        engine.timed.read()  # or its events pile up
        self._removed.append((outcome.removed, sum(part.scored for part in outcome.micro_batches)))
        self._unhealthy = 0 if outcome.healthy else self._unhealthy + 1
        if self._unhealthy == self._policy.stop_after_non_finite:
            raise FloatingPointError(
                f"stopped after step {outcome.step}: in {self._unhealthy} steps in a row a loss, score or gradient was "
                "not finite (policy.stop_after_non_finite); lower the learning rate and resume from a checkpoint"
            )
        return torch.tensor(outcome.loss, device=self.args.device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._removed:
            removed, units = map(sum, zip(*self._removed, strict=True))
            logs |= {"influence/removed": removed / len(self._removed), "influence/removed_fraction": removed / units}
            self._removed = []
        super().log(logs, start_time)


_NO_PART_IN_IT = ("compute_loss_func", "label_smoother", "neftune_noise_alpha")
"""Of the loss: what Trainer has beside the model's own."""
