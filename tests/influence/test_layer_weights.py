"""Layers weighed in the scores of real runs on two ranks, against loops over steps and layers in one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from pipeline.config.schema import Config
from pipeline.data.batch import IGNORE
from pipeline.data.prepared import load_split
from pipeline.data.samples import Samples
from pipeline.record import ledger
from pipeline.tasks.causal_lm import token_losses
from pipeline.train import train
from tests.reference.influence import layer_inputs, token_pair_moments
from tests.runs import ADAM, config_of, deepspeed_json, run

CPU = torch.device("cpu")
DECAY = 0.6
STILL = {"type": "AdamW", "params": {"lr": 0.0, "betas": [0.9, 0.95], "weight_decay": 0.0, "torch_adam": True}}
"""Its second moments move, the weights do not."""


def weighed(corpus: Path, place: Path, model: Path, stage: int, **options: Any) -> Config:
    optimizer = options.pop("optimizer", STILL)
    options = {
        "max_steps": 4,
        "influence__estimator": "lai",
        "influence__include_self": False,
        "influence__layer_decay": DECAY,
        "influence__adam_every_steps": 1,
        "policy__action": "observe",
        "data__reference_files": corpus / "documents.jsonl",
        "data__prepared_dir": corpus / "prepared_reference",
    } | options
    return config_of(
        corpus, place / "run", model, deepspeed_json(place / "ds.json", stage, optimizer=optimizer), **options
    )


def by_loops(config: Config) -> list[Tensor]:
    """What every step's scores must be: weights from the steps before it, every moment whole, float64."""
    model = AutoModelForCausalLM.from_pretrained(config.model.name_or_path).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | Conv1D)]
    samples, chosen = (
        Samples(load_split(config.data.prepared_dir, split), config.seed, "sequence")
        for split in ("train", "reference")
    )
    squares: list[Tensor] = []
    scores = []
    for step in range(config.max_steps):
        weights = torch.ones(len(layers), dtype=torch.float64)
        if squares:
            shares = torch.tensor([DECAY**age for age in range(len(squares))][::-1], dtype=torch.float64)
            weights = 1 / sum(s * square for s, square in zip(shares / shares.sum(), squares, strict=True))
            if config.influence.layer_weights == "gains":
                sums = [optimizer.state[layer.weight]["exp_avg_sq"].sum() for layer in layers]
                weights = weights * torch.stack(sums)
        weights = weights / weights.mean()
        batch = samples.batch(4 * step, 4, CPU)
        moments = token_pair_moments(model, batch, weights)
        if config.influence.reference == "validation":
            held = chosen.batch(
                config.influence.validation_sequences * step, config.influence.validation_sequences, CPU
            )
            scores.append(moments @ token_pair_moments(model, held, weights).sum(0))
        else:
            scores.append(torch.stack([moment @ (moments.sum(0) - moment) for moment in moments]))
        squares.append(torch.stack([x.square().sum(2).mean() for x in layer_inputs(model, batch)[0]]))
        losses, _ = token_losses(model(input_ids=batch.input_ids_BT).logits, batch.labels_BT)
        optimizer.zero_grad()
        (losses.sum() / (batch.labels_BT != IGNORE).sum()).backward()
        optimizer.step()
    return scores


@pytest.mark.parametrize(
    ("kind", "weights", "reference", "stage"),
    [
        ("llama", "inverse_norm", "batch", 0),
        ("gpt_neo", "inverse_norm", "validation", 3),
        ("gpt2", "gains", "batch", 2),
        ("llama", "gains", "validation", 3),
    ],
)
def test_layers_are_weighed_by_the_means_of_the_steps_before(
    ranks, corpus, tiny_model, tmp_path, kind, weights, reference, stage
):
    """Catches the means of one rank, of this micro-batch or of a validation set's, another decay,
    q, k and v that count once, and Conv1D's transposed moments."""
    config = weighed(
        corpus,
        tmp_path,
        tiny_model(kind),
        stage,
        influence__layer_weights=weights,
        influence__reference=reference,
        influence__validation_sequences=3,
        influence__sketch="none",
    )
    ranks(run, config)
    got = torch.from_numpy(ledger.read(tmp_path / "run")["score"].to_numpy().reshape(4, 4).copy())
    for step, (found, expected) in enumerate(zip(got, by_loops(config), strict=True)):
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max(), step
    plain = weighed(
        corpus,
        tmp_path / "plain",
        tiny_model(kind),
        stage,
        influence__reference=reference,
        influence__validation_sequences=3,
        influence__sketch="none",
    )
    ranks(run, plain)
    unweighed = torch.from_numpy(ledger.read(tmp_path / "plain" / "run")["score"].to_numpy().reshape(4, 4).copy())
    assert torch.allclose(unweighed[0], got[0])  # before anything is known
    ratio = got[3] / unweighed[3]
    assert (ratio / ratio.mean() - 1).abs().max() > 1e-2  # not one factor for all


def stop_and_resume(config: Config, other: Config) -> None:
    train(config, until=3)
    train(other)


@pytest.mark.parametrize(("estimator", "weights"), [("lai", "gains"), ("residual", "inverse_norm")])
def test_a_resumed_run_weighs_as_an_unbroken_one(ranks, corpus, tiny_model, tmp_path, estimator, weights):
    """Catches means, or what was read of the optimizer, that a resumed run forgets."""
    common = {
        "optimizer": ADAM,
        "max_steps": 5,
        "influence__estimator": estimator,
        "influence__layer_weights": weights,
        "influence__adam_every_steps": 4,
        "policy__action": "drop",
        "policy__rule": "rate",
        "policy__rate": 0.25,
    }
    ranks(run, weighed(corpus, tmp_path / "whole", tiny_model("llama"), 2, **common))
    broken = weighed(corpus, tmp_path / "broken", tiny_model("llama"), 2, **common)
    resumed = weighed(corpus, tmp_path / "broken", tiny_model("llama"), 2, **common, resume="auto")
    ranks(stop_and_resume, broken, resumed)
    assert ledger.read(tmp_path / "whole" / "run").equals(ledger.read(tmp_path / "broken" / "run"))
