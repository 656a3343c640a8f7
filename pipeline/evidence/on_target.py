"""Scores against a validation set, and what samples really do to its loss: the `target` form of the references."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.config.deepspeed_json import read_deepspeed_config
from pipeline.config.timing import Stopwatch
from pipeline.data.batch import IGNORE, Batch
from pipeline.data.prepared import load_split
from pipeline.data.samples import Samples
from pipeline.evidence.config import FidelityRun
from pipeline.evidence.references import Adam, StepEffect, target_at
from pipeline.influence.micro_batch import hold_validation
from pipeline.influence.scorer import SketchScorer


def target_of(config: FidelityRun, device: torch.device) -> list[Batch] | None:
    """`fidelity.target_sequences` of `data.reference_files`, in batches of `fidelity.batch_size`; None where scores are
    measured on their own batch."""
    count, size = config.fidelity.target_sequences, config.fidelity.batch_size
    if count is None:
        return None
    samples = Samples(load_split(config.data.prepared_dir, "reference"), config.seed, "sequence")
    return [samples.batch(first, min(size, count - first), device) for first in range(0, count, size)]


def hold_target(scorer: Any, model: nn.Module, target: list[Batch] | None) -> None:
    """Score against it from now on, where there is one and the scorer compares."""
    if target and isinstance(scorer, SketchScorer):
        hold_validation(scorer, model, target, Stopwatch(target[0].input_ids_BT.device))


def lookahead_scores(
    config: FidelityRun, model: PreTrainedModel, adam: Adam, target: list[Batch], batches: list[Batch]
) -> Iterator[Tensor]:
    """What estimator `lookahead` gives each sequence of each batch, (B,), in the model's precision.

    It is `StepEffect` with the parts changed: the target takes the step, at `influence.lookahead_step` of its rate and
    clipped as the engine clips, and the candidates' losses are looked at.
    """
    held = target_at(model, target)
    rate, dtype = adam.learning_rate * config.influence.lookahead_step, held.gradient_1P.dtype
    mean_P, square_P = adam.exp_avg_P.to(dtype), adam.exp_avg_sq_P.to(dtype)
    step = replace(adam, learning_rate=rate, exp_avg_P=mean_P, exp_avg_sq_P=square_P)
    limit = read_deepspeed_config(config).get("gradient_clipping", 1.0)  # DeepSpeed clips at 1 where the JSON is silent

    def clipped(weights_P: Tensor, gradient_P: Tensor) -> Tensor:
        norm = gradient_P.norm()
        return step(weights_P, gradient_P * (limit / norm) if limit and norm > limit else gradient_P)

    for batch in batches:
        effects_B = StepEffect(model, held.batch, held.gradient_1P, clipped, batch)(torch.ones(1, dtype=torch.bool))
        tokens_B = (batch.labels_BT != IGNORE).sum(1).cpu()
        yield effects_B * tokens_B.sum() / tokens_B.clamp(min=1)
