"""What a resume takes from the JSON and what from the checkpoint, and what a run keeps of what it ran under."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.config.deepspeed_json import read_deepspeed_config
from pipeline.config.schema import Config
from pipeline.data.prepared import ensure_prepared
from pipeline.engine import deepspeed_engine
from pipeline.evidence.ledger_check import check_ledger
from pipeline.models.load import load_model
from pipeline.record import ledger
from pipeline.record.starts import start_of, starts_of
from pipeline.train import parse
from tests.runs import ADAM, config_of, deepspeed_json, run, weights

ALL_ALIKE = {"influence__estimator": "none"}


@pytest.fixture
def config_for(corpus, tiny_model, tmp_path):
    """A config of a run in `tmp_path`, with the settings of its DeepSpeed JSON apart from its overrides."""

    def make(name: str, stage: int = 2, json: dict[str, Any] | None = None, **overrides: Any) -> Config:
        deepspeed = deepspeed_json(
            tmp_path / "json" / f"{len(list(tmp_path.glob('json/*')))}.json", stage, **json or {}
        )
        options = {"checkpoint__every_steps": 2, "checkpoint__keep": 9} | overrides
        return config_of(corpus, tmp_path / name, tiny_model("llama"), deepspeed, **options)

    return make


def rates(run_dir: Path) -> dict[int, float]:
    """The learning rate of every step, as the run recorded it last."""
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    return {event.step: event.value for event in events.Scalars("train/lr")}


@pytest.mark.parametrize("stage", [0, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 3))])
def test_the_rate_of_the_json_is_applied_from_the_first_resumed_step(ranks, config_for, tmp_path, stage):
    """Catches the rate in the checkpoint's parameter groups, which DeepSpeed goes on with."""
    ranks(run, config_for("run", stage, max_steps=2, **ALL_ALIKE))
    before, moved = weights(tmp_path / "run" / "model"), {}
    for rate in (0.5, 0.05):
        shutil.copytree(tmp_path / "run", tmp_path / str(rate))
        sgd = {"optimizer": {"type": "SGD", "params": {"lr": rate}}}
        ranks(run, config_for(str(rate), stage, sgd, max_steps=3, resume="auto", **ALL_ALIKE))
        after = weights(tmp_path / str(rate) / "model")
        moved[rate] = torch.cat([(after[name] - before[name]).flatten() for name in before])
        assert rates(tmp_path / str(rate))[3] == pytest.approx(rate)
    assert float(moved[0.5].detach().norm()) > 1e-3
    torch.testing.assert_close(moved[0.05] * 10, moved[0.5], rtol=1e-3, atol=1e-5)


def after_loading(config: Config) -> dict[str, Any]:
    """What an engine that loaded `config.resume` would step with."""
    settings, checkpoint = read_deepspeed_config(config), Path(config.resume)
    ds_engine = deepspeed_engine.initialize(load_model(config.model, config.seed, settings), settings)
    deepspeed_engine.load_checkpoint(ds_engine, checkpoint, ["influence"])
    (group, *_) = ds_engine.basic_optimizer.param_groups
    found = {key: group[key] for key in ("lr", "eps", "weight_decay")}
    clipping = getattr(ds_engine.optimizer, "clip_grad", ds_engine.gradient_clipping())
    return found | {"betas": list(group["betas"]), "clipping": clipping, "rate": ds_engine.get_lr()[0]}


@pytest.mark.parametrize(
    ("stage", "bf16"), [(0, False), (0, True), (1, False), (1, True), (2, False), (3, False), (3, True)]
)
def test_optimizer_settings_and_clipping_are_the_jsons_and_moments_the_checkpoints(
    ranks, config_for, tmp_path, stage, bf16
):
    """Catches what DeepSpeed loads by itself: parameter groups of before and, at ZeRO 1 and 2, clipping of before."""
    half = {"bf16": {"enabled": bf16}}
    ranks(run, config_for("run", stage, half | {"optimizer": ADAM, "gradient_clipping": 1.0}, max_steps=2, **ALL_ALIKE))
    other = {"lr": 2e-4, "betas": [0.5, 0.7], "eps": 1e-5, "weight_decay": 0.25, "torch_adam": True}
    settings = half | {"optimizer": {"type": "AdamW", "params": other}, "gradient_clipping": 0.125}
    resumed = config_for("run", stage, settings, resume=tmp_path / "run" / "checkpoints" / "step-2", **ALL_ALIKE)
    for found in ranks(after_loading, resumed):
        expected = {key: value for key, value in other.items() if key != "torch_adam"}
        assert found == expected | {"clipping": 0.125, "rate": 2e-4}


