"""Single tokens scored and dropped, on two real ranks, against one plain process with autograd."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from transformers import AutoModelForCausalLM

from pipeline.config.deepspeed_json import read_deepspeed_config
from pipeline.config.schema import Config
from pipeline.config.schema_influence import InfluenceConfig, PolicyConfig
from pipeline.data.batch import IGNORE
from pipeline.data.prepared import load_split
from pipeline.data.samples import Samples
from pipeline.evidence.invariance import invariance
from pipeline.evidence.ledger_check import check_ledger
from pipeline.evidence.runs import evidence_of, read_run
from pipeline.influence.table import check
from pipeline.record import ledger
from pipeline.tasks.causal_lm import token_losses
from tests.runs import ADAM, LEARNING_RATE, config_of, deepspeed_json, largest_difference, run, weights
from tests.seams import around_forward

RATE = 0.3
COMMON = {"influence__unit": "token", "policy__rule": "rate", "policy__rate": RATE, "max_steps": 2}


def by_token(corpus: Path, directory: Path, model: Path, stage: int = 2, **options: Any) -> Config:
    keys = ("micro", "accumulation", "optimizer")
    deepspeed = {key: options.pop(key) for key in keys if key in options}
    settings = deepspeed_json(directory / "ds.json", stage, **deepspeed)
    return config_of(corpus, directory / "run", model, settings, **COMMON | {"influence__estimator": "loss"} | options)


def plain_training(config: Config, accumulation: int, size: int) -> tuple[dict[str, Tensor], list[list[float]], float]:
    """One process, autograd and SGD: of every global micro-batch the tokens of the highest losses go, a loop says
    which. Returns the weights, the share of every sequence that is kept, and the last step's loss."""
    model = AutoModelForCausalLM.from_pretrained(config.model.name_or_path, dtype=torch.float32).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    samples = Samples(load_split(config.data.prepared_dir, "train"), config.seed, "sequence")
    shares, losses_of_step, position = [], [], 0
    for step in range(config.max_steps):
        losses_of_step = []
        for m in range(accumulation):
            batch = samples.batch(position, size, torch.device("cpu"))
            losses, _ = token_losses(model(input_ids=batch.input_ids_BT).logits, batch.labels_BT)
            labelled = [tuple(place) for place in (batch.labels_BT != IGNORE).nonzero().tolist()]
            expected = RATE * len(labelled)
            chance = np.random.default_rng([config.seed, step * accumulation + m]).random()
            gone = sorted(labelled, key=lambda place: -losses[place].item())[: int(expected) + (chance < expected % 1)]
            kept = [losses[place] for place in labelled if place not in set(gone)]
            loss = torch.stack(kept).mean()
            losses_of_step.append(loss.item())
            (loss / accumulation).backward()
            for row in range(size):
                of_row = [place for place in labelled if place[0] == row]
                shares.append([len([place for place in of_row if place not in set(gone)]) / len(of_row), len(of_row)])
            position += size
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.named_parameters()), shares, float(np.mean(losses_of_step))


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        (0, {"accumulation": 2}),
        pytest.param(2, {"accumulation": 2, "influence__passes": "score_first"}, marks=pytest.mark.slow),
        (3, {"accumulation": 2, "influence__passes": "score_first"}),
    ],
)
def test_the_weights_are_those_of_training_on_what_is_left(ranks, corpus, tiny_model, tmp_path, stage, options):
    """Catches a threshold of one rank's tokens, weights on other positions than those scored, a mean over all, and a
    loss in TensorBoard of what was not trained on."""
    config = by_token(corpus, tmp_path, tiny_model("llama"), stage, **options)
    ranks(run, config)
    rows = ledger.read(config.run_dir).to_pandas()
    after, shares, loss = plain_training(config, accumulation=2, size=4)
    assert rows["weight"].min() > 0
    assert rows["weight"].max() < 1
    assert rows["weight"].nunique() > 4
    np.testing.assert_allclose(rows["weight"], [share for share, _ in shares], rtol=1e-6)
    assert set(rows["reason"]) == {"rate"}
    assert rows["kept"].all()
    assert largest_difference(weights(tiny_model("llama")), after) > 1e-2
    assert largest_difference(after, weights(Path(config.run_dir, "model"))) < 1e-5
    assert check_ledger(Path(config.run_dir))[1] == []
    board = EventAccumulator(str(Path(config.run_dir, "tensorboard"))).Reload()
    assert board.Scalars("train/loss")[-1].value == pytest.approx(loss, abs=1e-5)
    assert board.Scalars("influence/removed_fraction")[-1].value == pytest.approx(RATE, abs=0.01)

    evidence = evidence_of(read_run(Path(config.run_dir)))
    tokens = sum(count for _, count in shares)
    assert evidence["units"] == tokens
    assert evidence["removed"] == round(sum((1 - share) * count for share, count in shares))
    assert evidence["removed"] / tokens == pytest.approx(RATE, abs=0.01)


