"""Scoring first and training on what is kept only, on two real ranks, against the one-pass run and plain autograd."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.config.schema import Config
from pipeline.data.prepared import load_split
from pipeline.data.samples import Samples
from pipeline.record import ledger
from pipeline.train import train
from tests.runs import config_of, deepspeed_json, largest_difference, run, weights
from tests.seams import around_forward

DROP_HALF = {"policy__rule": "rate", "policy__rate": 0.5, "influence__include_self": False}


@pytest.fixture
def score_first(corpus, tiny_model, tmp_path) -> Callable[..., Config]:
    """The config of a run that scores first; `passes="one"` is what it is compared with."""

    def make(passes: str = "score_first", kind: str = "llama", stage: int = 2, **options: Any) -> Config:
        deepspeed = {key: options.pop(key) for key in ("micro", "accumulation", "bf16") if key in options}
        settings = deepspeed_json(tmp_path / f"{passes}.json", stage, **deepspeed)
        model = options.pop("model", None) or tiny_model(kind)
        return config_of(corpus, tmp_path / passes, model, settings, influence__passes=passes, **options)

    return make


def trained_rows(config: Config) -> list[int]:
    """How many sequences each forward with gradients had."""
    rows: list[int] = []

    def count(arguments: dict[str, Any], output: Any) -> Any:
        if output.logits.requires_grad:
            rows.append(len(arguments["input_ids"]))
        return output

    with around_forward(count):
        train(config)
    return rows


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        (0, {"accumulation": 2}),
        (1, {"accumulation": 2, "influence__scope": "step"}),
        (2, {"accumulation": 2, "influence__unit": "document"}),
        pytest.param(3, {"accumulation": 2}, marks=pytest.mark.slow),
        pytest.param(
            3,
            {"accumulation": 2, "kind": "gpt_neo", "model__activation_checkpointing": True},
            marks=pytest.mark.slow,
        ),
        (2, {"micro": 1, "accumulation": 3, "policy__rate": 0.3, "influence__include_self": True}),
        (2, {"policy__action": "reweight"}),
        (2, {"influence__precondition": "adam_ema"}),
        (2, {"influence__estimator": "residual"}),
        (2, {"influence__estimator": "loss"}),
    ],
)
def test_decisions_and_weights_are_those_of_one_pass(ranks, score_first, stage, options):
    """Catches a denominator of what one rank or one micro-batch trained on, units whose weights went to others, and a
    rank that misses a backward."""
    options = DROP_HALF | {"max_steps": 3, "stage": stage} | options
    configs = [score_first(passes, **options) for passes in ("score_first", "one")]
    for config in configs:
        ranks(run, config)
    first, one = (ledger.read(config.run_dir).to_pandas() for config in configs)
    assert (~one["kept"]).sum() > 2
    assert (first["kept"] == one["kept"]).all()
    assert (first["reason"] == one["reason"]).all()
    for column in ("score", "loss", "weight"):
        np.testing.assert_allclose(first[column], one[column], rtol=0, atol=1e-4 * one[column].abs().max())
    before = weights(Path(configs[0].model.name_or_path))
    after = [weights(Path(config.run_dir, "model")) for config in configs]
    assert largest_difference(before, after[1]) > 1e-2
    assert largest_difference(*after) < 1e-5


def test_ranks_train_on_equally_many_and_on_nothing_that_is_dropped(ranks, score_first):
    """8 sequences a step, half dropped, wherever they were read. Catches a backward of what was dropped, and a rank
    that trains on all while the others wait."""
    config = score_first(accumulation=2, max_steps=8, **DROP_HALF)
    assert ranks(trained_rows, config) == [[2] * 8] * 2
    kept = ledger.read(config.run_dir).filter(pc.field("kept"))
    assert len(kept) == 32
    of_rank_0 = kept.filter(pc.field("rank") == 0)["step"].to_pylist()
    assert {of_rank_0.count(step) for step in range(1, 9)} != {2}


def test_where_nothing_is_kept_anywhere_the_weights_stay(ranks, score_first, tiny_model):
    config = score_first(stage=3, max_steps=2, policy__rule="rate", policy__rate=1.0, policy__max_drop_fraction=1.0)
    assert ranks(trained_rows, config) == [[1, 1], [1, 1]]
    assert ledger.read(config.run_dir)["kept"].to_pylist() == [False] * 8
    assert largest_difference(weights(tiny_model("llama")), weights(Path(config.run_dir, "model"))) == 0


@pytest.mark.parametrize("bad_rows", [1, 4])
def test_what_is_not_finite_is_not_trained_on(ranks, score_first, tiny_model, corpus, tmp_path, bad_rows):
    """Catches NaN in a gradient, also where all of a step are not finite and a blank takes their place."""
    batch = Samples(load_split(corpus / "prepared", "train"), 3, "sequence").batch(0, 4, torch.device("cpu"))
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    bad = batch.input_ids_BT[:bad_rows].unique()
    with torch.no_grad():
        model.model.embed_tokens.weight[bad[bad > 0]] = torch.nan
    model.save_pretrained(tmp_path / "broken")
    config = score_first(model=tmp_path / "broken", max_steps=1)
    ranks(run, config)
    rows = ledger.read(config.run_dir)
    assert rows["reason"].to_pylist()[:bad_rows] == ["non_finite"] * bad_rows
    after = weights(Path(config.run_dir, "model"))["model.layers.0.mlp.up_proj.weight"]
    assert after.isfinite().all()


def test_broken_weights_stop_all_ranks(ranks, score_first, tiny_model, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.inf)
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(AssertionError, match=r"FloatingPointError: step 1: .* the weights are broken"):
        ranks(run, score_first(model=tmp_path / "broken", max_steps=1))
