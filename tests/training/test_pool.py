"""Candidate pools on two real ranks, against plain autograd over what was kept and one rank alone."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from pipeline.config.deepspeed_json import read_deepspeed_config
from pipeline.config.schema import Config
from pipeline.data.batch import IGNORE
from pipeline.data.prepared import ensure_prepared, load_split
from pipeline.data.samples import Samples
from pipeline.engine.ahead import Ahead
from pipeline.engine.deepspeed_engine import full_state_dict, initialize
from pipeline.evidence.ledger_check import check_ledger
from pipeline.models.load import load_model
from pipeline.models.reference_model import refuse_other_tokenizer
from pipeline.record import ledger
from pipeline.tasks.causal_lm import token_losses
from tests.runs import ADAM, LEARNING_RATE, config_of, deepspeed_json, largest_difference, run, weights

CPU = torch.device("cpu")
TORCH = {"torch_adam": True}
POOL = {"policy__rule": "top", "policy__pool": 2, "influence__include_self": False}


@pytest.fixture
def pool(corpus, tiny_model, tmp_path) -> Callable[..., Config]:
    def make(name: str = "run", kind: str = "llama", stage: int = 2, **options: Any) -> Config:
        keys = ("micro", "accumulation", "optimizer", "bf16", "scheduler")
        settings = deepspeed_json(
            tmp_path / f"{name}.json", stage, **{key: options.pop(key) for key in keys if key in options}
        )
        model = options.pop("model", None) or tiny_model(kind)
        if options.get("influence__reference") == "validation":
            options = {
                "data__reference_files": corpus / "documents.jsonl",
                "data__prepared_dir": corpus / "prepared_with_reference",
            } | options
        return config_of(corpus, tmp_path / name, model, settings, **(POOL | options))

    return make


def trained_alone(config: Config, rows: Any, together: int) -> dict[str, Tensor]:
    """One process, autograd and SGD, over the kept sequences in the order of their positions: each step the mean over
    micro-batches of `together` sequences of each one's mean over its tokens."""
    model = AutoModelForCausalLM.from_pretrained(config.model.name_or_path, dtype=torch.float32).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    samples = Samples(load_split(config.data.prepared_dir, "train"), config.seed, "sequence")
    for step in range(1, config.max_steps + 1):
        kept = rows.filter((pc.field("step") == step) & pc.field("kept"))["position"].to_pylist()
        parts = [kept[first : first + together] for first in range(0, len(kept), together)]
        for part in parts:
            batch = samples.batch_at(part, CPU)
            losses, _ = token_losses(model(input_ids=batch.input_ids_BT).logits, batch.labels_BT)
            (losses.sum() / (batch.labels_BT != IGNORE).sum() / len(parts)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.named_parameters())


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        (0, {"accumulation": 2}),
        pytest.param(1, {"accumulation": 2, "policy__pool": 3}, marks=pytest.mark.slow),
        (2, {"accumulation": 2, "influence__score_prefix": 0.5}),
        pytest.param(3, {"accumulation": 2, "influence__estimator": "residual"}, marks=pytest.mark.slow),
        (0, {"influence__estimator": "ghost", "kind": "gpt_neo_with_dropout"}),
        (3, {"accumulation": 2, "influence__estimator": "ghost", "model__activation_checkpointing": True}),
        (2, {"influence__estimator": "loss", "policy__temperature": 1.0}),
    ],
)
def test_the_best_of_all_ranks_candidates_are_trained_on_as_if_nothing_else_was_read(ranks, pool, stage, options):
    """Catches a pool of each rank's own, a step of another size, a backward of what was not chosen, gradients that
    the scoring leaves behind."""
    dropout = options.get("kind") == "gpt_neo_with_dropout"
    size = 4 * options.get("accumulation", 1)
    for seed in range(20):  # in some orders of the corpus the best of all are as many on either rank, by chance
        config = pool(f"run-{seed}", stage=stage, max_steps=3, seed=seed, data__seed=3, **options)
        ranks(run, config)
        rows = ledger.read(Path(config.run_dir))
        table = rows.to_pandas()
        if any(table[table["kept"] & (table["rank"] == 0)].groupby("step").size() != size // 2):
            break
    else:
        pytest.fail("a pool of each rank's own")
    read = config.policy.pool
    for step, part in table.groupby("step"):
        assert len(part) == size * read
        assert list(part["position"]) == list(range((step - 1) * size * read, step * size * read))
        assert part["kept"].sum() == size
        if not config.policy.temperature:
            assert part[part["kept"]]["score"].min() > part[~part["kept"]]["score"].max()
        assert set(part["reason"]) == {"", "top"}
    before, after = weights(Path(config.model.name_or_path)), weights(Path(config.run_dir, "model"))
    assert largest_difference(before, after) > 1e-2
    if not dropout:
        assert largest_difference(trained_alone(config, rows, 4), after) < 1e-5
    found, violations = check_ledger(Path(config.run_dir))
    assert not violations
    assert f"{size * 3} of those read trained on" in found


@pytest.mark.parametrize("estimator", ["lai", "ghost"])
def test_scores_against_a_validation_set_are_those_of_one_process(ranks, pool, estimator):
    """The pool's scores at the first step. Catches a scoring pass that sees other weights, and one whose sketches wait
    for a reference that is already there."""
    options = {"influence__reference": "validation", "influence__validation_sequences": 4, "max_steps": 1}
    scores = []
    for stage, name in ((0, "zero0"), (3, "zero3")):
        config = pool(name, stage=stage, influence__estimator=estimator, influence__sketch="none", **options)
        ranks(run, config)
        scores.append(np.array(ledger.read(Path(config.run_dir))["score"].to_pylist()))
    np.testing.assert_allclose(scores[0], scores[1], rtol=0, atol=1e-4 * np.abs(scores[0]).max())
    if estimator == "ghost":
        samples = Samples(load_split(config.data.prepared_dir, "train"), config.seed, "sequence")
        references = Samples(load_split(config.data.prepared_dir, "reference"), config.seed, "sequence")
        model = AutoModelForCausalLM.from_pretrained(config.model.name_or_path, dtype=torch.float32).train()
        matrices = [p for name, p in model.named_parameters() if p.dim() == 2]

        def gradient(batch: Any) -> Tensor:
            losses, _ = token_losses(model(input_ids=batch.input_ids_BT).logits, batch.labels_BT)
            return torch.cat([g.flatten() for g in torch.autograd.grad(losses.sum(), matrices)]).double()

        reference = gradient(references.batch(0, 4, CPU))
        expected = [float(gradient(samples.batch(position, 1, CPU)) @ reference) for position in range(8)]
        np.testing.assert_allclose(scores[0], expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("estimator", [pytest.param("lai", marks=pytest.mark.slow), "lookahead"])
def test_one_rank_decides_as_two(ranks, one_rank, pool, estimator):
    """Catches a pool that depends on who read what, and a reference that each rank has its own of."""
    tables = []
    options: dict[str, Any] = {"policy__temperature": 0.5}
    if estimator == "lookahead":
        options = {"influence__reference": "validation", "influence__validation_sequences": 6, "optimizer": ADAM}
    for name, world, micro, stage in (("two", ranks, 2, 2), ("one", one_rank, 4, 0)):
        config = pool(name, micro=micro, stage=stage, max_steps=3, influence__estimator=estimator, **dict(options))
        world(run, config)
        tables.append(ledger.read(Path(config.run_dir)).to_pandas())
    assert 0 < tables[0]["kept"].sum() < len(tables[0])
    assert (tables[0]["kept"] == tables[1]["kept"]).all()
    assert (tables[0]["sample_id"] == tables[1]["sample_id"]).all()


@pytest.mark.parametrize("estimator", [pytest.param("lai", marks=pytest.mark.slow), "lookahead"])
def test_a_pool_stopped_twice_goes_on_as_the_unbroken_one(ranks, pool, estimator):
    """Catches a resume that reads from where it trained, not from where it read."""
    options: dict[str, Any] = {"optimizer": ADAM, "checkpoint__every_steps": 1, "max_steps": 4}
    if estimator == "lookahead":
        options |= {"influence__reference": "validation", "influence__validation_sequences": 4}
    configs = []
    for name in ("unbroken", "broken"):
        configs.append(pool(name, influence__estimator=estimator, **dict(options)))
    unbroken, broken = configs
    ranks(run, unbroken)
    for until in (1, 3, 4):
        ranks(run, replace(broken, max_steps=until, resume="auto"))
    left, right = (ledger.read(Path(config.run_dir)).to_pandas() for config in configs)
    assert (~left["kept"]).any()
    assert left.equals(right)
    assert not check_ledger(Path(broken.run_dir))[1]
    assert largest_difference(*(weights(Path(config.run_dir, "model")) for config in configs)) == 0


def test_what_is_not_finite_is_chosen_last(ranks, pool, tiny_model, corpus, tmp_path):
    """All but one of the first pool: the step then trains on that one. Catches a NaN that wins, and one in a
    gradient."""
    ensure_prepared(pool())
    config = pool("broken_run", max_steps=1)
    batch = Samples(load_split(config.data.prepared_dir, "train"), 3, "sequence").batch(0, 8, CPU)
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    words = [set(row.tolist()) for row in batch.input_ids_BT]
    bad = set().union(*words[1:]) - words[0]
    assert all(row & bad for row in words[1:])
    with torch.no_grad():
        model.model.embed_tokens.weight[list(bad)] = torch.nan
    model.save_pretrained(tmp_path / "broken")
    ranks(run, replace(config, model=replace(config.model, name_or_path=str(tmp_path / "broken"))))
    rows = ledger.read(Path(config.run_dir))
    assert rows["kept"].to_pylist() == [True] + [False] * 7
    assert weights(Path(config.run_dir, "model"))["model.layers.0.mlp.up_proj.weight"].isfinite().all()


def test_a_ledger_that_keeps_another_number_is_refused(ranks, pool):
    config = pool(max_steps=2)
    ranks(run, config)
    (path,) = Path(config.run_dir, "ledger").glob("*.parquet")
    table = ledger.read(Path(config.run_dir)).to_pandas()
    index = table.index[~table["kept"]][0]
    table.loc[index, ["kept", "weight"]] = True, 1.0
    table.to_parquet(path)
    assert any("read 8 sequences and trained on 5, not on 4" in line for line in check_ledger(Path(config.run_dir))[1])


def _losses(model: Any, batch: Any) -> Tensor:
    losses_BT, _ = token_losses(model(input_ids=batch.input_ids_BT).logits, batch.labels_BT)
    return losses_BT


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        (0, {}),
        pytest.param(1, {}, marks=pytest.mark.slow),
        (2, {"optimizer": {"type": "Adam", "params": {"lr": 1e-2, "weight_decay": 0.1, "adam_w_mode": False} | TORCH}}),
        pytest.param(3, {}, marks=pytest.mark.slow),
        (3, {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}, "kind": "gpt_neo"}),
    ],
)
def test_lookahead_scores_are_differences_of_losses_around_real_steps_of_adam(ranks, pool, stage, options):
    """Against torch's own AdamW, stepped on copies of the model with the reference's gradient and with none, at every
    step of a run: momentum, clipping, decay and rate are those of the run. Catches an own part of weights or moments
    in the wrong place, weights that do not come back, a gradient divided by ranks."""
    optimizer = {"type": "AdamW", "params": {"lr": 1e-2, "betas": [0.9, 0.95], "weight_decay": 0.1} | TORCH}
    options = {"optimizer": optimizer} | options
    zero = options.pop("zero_optimization", None)
    config = pool(
        stage=stage,
        max_steps=3,
        influence__estimator="lookahead",
        influence__reference="validation",
        influence__validation_sequences=6,
        **options,
    )
    settings = json.loads(Path(config.deepspeed_config).read_text()) | {"gradient_clipping": 1.0}
    settings |= {"zero_optimization": zero} if zero else {}
    Path(config.deepspeed_config).write_text(json.dumps(settings))
    ranks(run, config)
    rows = ledger.read(Path(config.run_dir)).to_pandas()
    expected = lookahead_alone(config, rows, settings["optimizer"]["params"])
    np.testing.assert_allclose(rows["score"], expected, rtol=0, atol=2e-3 * np.abs(expected).max())


