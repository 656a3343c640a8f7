"""What is held out is not trained on: one file by any name is refused, one text in two files is counted."""

import json
import os

import pytest

from pipeline.data.prepared import ensure_prepared, load_report, prepare
from tests.corpora import make_config, remade, write


@pytest.mark.parametrize("name", ["glob", "symlink", "hard link", "other spelling", "folder link"])
@pytest.mark.parametrize("key", ["eval_files", "reference_files"])
def test_a_held_out_file_among_the_training_files_is_refused_by_whatever_name(tmp_path, name, key):
    shards = tmp_path / "shards"
    shards.mkdir()
    write(shards / "a.jsonl", 20)
    held_out = write(shards / "b.jsonl", 5, first=20)
    if name == "symlink":
        held_out = str(tmp_path / "link.jsonl")
        os.symlink(shards / "b.jsonl", held_out)
    elif name == "hard link":
        held_out = str(tmp_path / "hard.jsonl")
        os.link(shards / "b.jsonl", held_out)
    elif name == "other spelling":
        held_out = f"{shards}/../shards/b.jsonl"
    elif name == "folder link":
        os.symlink(shards, tmp_path / "folder")
        held_out = str(tmp_path / "folder" / "b.jsonl")
    config = make_config(tmp_path, "train", str(shards / "*.jsonl"), **{key: held_out})
    with pytest.raises(ValueError, match=rf"data\.{key}: .*b\.jsonl.* is among data\.train_files too"):
        prepare(config)
    prepare(remade(config, allow_overlap=True))
    with pytest.raises(ValueError, match="is among"):
        ensure_prepared(config)


def test_one_hub_corpus_written_in_two_ways_is_one(tmp_path):
    config = make_config(tmp_path, "train", "owner/name", eval_files="owner/name:train")
    with pytest.raises(ValueError, match=r"owner/name:train, which is owner/name, is among data\.train_files"):
        prepare(config)


@pytest.mark.slow
def test_builtin_holds_out_its_own_part(tmp_path):
    limits = {"max_sequences": 2, "max_eval_sequences": 2}
    files = write(tmp_path / "f.jsonl", 20)
    prepare(make_config(tmp_path, "train", [files, "builtin"], eval_files="builtin", **limits))
    assert load_report(tmp_path / "prepared")["eval"]["overlap"] == {"train": 0}


def test_equal_documents_in_files_of_their_own_are_counted_and_said(tmp_path, capfd):
    """Catches a comparison by file, by line or by subset."""
    texts = {"train": ["one", "two", "three", "four"], "eval": ["three\n", "five"], "reference": ["one", "five", "six"]}
    files = {}
    for split, own in texts.items():
        files[f"{split}_files"] = str(tmp_path / f"{split}.jsonl")
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in own))
    prepare(make_config(tmp_path, "train", **files))
    report = load_report(tmp_path / "prepared")
    assert list(report) == ["train", "eval", "reference"]
    assert report["eval"]["overlap"] == {"train": 1, "reference": 1}
    assert report["reference"]["overlap"] == {"train": 1}
    assert "overlap" not in report["train"]
    assert "eval  in common with train: 1 of 2 documents have the same text" in capfd.readouterr().err


def test_a_file_that_is_read_twice_is_said(tmp_path, capsys):
    file = write(tmp_path / "f.jsonl", 20)
    os.symlink(file, tmp_path / "g.jsonl")
    prepare(make_config(tmp_path, "train", [file, str(tmp_path / "g.jsonl")]))
    assert "are one file, which is read twice" in capsys.readouterr().out


def test_a_replacement_deletes_nothing_that_is_not_a_prepared_dataset(tmp_path):
    config = make_config(tmp_path, "train", write(tmp_path / "f.jsonl", 20))
    prepare(config)
    (tmp_path / "prepared" / "train" / "notes.md").write_text("ten years")
    with pytest.raises(ValueError, match=r"would delete train/notes\.md"):
        prepare(remade(config, sequence_length=16))
    assert (tmp_path / "prepared" / "train" / "notes.md").read_text() == "ten years"
    with pytest.raises(ValueError, match=r"run_dir must lie outside data\.prepared_dir"):
        remade(config, prepared_dir=str(tmp_path))
