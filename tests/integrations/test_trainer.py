"""`InfluenceTrainer` on two real ranks against pipeline.train, against transformers' Trainer, and against itself."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from pipeline import InfluenceConfig, PolicyConfig
from pipeline.config.schema import Config
from pipeline.data.batch import IGNORE
from pipeline.data.prepared import load_split
from pipeline.data.samples import Samples
from pipeline.integrations.trainer import STATE_NAME, InfluenceTrainer
from pipeline.record import ledger
from tests.runs import ADAM, CPU, LEARNING_RATE, config_of, deepspeed_json, largest_difference, run, weights

STEPS, PER_STEP = 4, 8
DROP_SOME = {"policy__rule": "rate", "policy__rate": 0.3}
SCHEDULE = {"total_num_steps": STEPS, "warmup_num_steps": 2, "warmup_min_lr": 0.0, "warmup_type": "linear"}
OURS = {"managed_gradient_accumulation": False}


@contextmanager
def nothing_stays() -> Iterator[None]:
    """What accelerate and transformers keep for the process is gone afterwards: the rank has other tests to run."""
    environment = dict(os.environ)
    try:
        yield
    finally:
        gc.collect()
        unset_hf_deepspeed_config()
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ.clear()
        os.environ.update(environment)


class Recorded(TrainerCallback):
    """What the callbacks of a Trainer get to see, and what it made of each step."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.logs: list[dict[str, float]] = []
        self.tables: list[pd.DataFrame] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append({"step": state.global_step, **logs})

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if outcome := getattr(self.trainer, "outcome", None):
            self.tables.append(outcome.table())


def trained(
    directory: Path,
    deepspeed: Path,
    model: Path,
    rows: Any,
    options: dict[str, Any],
    kind: type[Trainer] = InfluenceTrainer,
) -> tuple[pd.DataFrame, list[dict[str, float]]]:
    """A run of Trainer on this rank: its units, and its logs. The model ends in `directory`/final. `options`: of
    TrainingArguments, of the Trainer, and `resume`."""
    own = ("influence", "policy", "reference", "eval_dataset", "resume")
    arguments = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "learning_rate": LEARNING_RATE,
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "seed": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **{name: value for name, value in options.items() if name not in own},
    }
    with nothing_stays():
        recorded = Recorded()
        # Alive while the model is made, the arguments partition it at ZeRO-3.
        args = TrainingArguments(str(directory), deepspeed=str(deepspeed), use_cpu=True, **arguments)
        trainer = kind(
            AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
            args,
            train_dataset=rows,
            callbacks=[recorded],
            **{name: options[name] for name in own[:4] if name in options},
        )
        recorded.trainer = trainer
        trainer.train(resume_from_checkpoint=options.get("resume"))
        trainer.save_model(str(directory / "final"))
        tables, recorded.trainer = recorded.tables, None
        del trainer, args
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(), recorded.logs


def refusal(*arguments: Any) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        trained(*arguments)
    return str(error.value)


def json_of(tmp_path: Path, stage: int, **settings: Any) -> Path:
    """Two micro-batches of two in a step. At ZeRO-3 Trainer saves a model only where it may gather it."""
    zero = {"stage": stage} | ({"stage3_gather_16bit_weights_on_model_save": True} if stage == 3 else {})
    return deepspeed_json(tmp_path / "ds.json", stage, accumulation=2, zero_optimization=zero, **settings)


def rows_of(config: Config, count: int = STEPS * PER_STEP) -> list[dict[str, Any]]:
    """The sequences of a run, in its order, as a dataset for Trainer."""
    batch = Samples(load_split(config.data.prepared_dir, "train"), config.seed, "sequence").batch(0, count, CPU)
    predicted = batch.labels_BT != IGNORE
    labels_BT = torch.full_like(batch.labels_BT, IGNORE)
    labels_BT[:, 1:] = batch.input_ids_BT[:, 1:].where(predicted[:, :-1], IGNORE)
    return [
        {"input_ids": ids, "labels": labels}
        for ids, labels in zip(batch.input_ids_BT.tolist(), labels_BT.tolist(), strict=True)
    ]


def made_up(count: int, length: int = 16) -> list[dict[str, Any]]:
    ids = np.random.default_rng(5).integers(1, 300, (count, length)).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