def cosine(step: int, total: int, peak: float) -> float:
    """WarmupCosineLR of two linear warm-up steps from a tenth, begun at 0, down to a fifth; by hand."""
    at = step - 1
    if at < 2:
        return peak * (0.1 + 0.9 * at / 2)
    return peak * (0.2 + 0.8 * (1 + math.cos(math.pi * min(1, (at - 1) / (total - 2)))) / 2)


COSINE = {
    "total_num_steps": "auto",
    "warmup_num_steps": 2,
    "warmup_min_ratio": 0.1,
    "cos_min_ratio": 0.2,
    "warmup_type": "linear",
    "last_batch_iteration": 0,
}


@pytest.mark.parametrize(
    ("stage", "ranks_after"),
    [*(pytest.param(*other, marks=pytest.mark.slow) for other in ((0, 2), (1, 2), (2, 1))), (3, 2)],
)
def test_a_longer_run_has_the_longer_schedules_rate_from_its_first_step_on(
    ranks, one_rank, config_for, tmp_path, stage, ranks_after
):
    """Catches a first resumed step at the end of the short schedule, and the jump after it."""
    settings = {"optimizer": ADAM, "scheduler": {"type": "WarmupCosineLR", "params": COSINE}}
    ranks(run, config_for("run", stage, settings, max_steps=4, **ALL_ALIKE))
    longer = config_for("run", stage, settings, max_steps=8, resume="auto", **ALL_ALIKE)
    (ranks if ranks_after == 2 else one_rank)(run, longer)
    found = rates(tmp_path / "run")
    for step in range(1, 9):
        assert found[step] == pytest.approx(cosine(step, 4 if step <= 4 else 8, 1e-3)), step
    changed = starts_of(tmp_path / "run")[-1].changed
    assert "scheduler.params.total_num_steps: 4 -> 8, from here on" in changed
    assert any(each.startswith("the learning rate of step 5 is ") for each in changed)


def test_a_schedule_can_be_left_out_and_taken_up_again(ranks, config_for, tmp_path):
    """Catches the last rate of a schedule that is gone, and one that starts again at its beginning."""
    with_it = {"scheduler": {"type": "WarmupCosineLR", "params": COSINE | {"total_num_steps": 9}}}
    ranks(run, config_for("run", 2, with_it, max_steps=2, **ALL_ALIKE))
    ranks(run, config_for("run", 2, max_steps=4, resume="auto", **ALL_ALIKE))
    ranks(run, config_for("run", 2, with_it, max_steps=6, resume="auto", **ALL_ALIKE))
    expected = {step: 0.5 if step in (3, 4) else cosine(step, 9, 0.5) for step in range(1, 7)}
    assert rates(tmp_path / "run") == pytest.approx(expected)


def test_settings_that_cannot_change_in_a_run_are_refused_by_name_and_giving_them_back_works(
    ranks, config_for, tmp_path
):
    ranks(run, config_for("run", 3, {"optimizer": ADAM}, max_steps=2, **ALL_ALIKE))
    zero = {"stage": 3, "sub_group_size": 1000}
    adam = {"type": "AdamW", "params": ADAM["params"] | {"amsgrad": True}}
    refused = config_for("run", 3, {"optimizer": adam, "zero_optimization": zero}, max_steps=3, resume="auto")
    with pytest.raises(AssertionError, match="SystemExit: 2") as told:
        ranks(run, refused)
    assert "zero_optimization.sub_group_size: absent -> 1000" in str(told.value)
    assert "optimizer.params.amsgrad: absent -> True" in str(told.value)
    old = tmp_path / "run" / "deepspeed.step-0.json"
    ranks(run, config_for("run", 3, max_steps=3, resume="auto", deepspeed_config=old, **ALL_ALIKE))


def test_other_micro_batches_and_accumulation_go_on_where_the_samples_were(ranks, config_for, tmp_path):
    """Catches samples lost or repeated, and a verifier that takes the smaller part for wrong."""
    drop = {"policy__rule": "rate", "policy__rate": 0.3}
    ranks(run, config_for("run", 2, {"optimizer": ADAM}, max_steps=2, **drop))
    other = {"optimizer": ADAM, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}
    ranks(run, config_for("run", 2, other, max_steps=5, resume="auto", **drop))
    rows = ledger.read(tmp_path / "run").to_pandas()
    assert rows["position"].tolist() == list(range(2 * 4 + 3 * 16))
    summary, violations = check_ledger(tmp_path / "run")
    assert violations == []
    assert "56 units" in summary

    starts = starts_of(tmp_path / "run")
    assert [(each.step, each.position, each.sequences, each.accumulation) for each in starts] == [
        (0, 0, 4, 1),
        (2, 8, 8, 2),
    ]
    assert [start_of(starts, step).step for step in (1, 2, 3, 5)] == [0, 0, 2, 2]
    assert starts[1].checkpoint == str(tmp_path / "run" / "checkpoints" / "step-2")
    assert "gradient_accumulation_steps: 1 -> 2, from here on" in starts[1].changed
    assert parse("pipeline.train", ["--config", str(tmp_path / "run" / "config.step-2.yaml")]).resume == "auto"
    assert json.loads((tmp_path / "run" / "deepspeed.step-0.json").read_text())["gradient_accumulation_steps"] == 1
    assert json.loads((tmp_path / "run" / "deepspeed.step-2.json").read_text())["gradient_accumulation_steps"] == 2
    # The same ledger, said to be of one start, is not sound.
    (tmp_path / "run" / "start.step-2.json").unlink()
    assert any("step 3, micro-step 0 has 8 sequences" in each for each in check_ledger(tmp_path / "run")[1])