@pytest.mark.parametrize(
    "options",
    [
        {"influence__estimator": "random"},
        {
            "influence__estimator": "lookahead",
            "influence__reference": "validation",
            "influence__passes": "score_first",
            "influence__scope": "step",
            "optimizer": ADAM,
        },
    ],
    ids=lambda options: options["influence__estimator"],
)
def test_two_ranks_decide_as_one(ranks, one_rank, corpus, tiny_model, tmp_path, options):
    """Of a step's 8 sequences. Catches a rank that decides on its own tokens, or in its own order."""
    if options["influence__estimator"] == "lookahead":
        files = {"data__reference_files": corpus / "documents.jsonl", "data__allow_overlap": True}
        options = options | files | {"data__prepared_dir": tmp_path / "prepared"}
    two = by_token(corpus, tmp_path / "two", tiny_model("llama"), micro=2, accumulation=2, **options)
    one = by_token(corpus, tmp_path / "one", tiny_model("llama"), micro=4, accumulation=2, **options)
    ranks(run, two)
    one_rank(run, one)
    ours, theirs = (ledger.read(config.run_dir).to_pandas() for config in (two, one))
    assert ours["weight"].nunique() > 4
    tokens = ours["tokens"]
    assert ((ours["weight"] - theirs["weight"]).abs() * tokens).max() < 1.5  # a token at the boundary may differ
    assert ((1 - ours["weight"]) * tokens).sum() == pytest.approx(RATE * tokens.sum(), abs=2)
    if options["influence__estimator"] == "random":
        pairs = [weights(Path(config.run_dir, "model")) for config in (two, one)]
        assert largest_difference(*pairs) < 1e-5


def test_a_sequence_that_is_not_finite_loses_all_its_tokens(ranks, corpus, tiny_model, tmp_path):
    """Catches NaN in the ranking of all others, and 0 x NaN in the gradient."""
    config = by_token(corpus, tmp_path, tiny_model("llama"), max_steps=1)
    ranks(run_with_one_broken, config)
    rows = ledger.read(config.run_dir).to_pandas()
    assert rows["reason"].tolist() == ["non_finite", "rate", "rate", "rate"]
    assert rows["weight"][0] == 0
    assert not rows["kept"][0]
    left = rows[1:]
    assert ((1 - left["weight"]) * left["tokens"]).sum() == pytest.approx(RATE * left["tokens"].sum(), abs=1)
    assert all(tensor.isfinite().all() for tensor in weights(Path(config.run_dir, "model")).values())


def run_with_one_broken(config: Config) -> None:
    """The first sequence of all, the first row of rank 0's first forward, has logits that are not finite."""
    forwards = []

    def break_it(arguments: dict[str, Any], output: Any) -> Any:
        forwards.append(None)
        if len(forwards) == 1 and torch.distributed.get_rank() == 0:
            output.logits = output.logits.clone()
            output.logits[0] = torch.nan
        return output

    with around_forward(break_it):
        run(config)


def test_what_single_tokens_do_not_go_with_is_refused_by_name(corpus, tiny_model, tmp_path):
    config = by_token(corpus, tmp_path, tiny_model("llama"))
    with pytest.raises(ValueError, match="leaves no row for each decision in the ledger"):
        invariance(config, steps=1, only="", timeout=60)
    settings = read_deepspeed_config(config)
    for influence, policy, message in (
        ({"estimator": "lai"}, {}, "'token' is not for estimator 'lai'.*choose loss or random or"),
        ({"estimator": "ghost"}, {}, "'token' is not for estimator 'ghost'"),
        ({}, {"rule": "top", "pool": 2}, "set influence.unit to sequence"),
        ({"score_prefix": 0.5, "passes": "score_first"}, {}, "set influence.unit to sequence"),
    ):
        with pytest.raises(ValueError, match=message):
            check(
                InfluenceConfig(**{"unit": "token", "estimator": "loss"} | influence), PolicyConfig(**policy), settings
            )
    check(InfluenceConfig(unit="token", estimator="none"), PolicyConfig(), settings)  # the arm to compare with
