"""The main job on two real gloo ranks, against one process that nothing has partitioned."""

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from pipeline.config.deepspeed_json import read_deepspeed_config
from pipeline.config.schema import Config
from pipeline.config.timing import Stopwatch
from pipeline.data.batch import IGNORE
from pipeline.data.prepared import ensure_prepared, load_split
from pipeline.data.samples import Samples
from pipeline.engine import collectives, deepspeed_engine
from pipeline.influence.reference import OfBatch
from pipeline.influence.scorer import SketchScorer
from pipeline.influence.table import make
from pipeline.models.load import load_model
from pipeline.record import ledger
from pipeline.training.influence_engine import InfluenceEngine
from tests.reference.influence import token_pair_scores
from tests.runs import ADAM, LEARNING_RATE, config_of, deepspeed_json, largest_difference, run, weights
from tests.seams import before_backward, on_rank

CPU = torch.device("cpu")


def close_to_largest(got: Any, expected: Any, tolerance: float = 1e-4) -> bool:
    got, expected = torch.as_tensor(got).double(), torch.as_tensor(expected).double()
    return bool((got - expected).abs().max() <= tolerance * expected.abs().max())


@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("estimator", ["lai", "lli"])
@pytest.mark.parametrize("kind", ["gpt_neo", "llama", "llama_tied", "gpt2"])
def test_exact_scores_in_the_ledger_are_eq_4_over_token_pairs(
    ranks, corpus, tiny_model, tmp_path, kind, estimator, include_self
):
    """Catches a local for a global batch, a hook that ZeRO-3 blinds, and a wrong sign, shift or self-influence."""
    config = config_of(
        corpus,
        tmp_path / "run",
        tiny_model(kind),
        deepspeed_json(tmp_path / "ds.json", stage=3),
        max_steps=1,
        influence__estimator=estimator,
        influence__include_self=include_self,
        influence__sketch="none",
        policy__action="observe",
    )
    ranks(run, config)
    rows = ledger.read(tmp_path / "run")
    assert rows["rank"].to_pylist() == [0, 0, 1, 1]
    batch = Samples(load_split(corpus / "prepared", "train"), config.seed, "sequence").batch(0, 4, CPU)
    model = AutoModelForCausalLM.from_pretrained(tiny_model(kind))
    expected = token_pair_scores(model, batch.input_ids_BT, batch.labels_BT, estimator == "lli", include_self)
    assert close_to_largest(rows["score"].to_pylist(), expected)


def plain_training(config: Config, rows: Any, accumulation: int, clip: float = 0.0) -> dict[str, torch.Tensor]:
    """One process, autograd and SGD over the units that `rows` kept: the mean over micro-batches of each one's
    mean over its kept tokens, or with `policy.normalize: all` their sum over the number of all."""
    model = AutoModelForCausalLM.from_pretrained(config.model.name_or_path, dtype=torch.float32).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    samples = Samples(load_split(config.data.prepared_dir, "train"), config.seed, config.influence.unit)
    for step in range(1, config.max_steps + 1):
        for micro_step in range(accumulation):
            part = rows.filter((pc.field("step") == step) & (pc.field("micro_step") == micro_step))
            positions = part["position"].to_pylist()
            batch = samples.batch(positions[0], positions[-1] - positions[0] + 1, CPU)
            labels = batch.labels_BT.flatten().clone()
            every = int((labels != IGNORE).sum())
            for unit, kept in zip(batch.units, part["kept"].to_pylist(), strict=True):
                if not kept:
                    labels[slice(*unit.span)] = IGNORE
            if (labels != IGNORE).any():
                logits = model(input_ids=batch.input_ids_BT).logits.flatten(0, 1)
                summed = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
                over = every if config.policy.normalize == "all" else int((labels != IGNORE).sum())
                (summed / over / accumulation).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.named_parameters())