def test_an_older_checkpoint_gives_up_the_starts_after_it(ranks, config_for, tmp_path):
    ranks(run, config_for("run", max_steps=4, **ALL_ALIKE))
    ranks(run, config_for("run", max_steps=6, resume="auto", **ALL_ALIKE))
    half = tmp_path / "run" / "checkpoints" / "step-2"
    ranks(run, config_for("run", max_steps=5, resume=half, **ALL_ALIKE))
    assert [start.step for start in starts_of(tmp_path / "run")] == [0, 2]
    assert not (tmp_path / "run" / "config.step-4.yaml").exists()
    assert check_ledger(tmp_path / "run")[1] == []


def test_a_run_that_goes_on_from_anothers_checkpoint_has_a_sound_ledger_of_its_own(ranks, config_for, tmp_path):
    """Catches a verifier that misses the steps of the run before."""
    ranks(run, config_for("run", max_steps=2, **ALL_ALIKE))
    checkpoint = tmp_path / "run" / "checkpoints" / "step-2"
    ranks(run, config_for("other", max_steps=4, resume=checkpoint, **ALL_ALIKE))
    assert ledger.read(tmp_path / "other")["position"].to_pylist() == list(range(8, 16))
    assert check_ledger(tmp_path / "other")[1] == []


def test_an_end_before_the_checkpoint_is_refused_and_both_remedies_work(ranks, config_for, tmp_path):
    """Catches a run that reports a later checkpoint as if it had ended where it was asked to."""
    ranks(run, config_for("run", max_steps=4, **ALL_ALIKE))
    with pytest.raises(AssertionError, match="SystemExit: 2") as told:
        ranks(run, config_for("run", max_steps=3, resume="auto", **ALL_ALIKE))
    earlier = tmp_path / "run" / "checkpoints" / "step-2"
    assert "max_steps 3 is below the step of the checkpoint" in str(told.value)
    assert f"raise it to 4 or more, or go back with --resume {earlier}" in str(told.value)
    ranks(run, config_for("run", max_steps=4, resume="auto", **ALL_ALIKE))
    ranks(run, config_for("run", max_steps=3, resume=earlier, **ALL_ALIKE))
    assert ledger.read(tmp_path / "run")["step"].to_pylist()[-1] == 3


def test_a_prepared_dataset_trains_and_resumes_without_its_raw_files(ranks, corpus, config_for, tmp_path):
    """Catches a fingerprint that wants to read what was read long ago; what is still there is still looked at."""
    raw = [tmp_path / name for name in ("one.jsonl", "two.jsonl")]
    for path in raw:
        shutil.copy(corpus / "documents.jsonl", path)
    data = {"data__prepared_dir": tmp_path / "prepared", "data__train_files": json.dumps([str(path) for path in raw])}
    ranks(run, config_for("run", max_steps=2, **data, **ALL_ALIKE))
    raw[0].unlink()
    ranks(run, config_for("run", max_steps=3, resume="auto", **data, **ALL_ALIKE))
    raw[1].unlink()
    ranks(run, config_for("run", max_steps=4, resume="auto", **data, **ALL_ALIKE))
    ranks(run, config_for("anew", max_steps=1, **data, **ALL_ALIKE))
    assert check_ledger(tmp_path / "run")[1] == []
    raw[1].write_text('{"text": "something else"}\n')
    with pytest.raises(ValueError, match="was prepared from something else"):
        ensure_prepared(config_for("run", **data))


def test_an_unchanged_resume_is_said_to_change_nothing(ranks, config_for, tmp_path):
    """Catches differences that are none: "auto", what our loop adds, the order of keys."""
    settings = {"scheduler": {"type": "WarmupCosineLR", "params": COSINE}}
    ranks(run, config_for("run", 2, settings, max_steps=2))
    ranks(run, config_for("run", 2, settings, max_steps=2, resume="auto", influence__passes="score_first"))
    assert starts_of(tmp_path / "run")[-1].changed == []
