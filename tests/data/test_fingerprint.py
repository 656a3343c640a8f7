"""Fingerprints: what changes the rows changes them, what does not does not, and the difference is named."""

import json

import pytest

from pipeline.config.differences import changes
from pipeline.config.schema import Config
from pipeline.data.fingerprint import fingerprint
from pipeline.data.tokenizer import load_tokenizer, train_tokenizer
from tests.corpora import make_config, remade, write


@pytest.fixture
def config(tmp_path) -> Config:
    return make_config(tmp_path, "train", write(tmp_path / "f.jsonl", 20))


def differences(old: Config, new: Config) -> str:
    return changes(fingerprint(old, load_tokenizer(old)), fingerprint(new, load_tokenizer(new)))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({}, ""),
        ({"prepared_dir": "elsewhere", "max_bad_fraction": 0.5}, ""),
        ({"seed": 1}, "  seed: 0 -> 1"),
        ({"sequence_length": 16}, "  sequence_length: 32 -> 16"),
        ({"text_field": "body"}, "  text_field: 'text' -> 'body'"),
        ({"subset_field": "body"}, "  subset_field: 'meta.pile_set_name' -> 'body'"),
        ({"max_sequences": 3}, "  max_sequences: None -> 3"),
        ({"max_eval_sequences": 3}, "  max_eval_sequences: None -> 3"),
        ({"train_files": "owner/name"}, "  train_files.0.hub: 'absent' -> 'owner/name'"),
    ],
)
def test_other_settings_are_named(config, change, named):
    assert named in differences(config, remade(config, **change)).split("\n")


def test_changed_content_of_the_same_size_is_noticed_and_a_moved_file_is_not(config, tmp_path):
    before = fingerprint(config, None)
    (tmp_path / "elsewhere").mkdir()
    moved = (tmp_path / "f.jsonl").rename(tmp_path / "elsewhere" / "f.jsonl")
    after = remade(config, train_files=str(moved))
    assert fingerprint(after, None) == before
    moved.write_bytes(moved.read_bytes().replace(b"s1", b"s9", 1))
    assert changes(before, fingerprint(after, None)).startswith("  train_files.0.blake2b: '")


def test_a_tokenizer_is_known_by_its_content_and_not_by_its_place_or_settings_file(config, tmp_path):
    tokenizer = train_tokenizer(config)
    for name in "one", "two":
        tokenizer.save_pretrained(str(tmp_path / name))
    one, two = (remade(config, tokenizer=str(tmp_path / name)) for name in ("one", "two"))
    settings = json.loads((tmp_path / "two" / "tokenizer_config.json").read_text())
    (tmp_path / "two" / "tokenizer_config.json").write_text(json.dumps(settings | {"padding_side": "left"}))
    assert differences(one, two) == ""
    content = json.loads((tmp_path / "two" / "tokenizer.json").read_text())
    content["model"]["merges"].pop()
    (tmp_path / "two" / "tokenizer.json").write_text(json.dumps(content))
    assert differences(one, two).startswith("  tokenizer.blake2b: '")
    assert "  tokenizer.trained: 300 -> 'absent'" in differences(config, one).split("\n")


def test_many_changes_are_counted_after_the_first_twenty():
    lines = changes({"files": list(range(30))}, {"files": list(range(1, 31))}).split("\n")
    assert lines[0] == "  files.0: 0 -> 1"
    assert (len(lines), lines[-1]) == (21, "  ... and 10 more")


def test_a_fingerprint_survives_json(config):
    made = fingerprint(remade(config, train_files="builtin", eval_files="builtin"), None)
    assert changes(json.loads(json.dumps(made)), made) == ""