@pytest.mark.parametrize("unit", ["sequence", "document"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_update_after_dropping_equals_plain_autograd_over_what_was_kept(
    ranks, corpus, tiny_model, tmp_path, stage, unit
):
    """Catches a missing world size or accumulation factor and dropped tokens in the denominator, at every stage."""
    config = config_of(
        corpus,
        tmp_path / "run",
        tiny_model("gpt_neo"),
        deepspeed_json(tmp_path / "ds.json", stage, accumulation=2),
        max_steps=2,
        policy__rule="rate",
        policy__rate=0.4,
        influence__include_self=False,
        influence__unit=unit,
    )
    ranks(run, config)
    rows = ledger.read(tmp_path / "run")
    dropped = rows.filter(~pc.field("kept"))
    assert len(dropped) > 2
    assert len({(row["step"], row["micro_step"], row["rank"]) for row in dropped.to_pylist()}) > 1
    before, after = weights(tiny_model("gpt_neo")), weights(tmp_path / "run" / "model")
    assert largest_difference(before, after) > 1e-2
    assert largest_difference(plain_training(config, rows, accumulation=2), after) < 1e-5


@pytest.mark.parametrize("passes", ["one", "score_first"])
def test_divided_by_all_tokens_the_update_is_smaller_by_what_was_dropped(ranks, corpus, tiny_model, tmp_path, passes):
    """Catches a key without effect, and a number of tokens that is one rank's."""
    config = config_of(
        corpus,
        tmp_path / "run",
        tiny_model("gpt_neo"),
        deepspeed_json(tmp_path / "ds.json", 2, accumulation=2),
        max_steps=2,
        policy__rule="rate",
        policy__rate=0.5,
        policy__normalize="all",
        influence__estimator="random",
        influence__passes=passes,
    )
    ranks(run, config)
    rows = ledger.read(tmp_path / "run")
    assert rows["kept"].to_pylist().count(False) == len(rows) // 2
    after = weights(tmp_path / "run" / "model")
    assert largest_difference(plain_training(config, rows, accumulation=2), after) < 1e-5
    kept_alone = plain_training(replace(config, policy=replace(config.policy, normalize=None)), rows, accumulation=2)
    assert largest_difference(kept_alone, after) > 1e-3


@pytest.mark.parametrize("stage", [0, 3])
def test_a_rank_that_keeps_nothing_goes_on_and_counts_for_nothing(ranks, corpus, tiny_model, tmp_path, stage):
    """One sample a rank and half of them dropped: in every micro-batch one rank keeps nothing."""
    config = config_of(
        corpus,
        tmp_path / "run",
        tiny_model("llama"),
        deepspeed_json(tmp_path / "ds.json", stage, micro=1, accumulation=2),
        max_steps=3,
        policy__rule="rate",
        policy__rate=0.5,
    )
    ranks(run, config)
    rows = ledger.read(tmp_path / "run")
    assert rows["kept"].to_pylist().count(False) == 6
    after = weights(tmp_path / "run" / "model")
    assert largest_difference(plain_training(config, rows, accumulation=2), after) < 1e-5


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_global_batch_that_is_dropped_whole_changes_nothing(ranks, corpus, tiny_model, tmp_path, stage):
    config = config_of(
        corpus,
        tmp_path / "run",
        tiny_model("llama"),
        deepspeed_json(tmp_path / "ds.json", stage),
        max_steps=2,
        policy__threshold=1e30,
        policy__max_drop_fraction=1.0,
    )
    ranks(run, config)
    assert ledger.read(tmp_path / "run")["kept"].to_pylist() == [False] * 8
    assert largest_difference(weights(tiny_model("llama")), weights(tmp_path / "run" / "model")) == 0


def test_clipping_sees_the_gradient_of_what_was_kept(ranks, corpus, tiny_model, tmp_path):
    config = config_of(
        corpus,
        tmp_path / "run",
        tiny_model("llama"),
        deepspeed_json(tmp_path / "ds.json", 2, gradient_clipping=0.1),
        max_steps=2,
        policy__rule="rate",
        policy__rate=0.5,
    )
    ranks(run, config)
    rows = ledger.read(tmp_path / "run")
    assert rows["kept"].to_pylist().count(False) == 4
    expected = plain_training(config, rows, accumulation=1, clip=0.1)
    assert largest_difference(expected, plain_training(config, rows, accumulation=1)) > 1e-3
    assert largest_difference(expected, weights(tmp_path / "run" / "model")) < 1e-5


@pytest.mark.parametrize("precondition", ["none", "adam_ema"])
def test_observe_is_bit_identical_to_no_estimator(ranks, corpus, tiny_model, tmp_path, precondition):
    """Catches scoring that touches the loss, the gradient or the random state of the model."""
    deepspeed = deepspeed_json(tmp_path / "ds.json", 2, accumulation=2, optimizer=ADAM)
    common = {"max_steps": 4, "model__activation_checkpointing": True}
    observe = config_of(
        corpus,
        tmp_path / "observe",
        tiny_model("gpt_neo_with_dropout"),
        deepspeed,
        influence__precondition=precondition,
        policy__action="observe",
        **common,
    )
    none = config_of(
        corpus, tmp_path / "none", tiny_model("gpt_neo_with_dropout"), deepspeed, influence__estimator="none", **common
    )
    ranks(run, observe)
    ranks(run, none)
    scored, unscored = ledger.read(tmp_path / "observe"), ledger.read(tmp_path / "none")
    assert scored["score"].null_count == 0
    assert unscored["score"].null_count == len(unscored)
    assert scored["loss"].equals(unscored["loss"])
    assert largest_difference(weights(tmp_path / "observe" / "model"), weights(tmp_path / "none" / "model")) == 0


def plain_deepspeed_loop(config: Config) -> dict[str, torch.Tensor]:
    """What a user would write without us: transformers' own loss, no hooks, no weights."""
    deepspeed_config = read_deepspeed_config(config)
    model = load_model(config.model, config.seed, deepspeed_config)
    ds_engine = deepspeed_engine.initialize(model, deepspeed_config)
    samples = Samples(load_split(config.data.prepared_dir, "train"), config.seed, "sequence")
    size = ds_engine.train_micro_batch_size_per_gpu()
    for step in range(config.max_steps):
        batch = samples.batch(2 * size * step + torch.distributed.get_rank() * size, size, CPU)
        ds_engine.backward(ds_engine(input_ids=batch.input_ids_BT, labels=batch.input_ids_BT).loss)
        ds_engine.step()
    return deepspeed_engine.full_state_dict(ds_engine)


@pytest.mark.parametrize("stage", [0, 3])
def test_no_estimator_equals_a_plain_deepspeed_loop_with_transformers_own_loss(
    ranks, corpus, tiny_model, tmp_path, stage
):
    config = config_of(
        corpus,
        tmp_path / "run",
        tiny_model("llama"),
        deepspeed_json(tmp_path / "ds.json", stage),
        max_steps=3,
        influence__estimator="none",
    )
    ranks(run, config)
    plain = ranks(plain_deepspeed_loop, config)[0]
    assert largest_difference(plain, weights(tmp_path / "run" / "model")) < 1e-6


OFFLOAD = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.slow
def test_a_real_model_on_real_documents_is_the_same_at_every_stage_for_twenty_steps(
    ranks, shared_data, tmp_path_factory, stage
):
    """stories260k on Pile documents: losses, scores, kept sets against ZeRO 0, step by step."""
    directory = tmp_path_factory.getbasetemp() / "stories260k"
    model = shared_data / "models" / "stories260k"
    rows = {}
    for zero in (0, stage):
        run_dir = directory / f"zero{zero}"
        if not run_dir.exists():
            config = config_of(
                directory,
                run_dir,
                model,
                deepspeed_json(directory / f"zero{zero}.json", zero, micro=4, optimizer=ADAM, gradient_clipping=1.0),
                max_steps=20,
                model__tokenizer=model,
                data__train_files=shared_data / "pile" / "train" / "00.jsonl.zst",
                data__sequence_length=64,
                data__max_sequences=400,
                influence__include_self=False,
                policy__rule="rate",
                policy__rate=0.25,
            )
            ranks(run, config)
        rows[zero] = ledger.read(run_dir).to_pandas()
    first, other = rows[0], rows[stage]
    assert (~first["kept"]).sum() == 40
    assert (first["loss"] - other["loss"]).abs().max() < 1e-4
    largest = first["score"].abs().groupby(first["step"]).transform("max")
    assert ((first["score"] - other["score"]).abs() / largest).max() < 1e-4
    assert (first["kept"] == other["kept"]).all()


def test_losses_scores_and_decisions_are_the_same_at_every_stage(ranks, corpus, tiny_model, tmp_path):
    """Also with offload and with activation checkpointing."""
    ledgers = {}
    for name, settings in {
        "0": {"stage": 0},
        "1": {"stage": 1},
        "2": {"stage": 2},
        "3": {"stage": 3},
        "3 with offload": {"stage": 3, "zero_optimization": OFFLOAD},
        "2 with checkpointing": {"stage": 2},
    }.items():
        run_dir = tmp_path / name.replace(" ", "_")
        config = config_of(
            corpus,
            run_dir,
            tiny_model("llama"),
            deepspeed_json(tmp_path / f"{run_dir.name}.json", micro=4, optimizer=ADAM, **settings),
            max_steps=4,
            influence__include_self=False,
            influence__precondition="adam_ema",
            model__activation_checkpointing="checkpointing" in name,
            policy__rule="rate",
            policy__rate=0.25,
        )
        ranks(run, config)
        ledgers[name] = ledger.read(run_dir)
    first = ledgers.pop("0")
    assert first["kept"].to_pylist().count(False) == 8
    for name, other in ledgers.items():
        assert close_to_largest(other["loss"].to_pylist(), first["loss"].to_pylist()), name
        for step in range(1, 5):
            ours, theirs = (table.filter(pc.field("step") == step) for table in (first, other))
            assert close_to_largest(theirs["score"].to_pylist(), ours["score"].to_pylist()), name
        assert other["kept"].equals(first["kept"]), name


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_resumed_run_equals_an_unbroken_one_exactly(ranks, corpus, tiny_model, tmp_path, stage):
    """Catches a lost data position, running average, optimizer or dropout state, and rows recorded twice."""
    run_dir = tmp_path / "run"
    options: dict[str, Any] = {
        "max_steps": 5,
        "checkpoint__every_steps": 2,
        "checkpoint__keep": 3,
        "influence__precondition": "adam_ema",
        "influence__include_self": False,
        "policy__rule": "rate",
        "policy__rate": 0.3,
    }
    scheduler = {"type": "WarmupLR", "params": {"warmup_num_steps": 4}}
    deepspeed = deepspeed_json(tmp_path / "ds.json", stage, accumulation=2, optimizer=ADAM, scheduler=scheduler)
    ranks(run, config_of(corpus, run_dir, tiny_model("gpt_neo_with_dropout"), deepspeed, **options))
    unbroken, model = ledger.read(run_dir), weights(run_dir / "model")
    assert False in unbroken["kept"].to_pylist()

    for checkpoint in ("step-2", "step-4"):
        resume = run_dir / "checkpoints" / checkpoint
        ranks(run, config_of(corpus, run_dir, tiny_model("gpt_neo_with_dropout"), deepspeed, resume=resume, **options))
        assert ledger.read(run_dir).equals(unbroken)
        assert largest_difference(weights(run_dir / "model"), model) == 0


def test_checkpoints_beyond_keep_are_removed_and_a_foreign_one_is_refused(ranks, corpus, tiny_model, tmp_path):
    """Another dataset, another model, another ZeRO stage: refused by every rank with the keys that differ."""
    run_dir, deepspeed = tmp_path / "run", deepspeed_json(tmp_path / "ds.json")
    model = tiny_model("llama")
    ranks(run, config_of(corpus, run_dir, model, deepspeed, max_steps=3, checkpoint__every_steps=1))
    assert sorted(path.name for path in (run_dir / "checkpoints").glob("step-*")) == ["step-2", "step-3"]
    foreign = {
        "dataset.sequence_length: 16 -> 8": {"data__sequence_length": 8, "data__prepared_dir": tmp_path / "other"},
        "engine.parameters.lm_head.weight.0: 300 -> 'absent'": {"model__name_or_path": tiny_model("llama_tied")},
        "engine.zero_stage: 2 -> 3": {"deepspeed_config": deepspeed_json(tmp_path / "ds3.json", 3)},
        "seed: 3 -> 4": {"seed": 4, "data__prepared_dir": tmp_path / "reseeded"},
    }
    for message, change in foreign.items():
        with pytest.raises(AssertionError, match="SystemExit: 2") as refused:
            ranks(run, config_of(corpus, run_dir, model, deepspeed, max_steps=4, resume="auto", **change))
        assert message in str(refused.value)
    ranks(run, config_of(corpus, run_dir, model, deepspeed, max_steps=4, resume="auto"))  # its own, given back


def test_a_new_run_moves_an_earlier_one_aside(ranks, corpus, tiny_model, tmp_path):
    for _ in range(2):
        config = config_of(
            corpus, tmp_path / "run", tiny_model("llama"), deepspeed_json(tmp_path / "ds.json"), max_steps=1
        )
        ranks(run, config)
    assert len(ledger.read(tmp_path / "run")) == len(ledger.read(Path(f"{tmp_path}/run.1"))) == 4


def test_bfloat16_trains_and_scores_close_to_float32(ranks, corpus, tiny_model, tmp_path):
    scores = {}
    for name, settings in {"float32": {}, "bfloat16": {"bf16": {"enabled": True}}}.items():
        config = config_of(
            corpus,
            tmp_path / name,
            tiny_model("gpt_neo"),
            deepspeed_json(tmp_path / f"{name}.json", 2, micro=4, optimizer=ADAM, **settings),
            max_steps=2,
            influence__include_self=False,
        )
        ranks(run, config)
        scores[name] = ledger.read(tmp_path / name)["score"].to_pylist()[:8]
    assert scores["float32"] != scores["bfloat16"]
    assert close_to_largest(scores["bfloat16"], scores["float32"], tolerance=0.05)


def run_with_overflow(config: Config, at_step: int) -> None:
    """The main job with an infinite gradient on rank 1, behind a finite loss, at one step."""
    calls: list[int] = []

    def overflow(loss: torch.Tensor) -> None:
        calls.append(1)
        if len(calls) == at_step and on_rank(1):
            loss.register_hook(lambda gradient: gradient * torch.inf)

    with before_backward(overflow):
        run(config)


@pytest.mark.parametrize(
    ("stage", "bf16"),
    [
        (2, True),
        (3, False),
        *(pytest.param(*other, marks=pytest.mark.slow) for other in ((1, True), (3, True), (2, False))),
    ],
)
def test_a_step_whose_gradient_overflows_is_skipped_on_all_ranks(ranks, corpus, tiny_model, tmp_path, stage, bf16):
    """DeepSpeed's own skip, as under fp16: no update, no learning-rate step, and the run goes on."""
    schedule = {"warmup_num_steps": 8, "warmup_min_lr": 1e-3, "warmup_max_lr": 1e-2, "warmup_type": "linear"}
    scheduler = {"type": "WarmupLR", "params": schedule}
    settings = {"optimizer": ADAM, "scheduler": scheduler, "bf16": {"enabled": bf16}}
    exported = {}
    for steps in (1, 2, 3):
        config = config_of(
            corpus,
            tmp_path / f"run{steps}",
            tiny_model("llama"),
            deepspeed_json(tmp_path / "ds.json", stage, **settings),
            max_steps=steps,
            policy__rule="rate",
            policy__rate=0.5,
        )
        ranks(run_with_overflow, config, 2)
        exported[steps] = weights(tmp_path / f"run{steps}" / "model")
    assert largest_difference(exported[1], exported[2]) == 0
    assert largest_difference(exported[2], exported[3]) > 0
    events = EventAccumulator(str(tmp_path / "run3" / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("train/skipped_steps")] == [0, 1, 1]
    rates = [event.value for event in events.Scalars("train/lr")]
    # The first step of a WarmupLR leaves the rate; the second, had it not been skipped, would have doubled it.
    assert rates == pytest.approx([1e-3] * 3)
    assert len(ledger.read(tmp_path / "run3")) == 3 * 4


def test_a_gradient_that_is_not_finite_at_zero_0_ends_the_run_before_it_is_applied(ranks, corpus, tiny_model, tmp_path):
    """Catches a checkpoint of NaN weights, from which no run could ever resume."""
    deepspeed = deepspeed_json(tmp_path / "ds.json", stage=0)
    options = {"max_steps": 3, "checkpoint__every_steps": 1}
    config = config_of(corpus, tmp_path / "run", tiny_model("llama"), deepspeed, **options)
    with pytest.raises(AssertionError, match="FloatingPointError: the gradient of step 2 is not finite"):
        ranks(run_with_overflow, config, 2)
    assert Path(config.run_dir, "checkpoints", "latest").read_text() == "step-1"
    ranks(run, config_of(corpus, tmp_path / "run", tiny_model("llama"), deepspeed, resume="auto", **options))
    assert ledger.read(tmp_path / "run")["step"].to_pylist() == [1] * 4 + [2] * 4 + [3] * 4


def run_that_dies_before_publishing(config: Config, at: str) -> None:
    """The main job, ended on all ranks after every part of checkpoint `at` was written and before it is the newest."""

    def replace_file(source: Any, target: Any) -> None:
        if Path(target).match(f"{at}/manifest.json"):
            raise KeyboardInterrupt
        os_replace(source, target)

    os_replace, os.replace = os.replace, replace_file
    try:
        with pytest.raises(KeyboardInterrupt if on_rank(0) else ValueError):
            run(config)
    finally:
        os.replace = os_replace


def test_no_row_is_lost_or_repeated_when_a_run_dies_while_it_publishes_a_checkpoint(
    ranks, corpus, tiny_model, tmp_path
):
    """Catches rows that are written only after the checkpoint that a resume goes on from."""
    options = {"max_steps": 3, "checkpoint__every_steps": 1}
    deepspeed = deepspeed_json(tmp_path / "ds.json")
    ranks(run, config_of(corpus, tmp_path / "unbroken", tiny_model("llama"), deepspeed, **options))
    config = config_of(corpus, tmp_path / "run", tiny_model("llama"), deepspeed, **options)
    ranks(run_that_dies_before_publishing, config, "step-2")
    assert Path(config.run_dir, "checkpoints", "latest").read_text() == "step-1"
    assert len(ledger.read(tmp_path / "run")) == 8
    ranks(run, config_of(corpus, tmp_path / "run", tiny_model("llama"), deepspeed, resume="auto", **options))
    assert ledger.read(tmp_path / "run").equals(ledger.read(tmp_path / "unbroken"))


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("scope", ["micro_step", "step"])
def test_a_sample_that_is_not_finite_counts_for_nothing_and_the_others_train_on(
    ranks, corpus, tiny_model, tmp_path, stage, scope
):
    """One token's embedding is NaN: catches 0 * NaN in gradients, a NaN reference for all, and ranks that disagree."""
    batch = Samples(load_split(corpus / "prepared", "train"), 3, "sequence").batch(0, 8, CPU)
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    counts = [(int((batch.input_ids_BT == token).any(1).sum()), token) for token in range(1, 300)]
    bad_token = min(counts, key=lambda pair: abs(pair[0] - 2))[1]
    with torch.no_grad():
        model.model.embed_tokens.weight[bad_token] = torch.nan
    model.save_pretrained(tmp_path / "broken")
    config = config_of(
        corpus,
        tmp_path / "run",
        tmp_path / "broken",
        deepspeed_json(tmp_path / "ds.json", stage, accumulation=2),
        max_steps=1,
        influence__include_self=False,
        influence__precondition="adam_ema",
        influence__scope=scope,
        policy__action="observe",
    )
    ranks(run, config)
    rows = ledger.read(tmp_path / "run").to_pandas()
    bad = (batch.input_ids_BT == bad_token).any(1).numpy()
    assert 0 < bad.sum() < 8
    assert (rows["kept"].to_numpy() == ~bad).all()
    assert (rows["reason"][bad] == "non_finite").all()
    assert rows["loss"][bad].isna().all()
    assert rows[["loss", "score"]][~bad].notna().all(axis=None)

    parts = []
    for part in (range(4), range(4, 8)):
        kept = [row for row in part if not bad[row]]
        if kept:
            logits = model(input_ids=batch.input_ids_BT[kept]).logits.flatten(0, 1)
            parts.append(torch.nn.functional.cross_entropy(logits, batch.labels_BT[kept].flatten()) / 2)
    sum(parts).backward()
    after = weights(tmp_path / "run" / "model")
    for name, parameter in model.named_parameters():
        expected = parameter - LEARNING_RATE * parameter.grad
        torch.testing.assert_close(after[name], expected, rtol=0, atol=1e-5, equal_nan=True)


class OnceInfinite(SketchScorer):
    """On rank 1 the first unit of the first micro-batch has an infinite sketch, behind a finite loss."""

    broken = False

    def add(self, batch: Any, watch: Any, losses_BT: Any, logit_sketch_NG: Any) -> None:
        if not OnceInfinite.broken and on_rank(1):
            logit_sketch_NG[0] = torch.inf
        OnceInfinite.broken = True
        super().add(batch, watch, losses_BT, logit_sketch_NG)


def steps_of(config: Config, scorer: type[SketchScorer]) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """The rows of a run's steps with such a scorer, and the weights after them."""
    ensure_prepared(config)
    settings = read_deepspeed_config(config)
    ds_engine = deepspeed_engine.initialize(load_model(config.model, config.seed, settings), settings)
    influence, timed = config.influence, Stopwatch(CPU)
    estimator = make(influence, ds_engine.module, config.seed, CPU, timed)
    scores = scorer(influence, estimator, OfBatch(), config.seed, CPU, timed, collectives.all_reduce_sum)
    engine = InfluenceEngine(ds_engine, influence, config.policy, config.seed, scorer=scores)
    samples = Samples(load_split(config.data.prepared_dir, "train"), config.seed, "sequence")
    where = (collectives.rank(), collectives.world_size(), engine.size, engine.micro_batches, CPU)
    rows = []
    for _ in range(config.max_steps):
        rows += engine.train_step(samples.micro_batches(engine.position, *where)).table().to_dict("records")
    return rows, {name: parameter.detach().clone() for name, parameter in ds_engine.module.named_parameters()}


def test_one_infinite_score_is_left_out_and_spoils_no_other(ranks, corpus, tiny_model, tmp_path):
    """Catches an infinite sketch in everybody's reference."""
    options = {"max_steps": 2, "policy__action": "observe"}
    config = config_of(corpus, tmp_path / "run", tiny_model("llama"), deepspeed_json(tmp_path / "ds.json"), **options)
    sound, _ = ranks(steps_of, config, SketchScorer)[0]
    rows, after = ranks(steps_of, config, OnceInfinite)[0]
    assert [row["reason"] for row in rows[:4]] == ["", "", "non_finite", ""]
    assert [row["kept"] for row in rows] == [True, True, False, True, True, True, True, True]
    assert all(math.isfinite(row["score"]) for index, row in enumerate(rows) if index != 2)
    assert rows[0]["score"] != sound[0]["score"]
    assert largest_difference(plain_training(config, pa.Table.from_pylist(rows), 1), after) < 1e-5


def test_broken_weights_stop_all_ranks_with_one_message(ranks, corpus, tiny_model, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.inf)
    model.save_pretrained(tmp_path / "broken")
    config = config_of(corpus, tmp_path / "run", tmp_path / "broken", deepspeed_json(tmp_path / "ds.json"), max_steps=1)
    with pytest.raises(AssertionError, match=r"FloatingPointError: step 1: .* the weights are broken"):
        ranks(run, config)


def test_too_many_unhealthy_steps_in_a_row_stop_the_run_with_a_checkpoint(ranks, corpus, tiny_model, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    with torch.no_grad():
        model.model.embed_tokens.weight[1:290] = torch.nan
    model.save_pretrained(tmp_path / "broken")
    deepspeed = deepspeed_json(tmp_path / "ds.json")
    options = {"max_steps": 9, "policy__stop_after_non_finite": 3}
    config = config_of(corpus, tmp_path / "run", tmp_path / "broken", deepspeed, **options)
    with pytest.raises(AssertionError, match="FloatingPointError: stopped after step 3: in 3 steps in a row"):
        ranks(run, config)
    assert Path(config.run_dir, "checkpoints", "latest").read_text() == "step-3"
    assert set(ledger.read(tmp_path / "run")["reason"].to_pylist()) == {"non_finite"}


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_scope_step_scores_against_all_micro_batches_of_the_step(ranks, corpus, tiny_model, tmp_path, stage):
    """Catches a reference of one micro-batch, and a training forward that scores again."""
    model = tiny_model("llama")
    deepspeed = deepspeed_json(tmp_path / "ds.json", stage, accumulation=2)
    common = {"influence__include_self": False, "influence__scope": "step", "max_steps": 1}
    exact = {"influence__sketch": "none", "policy__action": "observe"}
    observed = config_of(corpus, tmp_path / "observed", model, deepspeed, **common, **exact)
    ranks(run, observed)
    rows = ledger.read(tmp_path / "observed")
    assert rows["micro_step"].to_pylist() == [0] * 4 + [1] * 4
    batch = Samples(load_split(corpus / "prepared", "train"), observed.seed, "sequence").batch(0, 8, CPU)
    reference = AutoModelForCausalLM.from_pretrained(model)
    expected = token_pair_scores(reference, batch.input_ids_BT, batch.labels_BT, False, include_self=False)
    assert close_to_largest(rows["score"].to_pylist(), expected)

    dropping = {"policy__rule": "rate", "policy__rate": 0.4}
    config = config_of(corpus, tmp_path / "run", model, deepspeed, **common | {"max_steps": 2}, **dropping)
    ranks(run, config)
    rows = ledger.read(tmp_path / "run")
    assert rows["kept"].to_pylist().count(False) >= 6
    assert largest_difference(plain_training(config, rows, accumulation=2), weights(tmp_path / "run" / "model")) < 1e-5
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [0 <= event.value <= 1 for event in events.Scalars("influence/scope_disagreement")] == [True, True]


@pytest.mark.parametrize("estimator", ["random", "loss"])
def test_control_estimators(ranks, corpus, tiny_model, tmp_path, estimator):
    config = config_of(
        corpus,
        tmp_path / "run",
        tiny_model("llama"),
        deepspeed_json(tmp_path / "ds.json"),
        max_steps=2,
        influence__estimator=estimator,
        policy__rule="rate",
        policy__rate=0.5,
    )
    ranks(run, config)
    rows = ledger.read(tmp_path / "run").to_pandas()
    if estimator == "loss":
        assert rows["score"].to_list() == (-rows["loss"]).to_list()
    assert rows["score"].nunique() == 8
    for _, part in rows.groupby("step"):
        assert part[~part["kept"]]["score"].max() < part[part["kept"]]["score"].min()


def run_with_own_seed(config: Config) -> None:
    """The main job as started by hand with another seed on rank 1."""
    run(replace(config, seed=config.seed + torch.distributed.get_rank()))


def test_ranks_started_with_different_configs_are_refused_at_the_start(ranks, corpus, tiny_model, tmp_path):
    """Catches ranks that draw different samples or decide differently and never notice."""
    config = config_of(corpus, tmp_path / "run", tiny_model("llama"), deepspeed_json(tmp_path / "ds.json"), max_steps=1)
    ranks(run, replace(config, run_dir=str(tmp_path / "prepared first")))
    with pytest.raises(AssertionError, match=r"ranks were started with different things:\n  config: .* on rank 1"):
        ranks(run_with_own_seed, config)
    assert not (tmp_path / "run").exists()