@pytest.mark.parametrize(
    ("stage", "options", "settings"),
    [
        (0, {"influence__passes": "score_first"}, OURS),
        (2, {"influence__reference": "running"}, {}),
        pytest.param(3, {"influence__estimator": "ghost"}, OURS, marks=pytest.mark.slow),
        (2, {"influence__precondition": "adam_state", "influence__adam_every_steps": 1}, {"optimizer": ADAM}),
    ],
)
def test_it_trains_as_pipeline_train_does(ranks, corpus, tiny_model, tmp_path, stage, options, settings):
    """On the same sequences in the same order, two micro-batches a step: scores, decisions, weights of both. Catches
    accelerate's own backward and step beside ours, a schedule that advances at every micro-batch or not at all, labels
    that are shifted twice, and another place in the order of samples."""
    rate = settings.get("optimizer", {}).get("params", {}).get("lr", LEARNING_RATE)
    schedule = {"type": "WarmupDecayLR", "params": {**SCHEDULE, "warmup_max_lr": rate}}
    deepspeed = json_of(tmp_path, stage, scheduler=schedule, **settings)
    config = config_of(corpus, tmp_path / "run", tiny_model("llama"), deepspeed, max_steps=STEPS, **DROP_SOME | options)
    ranks(run, config)
    expected = ledger.read(tmp_path / "run").to_pandas()
    same = {"influence": config.influence, "policy": config.policy, "learning_rate": rate, "warmup_steps": 2}
    if settings.get("optimizer") == ADAM:
        same["adam_beta2"] = 0.95
    for table, logs in ranks(trained, tmp_path / "trainer", deepspeed, tiny_model("llama"), rows_of(config), same):
        assert (~table["kept"]).sum() >= 8
        for column in ("step", "micro_step", "rank", "position", "tokens", "kept", "reason"):
            assert table[column].tolist() == expected[column].tolist(), column
        for column in ("score", "loss", "weight"):
            largest = expected[column].abs().max()
            np.testing.assert_allclose(table[column], expected[column], rtol=0, atol=1e-6 * largest, err_msg=column)
        removed = (~table["kept"]).groupby(table["step"]).sum()
        steps = [log for log in logs if "loss" in log]
        assert [log["influence/removed"] for log in steps] == removed.tolist()
        assert [log["influence/removed_fraction"] for log in steps] == (removed / PER_STEP).tolist()
    before, after = weights(tiny_model("llama")), weights(tmp_path / "run" / "model")
    assert largest_difference(before, after) > 1e-3
    assert largest_difference(weights(tmp_path / "trainer" / "final"), after) < 1e-6