def lookahead_alone(config: Config, rows: Any, settings: dict[str, Any]) -> np.ndarray:
    adam = torch.optim.Adam if settings.get("adam_w_mode") is False else torch.optim.AdamW
    settings = {key: value for key, value in settings.items() if key not in ("adam_w_mode", "torch_adam")}
    model = AutoModelForCausalLM.from_pretrained(config.model.name_or_path, dtype=torch.float32)
    parameters = list(model.parameters())
    optimizer = adam(parameters, **settings)
    samples = Samples(load_split(config.data.prepared_dir, "train"), config.seed, "sequence")
    references = Samples(load_split(config.data.prepared_dir, "reference"), config.seed, "sequence")
    count, scores = config.influence.validation_sequences, []

    def gradients(batch: Any) -> list[Tensor]:
        labelled = (batch.labels_BT != IGNORE).sum()
        found = torch.autograd.grad(_losses(model, batch).sum() / labelled, parameters)
        norm = torch.stack([gradient.norm() for gradient in found]).norm()
        return [gradient * min(1.0, 1.0 / float(norm)) for gradient in found]

    def losses_after(found: list[Tensor], batch: Any) -> Tensor:
        saved = [parameter.detach().clone() for parameter in parameters]
        state = {key: {name: value.clone() for name, value in one.items()} for key, one in optimizer.state.items()}
        for parameter, gradient in zip(parameters, found, strict=True):
            parameter.grad = gradient.clone()
        for group in optimizer.param_groups:
            group["lr"] *= config.influence.lookahead_step
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] /= config.influence.lookahead_step
        with torch.no_grad():
            losses_BT = _losses(model, batch)
            for parameter, before in zip(parameters, saved, strict=True):
                parameter.copy_(before)
        optimizer.state.clear()
        optimizer.state.update(state)
        return losses_BT

    for step in range(1, config.max_steps + 1):
        part = rows[rows["step"] == step]
        pool = samples.batch_at(list(part["position"]), CPU)
        reference = gradients(references.batch((step - 1) * count, count, CPU))
        nothing = [torch.zeros_like(parameter) for parameter in parameters]
        difference_BT = losses_after(nothing, pool) - losses_after(reference, pool)
        scores += (difference_BT.sum(1) / (pool.labels_BT != IGNORE).sum(1)).tolist()
        kept = samples.batch_at(list(part[part["kept"]]["position"]), CPU)
        for parameter, gradient in zip(parameters, gradients(kept), strict=True):
            parameter.grad = gradient
        optimizer.step()
    return np.array(scores)


