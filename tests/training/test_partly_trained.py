"""Runs in which most of the model is frozen, on real ranks at every ZeRO stage."""

import pytest
import torch

from pipeline.config.schema import Config
from pipeline.data.prepared import load_split
from pipeline.data.samples import Samples
from pipeline.engine.checkpoint_files import checkpoint_adam, checkpoint_weights
from pipeline.models.load import load_model
from pipeline.record import ledger
from pipeline.train import train
from tests.runs import ADAM, CPU, config_of, deepspeed_json, largest_difference, run, weights
from tests.training.test_kinds import per_sample_gradients

TRAINED = ["*.layers.1.*_proj.weight", "model.layers.1.*norm*"]


def run_until(config: Config, until: int) -> None:
    train(config, until)


def is_trained(name: str) -> bool:
    return ".layers.1." in name


@pytest.mark.parametrize("stage", [0, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 2)), 3])
def test_what_is_frozen_is_neither_scored_nor_moved_nor_lost(ranks, corpus, tiny_model, tmp_path, stage):
    """Catches frozen parameters handed to the optimizer, left out of a checkpoint or of the export, or asked for their
    second moments; and a resume that does not go on as an unbroken run."""
    settings = deepspeed_json(tmp_path / "ds.json", stage, optimizer=ADAM)
    options = {
        "model__trainable": TRAINED,
        "max_steps": 3,
        "influence__estimator": "ghost",
        "influence__precondition": "adam_state",
        "influence__adam_every_steps": 1,
        "influence__sketch": "none",
        "policy__rule": "rate",
        "policy__rate": 0.3,
    }
    unbroken = config_of(corpus, tmp_path / "unbroken", tiny_model("llama"), settings, **options)
    ranks(run, unbroken)
    broken = config_of(corpus, tmp_path / "broken", tiny_model("llama"), settings, **options, resume="auto")
    ranks(run_until, broken, 2)
    ranks(run_until, broken, 3)
    for name in ("score", "kept"):
        assert ledger.read(tmp_path / "broken")[name].equals(ledger.read(tmp_path / "unbroken")[name])
    before, after = weights(tiny_model("llama")), weights(tmp_path / "unbroken" / "model")
    assert largest_difference(after, weights(tmp_path / "broken" / "model")) == 0
    assert after.keys() == before.keys()
    assert {name for name in after if not torch.equal(after[name], before[name])} == set(filter(is_trained, after))
    checkpoint = tmp_path / "unbroken" / "checkpoints" / "step-3"
    saved = checkpoint_weights(checkpoint)
    assert all(torch.equal(saved[name], weight) for name, weight in after.items())
    adam = checkpoint_adam(checkpoint)
    assert adam is not None
    assert adam.keys() == set(filter(is_trained, after))
    # The first step's scores, before there are second moments, from one plain process.
    model = load_model(unbroken.model, 0)
    batch = Samples(load_split(unbroken.data.prepared_dir, "train"), unbroken.seed, "sequence").batch(0, 4, CPU)
    gradients = per_sample_gradients(model, batch)
    assert gradients.shape[1] == sum(p.numel() for p in model.parameters() if p.requires_grad and p.dim() == 2)
    expected = (gradients @ gradients.T).sum(1)
    first = ledger.read(tmp_path / "unbroken").slice(0, 4)
    assert set(first["step"].to_pylist()) == {1}
    found = torch.tensor(first["score"].to_pylist(), dtype=torch.float64)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
