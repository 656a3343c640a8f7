import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.engine.checkpoint_files import load_weights
from pipeline.engine.checkpoints import damage_of, find_checkpoint, identity_of, publish, refuse_foreign
from pipeline.models.load import load_model
from pipeline.record import ledger
from pipeline.training.dry_run import _report
from tests.runs import config_of, deepspeed_json, largest_difference, run, weights


@pytest.fixture(scope="module")
def three_checkpoints(ranks, corpus, tiny_model, tmp_path_factory):
    """A finished run of three steps with a checkpoint at each, and its config."""
    directory = tmp_path_factory.mktemp("checkpoints")
    deepspeed = deepspeed_json(directory / "ds.json", stage=3)
    options = {"max_steps": 3, "checkpoint__every_steps": 1, "checkpoint__keep": 3}
    config = config_of(corpus, directory / "run", tiny_model("llama"), deepspeed, **options)
    ranks(run, config)
    return config, lambda run_dir: config_of(corpus, run_dir, tiny_model("llama"), deepspeed, resume="auto", **options)


def truncate(checkpoint: Path) -> None:
    path = next(checkpoint.glob("*optim_states.pt"))
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_byte(checkpoint: Path) -> None:
    path = next(checkpoint.glob("*optim_states.pt"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "truncated": (truncate, "bytes, not"),
    "a flipped byte": (flip_a_byte, "is corrupt in"),
    "a missing shard": (lambda checkpoint: next(checkpoint.glob("*rank_1*optim*")).unlink(), "is missing"),
    "never finished": (lambda checkpoint: (checkpoint / "manifest.json").unlink(), "never finished"),
    "damaged manifest": (lambda checkpoint: (checkpoint / "manifest.json").write_text("{"), "manifest.json is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_taken(three_checkpoints, tmp_path, capsys, damage):
    config, copy_of = three_checkpoints
    shutil.copytree(config.run_dir, tmp_path / "run")
    break_it, message = DAMAGES[damage]
    checkpoints = tmp_path / "run" / "checkpoints"
    assert damage_of(checkpoints / "step-3") is None
    break_it(checkpoints / "step-3")
    assert find_checkpoint(copy_of(tmp_path / "run")) == checkpoints / "step-2"
    printed = capsys.readouterr().out
    assert str(checkpoints / "step-3") in printed
    assert message in printed


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one_as_if_unbroken(ranks, three_checkpoints, tmp_path):
    config, copy_of = three_checkpoints
    shutil.copytree(config.run_dir, tmp_path / "run")
    truncate(tmp_path / "run" / "checkpoints" / "step-3")
    truncate(tmp_path / "run" / "checkpoints" / "step-2")
    ranks(run, copy_of(tmp_path / "run"))
    assert ledger.read(tmp_path / "run").equals(ledger.read(Path(config.run_dir)))
    assert largest_difference(weights(tmp_path / "run" / "model"), weights(Path(config.run_dir, "model"))) == 0
    assert damage_of(tmp_path / "run" / "checkpoints" / "step-3") is None


def test_no_whole_checkpoint_is_an_error_and_not_a_new_start(three_checkpoints, tmp_path):
    config, copy_of = three_checkpoints
    shutil.copytree(config.run_dir, tmp_path / "run")
    for checkpoint in (tmp_path / "run" / "checkpoints").glob("step-*"):
        truncate(checkpoint)
    with pytest.raises(ValueError, match=r"none of the checkpoints .* is whole; start anew with --resume none"):
        find_checkpoint(copy_of(tmp_path / "run"))
    assert find_checkpoint(replace(config, resume="none")) is None


def test_a_named_checkpoint_that_is_damaged_is_refused_and_none_before_it_is_taken(three_checkpoints, tmp_path):
    config, _ = three_checkpoints
    shutil.copytree(config.run_dir, tmp_path / "run")
    flip_a_byte(tmp_path / "run" / "checkpoints" / "step-2")
    checkpoints = tmp_path / "run" / "checkpoints"
    with pytest.raises(ValueError, match=r"step-2 cannot be used: .*; name another checkpoint, or auto"):
        find_checkpoint(replace(config, resume=str(checkpoints / "step-2")))
    assert find_checkpoint(replace(config, resume=str(checkpoints / "step-1"))) == checkpoints / "step-1"
    again = replace(config, run_dir=str(tmp_path / "run"), resume="auto")
    assert find_checkpoint(again) == checkpoints / "step-3"
    assert find_checkpoint(replace(config, run_dir=str(tmp_path / "nothing"), resume="auto")) is None


def test_a_directory_without_checkpoints_is_refused_and_what_is_asked_for_is_found(three_checkpoints, tmp_path):
    config, _ = three_checkpoints
    with pytest.raises(ValueError, match="holds no checkpoint; give RUN_DIR/checkpoints/step-N, or auto"):
        find_checkpoint(replace(config, resume=str(tmp_path)))
    for resume in ("auto", f"{config.run_dir}/checkpoints/step-3", f"{config.run_dir}/checkpoints"):
        found = find_checkpoint(replace(config, resume=resume))
        assert found == Path(config.run_dir, "checkpoints", "step-3")


def test_a_run_that_began_in_another_order_of_samples_is_refused(three_checkpoints, tmp_path):
    """Catches one that reads some rows twice and others never: checkpoints of an earlier version name no order."""
    config, _ = three_checkpoints
    checkpoint = Path(shutil.copytree(Path(config.run_dir, "checkpoints", "step-3"), tmp_path / "step-3"))
    identity = identity_of(checkpoint)
    refuse_foreign(checkpoint, identity)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    del manifest["identity"]["order"]
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"it differs .*\n  order: .* -> 'feistel'"):
        refuse_foreign(checkpoint, identity)


def test_weights_of_another_model_are_refused_and_those_of_the_named_one_are_loaded(three_checkpoints, tiny_model):
    config, _ = three_checkpoints
    checkpoint = Path(config.run_dir, "checkpoints", "step-3")
    with pytest.raises(ValueError, match=r"Name the one that it was trained from in model.name_or_path, or another"):
        load_weights(load_model(replace(config.model, name_or_path=str(tiny_model("gpt2"))), 0), checkpoint)
    load_weights(load_model(config.model, 0), checkpoint)


def test_a_dry_run_says_that_the_disk_is_too_small_and_fewer_checkpoints_fit(three_checkpoints, monkeypatch, capsys):
    config, _ = three_checkpoints
    size = sum(path.stat().st_size for path in Path(config.run_dir, "checkpoints", "step-3").rglob("*"))
    free = SimpleNamespace(free=size * 3)
    monkeypatch.setattr("pipeline.training.dry_run.shutil.disk_usage", lambda _: free)
    with pytest.raises(ValueError, match=r"make room, lower checkpoint.keep, or choose another run_dir"):
        _report(config, Path(config.run_dir), [1.0], [1.0, 1.0])
    _report(replace(config, checkpoint=replace(config.checkpoint, keep=1)), Path(config.run_dir), [1.0], [1.0, 1.0])
    free.free *= 2
    _report(config, Path(config.run_dir), [1.0], [1.0, 1.0])


@pytest.mark.parametrize("name", ["latest", "step-2/manifest.json"])
def test_a_checkpoint_that_cannot_be_published_says_so_and_the_one_before_stays_the_newest(
    three_checkpoints, tmp_path, name
):
    """As on a disk that is full just then."""
    config, copy_of = three_checkpoints
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.copytree(config.run_dir, tmp_path / "run")
    (checkpoints / "latest").write_text("step-1")
    (checkpoints / f"{name}.new").mkdir()
    with pytest.raises(OSError, match=r"step-2 could not be written .* The one before it is whole"):
        publish(checkpoints / "step-2", identity_of(checkpoints / "step-2"), keep=9)
    assert find_checkpoint(copy_of(tmp_path / "run")) == checkpoints / "step-1"