@pytest.mark.parametrize(("stage", "options"), [(2, POOL), (3, POOL), (2, {}), (3, {"influence__unit": "document"})])
def test_rho_is_the_loss_less_the_reference_models(ranks, corpus, tiny_model, tmp_path, stage, options):
    """In a pool and in the training's own forward. Catches a reference model that learns, and one that ZeRO-3 leaves
    empty."""
    other = AutoModelForCausalLM.from_pretrained(tiny_model("gpt_neo"))
    other.save_pretrained(tmp_path / "other")
    give_tokenizer(corpus / "tokenizer", tmp_path / "other")
    config = config_of(
        corpus,
        tmp_path / "run",
        tiny_model("llama"),
        deepspeed_json(tmp_path / "ds.json", stage),
        max_steps=2,
        influence__estimator="rho",
        influence__reference_model=tmp_path / "other",
        **options,
    )
    ranks(run, config)
    rows = ledger.read(Path(config.run_dir)).to_pandas()
    assert (~rows["kept"]).any()
    samples = Samples(load_split(config.data.prepared_dir, "train"), config.seed, config.influence.unit)
    batch = samples.batch_at(sorted(set(rows["position"])), CPU)
    tokens = batch.tokens_U
    with torch.no_grad():
        expected = rows["loss"] - (batch.sum_per_unit(_losses(other.eval(), batch)) / tokens.clamp(min=1)).numpy()
    counted = (tokens > 0).numpy()
    np.testing.assert_allclose(rows["score"][counted], expected[counted], rtol=0, atol=1e-4)