def test_where_nothing_is_dropped_it_is_transformers_trainer(ranks, tiny_model, tmp_path):
    """Losses, gradient norms, learning rates and evaluations in the logs, and the weights. All batches have equally
    many labels, so that both losses are the same mean. Catches a loss that is logged for every micro-batch or divided
    once more, a schedule of Trainer's own that stands still, and an epoch with fewer steps."""
    options = {
        "eval_dataset": made_up(4),
        "eval_strategy": "steps",
        "eval_steps": 2,
        "per_device_eval_batch_size": 2,
        "logging_steps": 2,
        "lr_scheduler_type": "linear",
        "max_steps": -1,
        "num_train_epochs": 2,
    }
    arguments = json_of(tmp_path, 2), tiny_model("llama"), made_up(16)
    observing = options | {"policy": PolicyConfig(action="observe")}
    (_, ours), _ = ranks(trained, tmp_path / "ours", *arguments, observing)
    (_, plain), _ = ranks(trained, tmp_path / "plain", *arguments, options, Trainer)
    for log, other in zip(ours, plain, strict=True):
        keys = {"step", "loss", "grad_norm", "learning_rate", "eval_loss", "train_loss", "epoch"} & other.keys()
        assert {key: log[key] for key in keys} == pytest.approx({key: other[key] for key in keys}, rel=1e-5)
    assert [log["learning_rate"] for log in ours if "loss" in log] == [LEARNING_RATE / 2, 0]
    before, after = weights(tiny_model("llama")), weights(tmp_path / "ours" / "final")
    assert largest_difference(before, after) > 1e-2
    assert largest_difference(after, weights(tmp_path / "plain" / "final")) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "settings", "influence"),
    [
        (2, {"optimizer": ADAM}, {"reference": "running", "precondition": "adam_state", "adam_every_steps": 3}),
        (0, OURS, {"estimator": "ghost", "reference": "running"}),
    ],
)
def test_a_resumed_run_goes_on_as_an_unbroken_one(ranks, tiny_model, tmp_path, stage, settings, influence):
    """On every rank, in the middle of the second of two shuffled epochs. Catches a running reference or second moments
    that begin anew, on ranks that did not write the state too, a step count that does, and a schedule."""
    options = {
        "influence": InfluenceConfig(**influence),
        "policy": PolicyConfig(rule="rate", rate=0.3),
        "adam_beta2": 0.95,
        "lr_scheduler_type": "linear",
        "train_sampling_strategy": "random",
        "max_steps": -1,
        "num_train_epochs": 2,
        "save_strategy": "steps",
        "save_steps": 3,
    }
    if "optimizer" in settings:
        options["learning_rate"] = settings["optimizer"]["params"]["lr"]
    arguments = json_of(tmp_path, stage, **settings), tiny_model("llama"), made_up(16)
    unbroken = ranks(trained, tmp_path / "unbroken", *arguments, options)
    checkpoint = tmp_path / "unbroken" / "checkpoint-3"
    assert list(checkpoint.rglob(STATE_NAME)) == [checkpoint / STATE_NAME]
    resuming = options | {"resume": str(checkpoint)}
    resumed = ranks(trained, tmp_path / "resumed", *arguments, resuming)
    for (whole, logs), (rest, rest_logs) in zip(unbroken, resumed, strict=True):
        assert whole["step"].unique().tolist() == [1, 2, 3, 4]
        assert (~whole["kept"]).sum() >= 8
        pd.testing.assert_frame_equal(rest, whole[whole["step"] > 3].reset_index(drop=True), check_exact=True)
        assert [log for log in rest_logs if "loss" in log] == [log for log in logs if "loss" in log and log["step"] > 3]
    after = weights(tmp_path / "unbroken" / "final")
    assert largest_difference(weights(tmp_path / "resumed" / "final"), after) == 0

    (checkpoint / STATE_NAME).unlink()
    for message in ranks(refusal, tmp_path / "resumed", *arguments, resuming):
        assert f"no file {checkpoint / STATE_NAME}" in message


def test_tensorboard_shows_what_was_removed(ranks, tiny_model, tmp_path):
    """By Trainer's own callback, as means since the last log. Catches counts of the last step alone, and sums."""
    options = {"policy": PolicyConfig(rule="rate", rate=0.3), "report_to": "tensorboard", "logging_steps": 2}
    (table, _), _ = ranks(trained, tmp_path / "out", json_of(tmp_path, 0), tiny_model("llama"), made_up(32), options)
    removed = (~table["kept"]).groupby(table["step"]).sum().to_numpy()
    assert len(set(removed)) > 1
    (file,) = (tmp_path / "out").rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    shown = [(event.step, event.value) for event in events.Scalars("train/influence/removed")]
    assert shown == [(2, removed[:2].mean()), (4, removed[2:].mean())]
    fractions = [event.value for event in events.Scalars("train/influence/removed_fraction")]
    assert fractions == pytest.approx([removed[:2].sum() / 16, removed[2:].sum() / 16])


def test_units_of_a_row_and_a_validation_set(ranks, tiny_model, tmp_path):
    """Trainer drops the columns of a dataset that the model does not take. Catches units that went with them."""
    rows = Dataset.from_list([{**row, "unit_ids": [0] * 6 + [1] * 10} for row in made_up(8)])
    options = {
        "influence": InfluenceConfig(unit="document", reference="validation", validation_sequences=2),
        "policy": PolicyConfig(rule="rate", rate=0.3),
        "reference": made_up(3, 12),
        "max_steps": 1,
    }
    (table, _), _ = ranks(trained, tmp_path / "out", json_of(tmp_path, 2), tiny_model("llama"), rows, options)
    assert table["tokens"].tolist() == [6, 9] * 8
    assert 0 < (~table["kept"]).sum() < 8


def test_a_smaller_last_batch_is_one(ranks, tiny_model, tmp_path):
    """15 sequences without even_batches: rank 1 is one short in the last micro-batch. Catches a rank that waits."""
    options = {"accelerator_config": {"even_batches": False}, "max_steps": 2, "policy": PolicyConfig(action="observe")}
    (table, _), _ = ranks(trained, tmp_path / "out", json_of(tmp_path, 2), tiny_model("llama"), made_up(15), options)
    assert table["position"].tolist() == list(range(15))


