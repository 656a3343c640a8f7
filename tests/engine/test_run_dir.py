"""Whose a run directory is: nothing of anybody else's is moved, mixed or removed."""

import os
from pathlib import Path

import pytest

from pipeline.config.cli import to_yaml
from pipeline.config.ownership import lock_of
from pipeline.engine.checkpoints import checkpoints_of, move_aside, refuse_foreign_run_dir
from pipeline.train import main
from tests.runs import config_of, deepspeed_json, refusal_of, run

CONFIG = "run_dir: r\ndeepspeed_config: d\nmodel: {}\ndata: {}\n"


@pytest.mark.parametrize(
    "files",
    [
        {"thesis.tex": "ten years"},
        {"config.yaml": "defaults: [hydra]\n", "checkpoints": "x"},
        {"summary.json": "{}", "photo.jpg": ""},
    ],
)
def test_a_directory_that_no_run_made_is_refused_and_stays(tmp_path, files):
    (tmp_path / "run").mkdir()
    for name, text in files.items():
        (tmp_path / "run" / name).write_text(text)
    for refuse in (refuse_foreign_run_dir, move_aside):
        with pytest.raises(ValueError, match=r"was not made by an earlier run. Choose another run_dir, or empty this"):
            refuse(tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == set(files)
    refuse_foreign_run_dir(tmp_path / "another")
    for name in files:
        (tmp_path / "run" / name).unlink()
    move_aside(tmp_path / "run")


def test_a_file_is_no_run_directory(tmp_path):
    (tmp_path / "run").write_text("ten years")
    with pytest.raises(ValueError, match="is a file; choose another directory"):
        refuse_foreign_run_dir(tmp_path / "run")
    refuse_foreign_run_dir(tmp_path / "another")


@pytest.mark.parametrize("files", [{"config.yaml": CONFIG, "notes.md": ""}, {"plan.json": "{}"}])
def test_an_earlier_run_is_moved_aside_with_what_was_put_into_it(tmp_path, files):
    (tmp_path / "run").mkdir()
    for name, text in files.items():
        (tmp_path / "run" / name).write_text(text)
    move_aside(tmp_path / "run")
    assert {path.name for path in (tmp_path / "run.1").iterdir()} == set(files)


def test_hidden_files_make_no_run(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".gitkeep").touch()
    move_aside(tmp_path / "run")
    assert (tmp_path / "run" / ".gitkeep").exists()


def test_a_run_in_which_another_one_lives_is_not_moved(tmp_path, other):
    (tmp_path / "config.yaml").write_text(CONFIG)
    assert lock_of(tmp_path / "run").exists()
    with pytest.raises(ValueError, match=f"run in it is in use by process {other.pid}"):
        move_aside(tmp_path)


def test_a_second_training_is_refused_and_the_first_ones_directory_untouched(
    tmp_path,
    corpus,
    tiny_model,
    other,
    ranks,
):
    """Catches a new launch that moves a living run away, a resume that writes into its ledger, and ranks that wait for
    rank 0, which has ended."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(CONFIG)
    deepspeed = deepspeed_json(tmp_path / "ds.json")
    for resume in ("none", "auto"):
        config = config_of(corpus, tmp_path / "run", tiny_model("llama"), deepspeed, resume=resume)
        for refusal in ranks(refusal_of, run, config):
            assert f"in use by process {other.pid}" in refusal
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_a_dry_run_deletes_nobodys_directory(tmp_path, corpus, tiny_model, ranks):
    (tmp_path / "run.dry_run").mkdir()
    (tmp_path / "run.dry_run" / "thesis.tex").write_text("ten years")
    deepspeed = deepspeed_json(tmp_path / "ds.json")
    config = config_of(corpus, tmp_path / "run", tiny_model("llama"), deepspeed, dry_run="true")
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    for refusal in ranks(refusal_of, main, ["--config", str(tmp_path / "c.yaml")]):
        assert "thesis.tex" in refusal
    assert (tmp_path / "run.dry_run" / "thesis.tex").read_text() == "ten years"


def test_copies_that_people_make_of_checkpoints_are_left_alone(tmp_path):
    for name in ("step-5.keep", "step-best"):
        os.makedirs(tmp_path / "checkpoints" / name)
    assert checkpoints_of(str(tmp_path)) == {}
    assert Path(tmp_path, "checkpoints", "step-best").exists()