def give_tokenizer(source: Path, target: Path) -> None:
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())


def test_a_reference_model_with_another_tokenizer_is_refused(corpus, tiny_model, tmp_path):
    AutoModelForCausalLM.from_pretrained(tiny_model("llama")).save_pretrained(tmp_path / "other")
    give_tokenizer(corpus / "tokenizer", tmp_path / "other")
    text = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    first, second = list(text["model"]["vocab"])[10:12]
    vocabulary = text["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(text))
    with pytest.raises(ValueError, match="has another tokenizer than the data were prepared with: 2 of"):
        refuse_other_tokenizer(str(tmp_path / "other"), corpus / "tokenizer")
    refuse_other_tokenizer(str(corpus / "tokenizer"), corpus / "tokenizer")
    with pytest.raises(ValueError, match="no tokenizer could be loaded from"):
        refuse_other_tokenizer(str(tiny_model("llama")), corpus / "tokenizer")


def moved_and_back(config: Config) -> tuple[float, bool, float]:
    """How far the weights move, whether they come back to the bit, and how far the losses are then from what they
    were."""
    settings = read_deepspeed_config(config)
    engine = initialize(load_model(config.model, config.seed, settings), settings)
    batch = Samples(load_split(config.data.prepared_dir, "train"), config.seed, "sequence").batch(0, 2, CPU)
    engine.backward(_losses(engine, batch).sum())
    engine.step()
    engine.eval()
    before, losses_BT = full_state_dict(engine), _losses(engine, batch).detach()
    ahead = Ahead(engine, 0.5)
    ahead.hold_gradient(iter([(_losses(engine.module, batch).sum(), (batch.labels_BT != IGNORE).sum())]))
    with torch.no_grad(), ahead.moved(True):
        moved = full_state_dict(engine)
        _losses(engine, batch)
    after = full_state_dict(engine)
    again_BT = _losses(engine, batch).detach()
    distance = max((float((moved[name].float() - before[name].float()).abs().max()) for name in before), default=1.0)
    same = all(torch.equal(before[name], after[name]) for name in before)
    return distance, same, float((losses_BT - again_BT).abs().max())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_weights_come_back_to_the_bit(ranks, pool, stage):
    """In bfloat16, also small weights that ZeRO-3 keeps gathered. Catches an undo in place of a copy."""
    config = pool(stage=stage, bf16={"enabled": True}, optimizer=ADAM | {"params": ADAM["params"] | {"lr": 0.1}})
    ensure_prepared(config)
    for distance, same, difference in ranks(moved_and_back, config):
        assert distance > 1e-3
        assert same
        assert difference == 0


@pytest.mark.parametrize("estimator", ["oracle", "ngram"])
def test_the_bars_keep_what_is_of_the_target(ranks, pool, corpus, tmp_path, estimator):
    """Half of what is read, over two ranks. Catches n-grams counted in the wrong split, and another unit's subset."""
    options: dict[str, Any] = {"influence__oracle_subsets": ["arg*"]}
    if estimator == "ngram":
        lines = (corpus / "documents.jsonl").read_text().splitlines()
        target = [line for line in lines if json.loads(line)["meta"]["pile_set_name"] == "argparse"]
        (tmp_path / "target.jsonl").write_text("\n".join(target))
        options = {"influence__reference": "validation", "data__reference_files": tmp_path / "target.jsonl"}
        options["data__prepared_dir"] = tmp_path / "prepared"
    config = pool(max_steps=4, influence__estimator=estimator, **options)
    ranks(run, config)
    rows = ledger.read(Path(config.run_dir)).to_pandas()
    of_target, kept = rows["subset"] == "argparse", rows["kept"]
    assert 0 < of_target.mean() < 1
    if estimator == "oracle":
        assert set(rows["score"]) == {0.0, 1.0}
        for _, step in rows.groupby("step"):
            wanted, taken = (step["subset"] == "argparse"), step["kept"]
            assert (wanted & taken).sum() == min(wanted.sum(), taken.sum())
    else:
        assert rows["score"][of_target].mean() > rows["score"][~of_target].mean() + 0.5
        assert of_target[kept].mean() > of_target[~kept].mean() + 0.2