class Stream(torch.utils.data.IterableDataset):
    """Twelve sequences, which nobody knows before."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield from made_up(12)


@pytest.mark.slow
def test_the_end_of_an_epoch_that_fills_no_step(ranks, tiny_model, tmp_path):
    """12 sequences are 3 batches on each rank. Refused before the first step, unless the run ends before it comes; left
    out where nobody can know. Catches a step of fewer micro-batches, and one of two epochs'."""
    arguments = tmp_path / "out", json_of(tmp_path, 0), tiny_model("llama")
    for steps in ({"max_steps": 2}, {"max_steps": -1, "num_train_epochs": 1}):
        for message in ranks(refusal, *arguments, made_up(12), steps):
            assert (
                "an epoch has 3 batches on each rank, and the last of its steps would have only 1 of its 2" in message
            )
    (known, _), _ = ranks(trained, *arguments, made_up(12), {"max_steps": 1})
    (stream, _), _ = ranks(trained, *arguments, Stream(), {"max_steps": 2})
    assert known["position"].tolist() == list(range(8))
    assert stream["step"].tolist() == [1] * 8 + [2] * 8
    np.testing.assert_allclose(stream["loss"][:8], known["loss"], rtol=1e-6)


def refused_arguments(model: Path, options: dict[str, Any]) -> str:
    with nothing_stays():
        arguments = TrainingArguments("unused", report_to="none", **options)
        with pytest.raises(ValueError) as error:  # noqa: PT011
            InfluenceTrainer(AutoModelForCausalLM.from_pretrained(model), arguments)
        return str(error.value)


def test_without_deepspeed_or_with_a_part_of_its_ranks_it_is_refused(ranks, tiny_model, tmp_path):
    """Catches a Trainer without scores, and one that trains on each rank for itself (accelerate's on a CPU)."""
    for message in ranks(refused_arguments, tiny_model("llama"), {"use_cpu": True}):
        assert "give TrainingArguments(deepspeed=...)" in message
    for message in ranks(refused_arguments, tiny_model("llama"), {"deepspeed": str(json_of(tmp_path, 0))}):
        assert "sees 1 of 2 ranks" in message
        assert "TrainingArguments(use_cpu=True)" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "without label_smoother"),
        ({"neftune_noise_alpha": 5.0}, "without neftune_noise_alpha"),
        ({"policy": PolicyConfig(rule="top", pool=2)}, "reads more than Trainer hands over"),
        ({"policy": PolicyConfig(rule="mixture")}, "moves the order of pipeline.train's own data"),
        ({"influence": InfluenceConfig(estimator="ghost")}, '"managed_gradient_accumulation": false'),
        ({"per_device_train_batch_size": 1}, "train_micro_batch_size_per_gpu=2 vs hf per_device_train_batch_size=1"),
    ],
)
def test_what_does_not_go_together_is_refused(ranks, tiny_model, tmp_path, options, message):
    for found in ranks(refusal, tmp_path / "out", json_of(tmp_path, 0), tiny_model("llama"), made_up(16), options):
        assert message in found


def test_a_model_that_trainer_compiles_is_refused(ranks, tiny_model, tmp_path):
    """Catches hooks that a compiled graph leaves out. Trainer compiles after the model was looked at."""
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    arguments = (tmp_path / "out", json_of(tmp_path, 0), tiny_model("llama"), made_up(16), compiled)
    for message in ranks(refusal, *arguments):
        assert "hooks that watch its layers do not go with torch.compile" in message


def test_a_run_of_broken_steps_stops_by_the_policy(ranks, tiny_model, tmp_path):
    """Catches a Trainer that goes on with losses that are no numbers."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = torch.nan
    model.save_pretrained(tmp_path / "broken")
    # One sequence of every step.
    rows = [{"input_ids": [1] * 15 + [7 if number % PER_STEP == 0 else 1]} for number in range(STEPS * PER_STEP)]
    options = {"policy": PolicyConfig(stop_after_non_finite=2)}
    with pytest.raises(AssertionError, match=r"FloatingPointError: stopped after step 2: in 2 steps in a row"):
        ranks(trained, tmp_path / "out", json_of(tmp_path, 0), tmp_path / "broken", rows, options)
