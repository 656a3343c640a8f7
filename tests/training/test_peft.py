"""Runs that train an adapter, on real ranks: scores, resume, what is exported, and what goes on from it."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipeline.data.prepared import load_split
from pipeline.data.samples import Samples
from pipeline.engine.checkpoint_files import checkpoint_weights, load_weights
from pipeline.models.load import load_model
from pipeline.record import ledger
from tests.models.test_adapters import config_file
from tests.runs import ADAM, CPU, config_of, deepspeed_json, run
from tests.training.test_kinds import per_sample_gradients
from tests.training.test_partly_trained import run_until

STEPS = 3


@pytest.mark.parametrize("stage", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_an_adapter_is_trained_scored_resumed_and_exported(ranks, corpus, tiny_model, tmp_path, stage):
    """Catches an adapter that each rank draws for itself, a base in the checkpoint's second moments or moved, and an
    export that does not fit its base."""
    base = tiny_model("llama")
    path = config_file(tmp_path / "peft", target_modules=["q_proj", "down_proj"])
    options = {
        "model__peft": path,
        "max_steps": STEPS,
        "influence__estimator": "ghost",
        "influence__sketch": "none",
        "policy__action": "observe",
    }
    settings = deepspeed_json(tmp_path / "ds.json", stage, optimizer=ADAM)
    unbroken = config_of(corpus, tmp_path / "unbroken", base, settings, **options)
    ranks(run, unbroken)
    broken = config_of(corpus, tmp_path / "broken", base, settings, **options, resume="auto")
    ranks(run_until, broken, 2)
    ranks(run_until, broken, STEPS)
    rows = ledger.read(tmp_path / "unbroken")
    assert ledger.read(tmp_path / "broken")["score"].equals(rows["score"])
    exported, again = (
        load_file(tmp_path / name / "model" / "adapter_model.safetensors") for name in ("unbroken", "broken")
    )
    assert len(exported) == 2 * 4
    assert all(torch.equal(again[name], weight) for name, weight in exported.items())
    assert all(weight.abs().max() > 0 for weight in exported.values())  # B begins at zero

    checkpoint = tmp_path / "unbroken" / "checkpoints" / f"step-{STEPS}"
    trained = load_model(unbroken.model, unbroken.seed)
    load_weights(trained, checkpoint)
    before = dict(AutoModelForCausalLM.from_pretrained(base).named_parameters())
    saved = checkpoint_weights(checkpoint)
    assert all(torch.equal(saved[_wrapped(name, saved)], weight) for name, weight in before.items())
    batch = Samples(load_split(unbroken.data.prepared_dir, "train"), unbroken.seed, "sequence").batch(0, 4, CPU)
    with torch.no_grad():
        expected = trained(batch.input_ids_BT).logits
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "unbroken" / "model")
        assert torch.allclose(loaded(batch.input_ids_BT).logits, expected, atol=1e-5)
        merged = loaded.merge_and_unload()
        assert torch.allclose(merged(batch.input_ids_BT).logits, expected, atol=1e-4)

    # Its weights are gone on from, and scored as autograd has them.
    onward = config_of(
        corpus,
        tmp_path / "onward",
        base,
        settings,
        **options | {"model__peft": tmp_path / "unbroken" / "model", "max_steps": 1},
    )
    ranks(run, onward)
    model = load_model(onward.model, 0)
    gradients = per_sample_gradients(model, batch)
    assert gradients.shape[1] == sum(weight.numel() for weight in exported.values())
    expected = (gradients @ gradients.T).sum(1)
    found = torch.tensor(ledger.read(tmp_path / "onward")["score"].to_pylist(), dtype=torch.float64)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def _wrapped(name: str, saved: dict[str, torch.Tensor]) -> str:
    module, _, kind = name.rpartition(".")
    return name if name in saved else f"{module}.base_layer.{kind}"
