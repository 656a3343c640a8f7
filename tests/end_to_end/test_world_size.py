"""A run goes on at another number of ranks, through DeepSpeed's universal checkpoint, as the run that it was."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config.cli import to_yaml
from pipeline.config.schema import Config
from pipeline.engine import deepspeed_engine
from pipeline.engine.checkpoints import damage_of
from pipeline.record import ledger
from tests.distributed import Ranks
from tests.end_to_end.test_launch import command
from tests.runs import ADAM, config_of, deepspeed_json, largest_difference, run, weights

STEPS = 6
GLOBAL_MICRO_BATCH = 4
SCHEDULE = {"type": "WarmupCosineLR", "params": {"total_num_steps": "auto", "warmup_num_steps": 2}}


@pytest.fixture(scope="module")
def config_for(corpus, tiny_model, tmp_path_factory) -> Callable[..., Config]:
    """Six steps under a ZeRO stage, with the same global micro-batch at any number of ranks, a checkpoint every third.

    Everything that a checkpoint carries matters to what comes after: moments, schedule, running average.
    """
    directory = tmp_path_factory.mktemp("world_size")

    def config(run_dir: Path, stage: int, ranks: int, optimizer: Any = ADAM, **overrides: Any) -> Config:
        zero = {"stage": stage} | ({"sub_group_size": 2000} if stage == 3 else {})
        name = f"{stage}-{ranks}-{optimizer['type']}.json"
        deepspeed = deepspeed_json(
            directory / name,
            micro=GLOBAL_MICRO_BATCH // ranks,
            accumulation=2,
            optimizer=optimizer,
            scheduler=SCHEDULE,
            gradient_clipping=1.0,
            zero_optimization=zero,
        )
        options: dict[str, Any] = {
            "max_steps": STEPS,
            "checkpoint__every_steps": 3,
            "influence__include_self": False,
            "influence__precondition": "adam_ema",
            "policy__rule": "rate",
            "policy__rate": 0.3,
        }
        return config_of(corpus, run_dir, tiny_model("gpt_neo"), deepspeed, **(options | overrides))

    return config


@pytest.fixture(scope="module")
def finished(config_for, tmp_path_factory) -> Callable[[Ranks, int, int], Path]:
    """The directory of a run that never changed its number of ranks, by stage and ranks."""
    found: dict[tuple[int, int], Path] = {}

    def directory(ranks: Ranks, stage: int, number: int) -> Path:
        if (stage, number) not in found:
            run_dir = tmp_path_factory.mktemp("finished") / "run"
            ranks(run, config_for(run_dir, stage, number))
            found[stage, number] = run_dir
        return found[stage, number]

    return directory


def assert_same_run(run_dir: Path, unbroken: Path) -> None:
    """The same samples, in the same order, with the same decisions, and to rounding the same figures and weights."""
    rows, expected = (ledger.read(directory).to_pandas().sort_values("position") for directory in (run_dir, unbroken))
    assert rows.position.tolist() == list(range(STEPS * 2 * GLOBAL_MICRO_BATCH))
    for column in ("step", "micro_step", "sample_id", "kept", "reason"):
        assert rows[column].tolist() == expected[column].tolist(), column
    assert not rows.kept.all()
    for column in ("loss", "score"):
        ours, theirs = (torch.tensor(table[column].tolist()) for table in (rows, expected))
        assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5, column
    assert largest_difference(weights(run_dir / "model"), weights(unbroken / "model")) < 1e-5
    # Nothing of the conversion is left, and what came after is a checkpoint like any other.
    assert not list(run_dir.glob("checkpoints/*/universal*"))
    assert damage_of(run_dir / "checkpoints" / f"step-{STEPS}") is None


CHANGES = [
    (2, 1, 2, 2),
    pytest.param(1, 2, 3, 3, marks=pytest.mark.slow),
    pytest.param(1, 2, 2, 2, marks=pytest.mark.slow),
    pytest.param(2, 1, 3, 3, marks=pytest.mark.slow),
    pytest.param(2, 2, 1, 2, marks=pytest.mark.slow),
    pytest.param(2, 1, 2, 1, marks=pytest.mark.slow),
    pytest.param(1, 2, 0, 0, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("before", "after", "old_stage", "stage"), CHANGES)
def test_a_run_goes_on_at_another_number_of_ranks_as_if_unbroken(
    ranks, one_rank, config_for, finished, tmp_path, before, after, old_stage, stage
):
    """Catches lost moments, a schedule or a sample order that starts again, and steps that Adam counts twice."""
    pools = {1: one_rank, 2: ranks}
    run_dir = tmp_path / "a run (with + in its name)"
    shutil.copytree(finished(pools[before], old_stage, before), run_dir)
    half = run_dir / "checkpoints" / f"step-{STEPS // 2}"
    pools[after](run, config_for(run_dir, stage, after, resume=half))
    assert_same_run(run_dir, finished(ranks, stage, 2))


@pytest.mark.slow
def test_a_plain_process_goes_on_where_two_ranks_had_finished(ranks, config_for, finished, tmp_path):
    """What a resume that was killed while it converted left behind does no harm."""
    run_dir = tmp_path / "run"
    shutil.copytree(finished(ranks, 2, 2), run_dir)
    newest = run_dir / "checkpoints" / f"step-{STEPS}"
    shutil.copytree(newest, newest / "universal-of-a-killed-one" / "whole")
    file = tmp_path / "alone.yaml"
    file.write_text(to_yaml(config_for(run_dir, 2, 1, resume="auto", max_steps=STEPS + 2)))
    done = command("pipeline.train", "--config", str(file))
    assert done.returncode == 0, done.stderr
    assert f"{newest} was written by other ranks" in done.stdout
    positions = ledger.read(run_dir)["position"].to_pylist()
    assert positions == list(range((STEPS + 2) * 2 * GLOBAL_MICRO_BATCH))


@pytest.mark.parametrize(("before", "after"), [pytest.param(3, 2, marks=pytest.mark.slow), (2, 3), (2, 0), (0, 1)])
def test_other_changes_of_stage_are_refused_and_the_remedy_works(ranks, config_for, finished, tmp_path, before, after):
    run_dir = tmp_path / "run"
    shutil.copytree(finished(ranks, before, 2), run_dir)
    shutil.rmtree(run_dir / "model")
    half = run_dir / "checkpoints" / f"step-{STEPS // 2}"
    with pytest.raises(AssertionError, match="SystemExit: 2") as refused:
        ranks(run, config_for(run_dir, after, 2, resume=half))
    assert f"engine.zero_stage: {before} -> {after}" in str(refused.value)
    assert "model.name_or_path = RUN_DIR/model" in str(refused.value)
    assert f"--max_steps {STEPS // 2} and the old deepspeed_config" in str(refused.value)
    if (before, after) == (3, 2):
        ranks(run, config_for(run_dir, before, 2, resume=half, max_steps=STEPS // 2))
        ranks(run, config_for(tmp_path / "anew", after, 2, model__name_or_path=run_dir / "model", max_steps=1))


def test_moments_of_another_optimizer_than_adam_are_refused_at_another_number_of_ranks(
    ranks, one_rank, config_for, tmp_path
):
    sgd = {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}
    ranks(run, config_for(tmp_path / "run", 2, 2, optimizer=sgd, max_steps=1))
    with pytest.raises(AssertionError, match="knows Adam and AdamW, not SGD: go on with as many ranks"):
        one_rank(run, config_for(tmp_path / "run", 2, 1, optimizer=sgd, max_steps=2, resume="auto"))


def convert(checkpoint: Path) -> str:
    """What every rank is told about a checkpoint that cannot be converted."""
    with pytest.raises(ValueError, match="could not be converted") as refused:
        deepspeed_engine._universal_form(checkpoint)
    return str(refused.value)


def test_a_conversion_that_fails_ends_all_ranks_with_its_reason(ranks, tmp_path):
    """Catches ranks that wait for ever for rank 0."""
    (tmp_path / "step-1").mkdir()
    for checkpoint, reason in [
        (tmp_path / "step-1", "can't find *_optim_states.pt"),
        (tmp_path / "no", "No such file"),
    ]:
        assert all(reason in told for told in ranks(convert, checkpoint))
    assert not list((tmp_path / "step-1").iterdir())
