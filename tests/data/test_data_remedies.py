"""What messages about data, tokenizers and prepared datasets tell a user to do, done: the refusal, then each remedy."""

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from pipeline.config.schema import Config
from pipeline.config.schema_data import DataConfig
from pipeline.data.leave_out import left_out
from pipeline.data.prepared import ensure_prepared, load_report, load_split, prepare
from pipeline.data.tokenizer import load_tokenizer, train_tokenizer
from tests.corpora import make_config, remade, write
from tests.tiny_models import save_tiny


@pytest.fixture
def config(tmp_path) -> Config:
    return make_config(tmp_path, "train", write(tmp_path / "f.jsonl", 20))


def refused(message: str, function: Callable[..., Any], *arguments: Any) -> None:
    with pytest.raises(ValueError, match=message):
        function(*arguments)


def named(config: Config, **model: Any) -> Config:
    return replace(config, model=replace(config.model, **model))


def test_files_that_are_none_yet(config, tmp_path):
    file = tmp_path / "g.jsonl"
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n")
    with_it = remade(config, train_files=[config.data.train_files, str(file)])
    refused("data.train_files: these files cannot be read:\n.*git lfs pull", prepare, with_it)
    write(file, 5, first=50)
    prepare(with_it)
    assert load_report(config.data.prepared_dir)["train"]["documents"] == 25


def test_lists_and_kinds_of_files(config, tmp_path):
    text = Path(config.data.train_files).read_text()
    (tmp_path / "f.json").write_text(text)
    refused("the list is empty; known are .jsonl", prepare, remade(config, train_files=[]))
    refused("f.json` is not a file of a known kind", prepare, remade(config, train_files=str(tmp_path / "f.json")))
    (tmp_path / "f.json").rename(tmp_path / "renamed.jsonl")
    for mended in ([str(tmp_path / "renamed.jsonl")], str(tmp_path / "r*.jsonl")):
        prepare(remade(config, train_files=mended))


def test_records_and_files_that_cannot_be_used(config, tmp_path):
    """Repaired, left out, allowed, or read by the right field."""
    bad, file = tmp_path / "bad.jsonl", config.data.train_files
    write(bad, 5, first=50, bad=1)
    with_bad = remade(config, train_files=[file, str(bad)])
    refused("Repair the files, or raise data.max_bad_fraction", prepare, with_bad)
    prepare(remade(with_bad, max_bad_fraction=0.1))
    write(bad, 5, first=50)
    prepare(with_bad)

    bad.write_text(json.dumps({"body": "text"}) + "\n")
    refused(r"no document in .*name the right field \(data.text_field\), or leave the file out", prepare, with_bad)
    prepare(config)
    prepare(remade(config, train_files=str(bad), text_field="body"))

    packed = tmp_path / "bad.jsonl.gz"
    packed.write_bytes(gzip.compress(Path(file).read_bytes())[:-9])
    with_packed = remade(config, train_files=[file, str(packed)])
    refused("is damaged .* Fetch or write it again, or leave the file out", prepare, with_packed)
    packed.write_bytes(gzip.compress(Path(write(bad, 3, first=90)).read_bytes()))
    prepare(with_packed)

    (tmp_path / "empty.txt").write_text(" ")
    of_spaces = remade(config, train_files=str(tmp_path / "empty.txt"), max_bad_fraction=1.0)
    refused("data.train_files: no document in", prepare, of_spaces)
    noise = {"planted_noise": 0.5, "planted_foreign_files": str(tmp_path / "empty.txt"), "max_bad_fraction": 1.0}
    refused("data.planted_foreign_files: no document in", prepare, remade(config, **noise))
    (tmp_path / "empty.txt").write_text("words")
    prepare(of_spaces)
    prepare(remade(config, **noise))


def test_text_in_another_encoding(config, tmp_path):
    (tmp_path / "f.txt").write_bytes("我们今天去公园散步，天气很好。".encode("utf-16-le"))
    other = remade(config, train_files=str(tmp_path / "f.txt"))
    refused("UTF-16 without a byte order mark, or ISO-2022\nRepair the files", prepare, other)
    for encoding in ("utf-8", "utf-16"):  # the latter writes a byte order mark
        (tmp_path / "f.txt").write_bytes("我们今天去公园散步，天气很好。".encode(encoding))
        prepare(other)


def test_what_is_held_out(config, tmp_path):
    both = remade(config, eval_files=config.data.train_files)
    refused("Leave it out of one of them; where it is meant, set data.allow_overlap to true", prepare, both)
    prepare(remade(both, allow_overlap=True))
    held_out = write(tmp_path / "e.jsonl", 3, first=70)
    prepare(config)
    refused("set data.eval_files and run `pipeline.prepare`", load_split, config.data.prepared_dir, "eval")
    prepare(remade(config, eval_files=held_out))
    assert len(load_split(config.data.prepared_dir, "eval"))


def test_prepared_directories(config, tmp_path):
    directory = Path(config.data.prepared_dir)
    refused("is no prepared dataset .*; run `pipeline.prepare`", load_report, directory)
    directory.mkdir()
    (directory / "notes").write_text("ten years")
    refused("exists and is no prepared dataset; remove it or choose another directory", prepare, config)
    prepare(remade(config, prepared_dir=str(tmp_path / "another")))
    (directory / "notes").unlink()
    directory.rmdir()
    prepare(config)
    assert load_report(directory)["train"]["documents"] == 20

    (directory / "notes").write_text("ten years")
    shorter = remade(config, sequence_length=16)
    refused("Run `python -m pipeline.prepare --config ...` to replace it, or choose another", ensure_prepared, shorter)
    refused("would delete notes, .* Move that away, or choose another directory", prepare, shorter)
    ensure_prepared(remade(shorter, prepared_dir=str(tmp_path / "third")))
    (directory / "notes").rename(tmp_path / "notes")
    prepare(shorter)
    ensure_prepared(shorter)


def test_documents_to_leave_out(tmp_path):
    file = tmp_path / "ids.txt"
    data = DataConfig("p", leave_out=str(file))
    refused("cannot be read .*; give a text file of ids, or a list", left_out, data, [range(8)])
    file.write_text("three")
    refused(r"holds `three`, which is no document id \(0, 1, ...\)", left_out, data, [range(8)])
    file.write_text("8")
    refused("there is no training document 8; ids run from 0 to 7", left_out, data, [range(8)])
    file.write_text("7")
    assert left_out(data, [range(8)]) == left_out(DataConfig("p", leave_out=[7]), [range(8)]) == [7]


def test_tokenizers(config, tmp_path):
    """Each remedy literally, as in the message: what is saved is loaded again."""
    load: Callable[[Config], Any] = lambda c: load_tokenizer(c) or train_tokenizer(c)  # noqa: E731
    refused("set model.tokenizer to a hub id or a local directory, or to `train`", load, named(config, tokenizer=None))
    assert load(named(config, tokenizer="train"))
    (tmp_path / "small.json").write_text('{"vocab_size": 100}')
    small = named(config, name_or_path=str(tmp_path / "small.json"))
    refused("vocab_size is 100; raise it to 257 at least", load, small)
    (tmp_path / "small.json").write_text('{"vocab_size": 257}')
    assert len(load(small)) == 257
    refused("name such a file, or a tokenizer", load, named(config, name_or_path=str(tmp_path)))
    refused("data.bos: a tokenizer that is trained here .* leave it out", load, remade(config, bos=True))
    refused("no tokenizer can be loaded from", load, named(config, tokenizer=str(tmp_path)))

    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")))
    words.save_pretrained(tmp_path / "words")
    bare = named(config, tokenizer=str(tmp_path / "words"))
    refused("has no eos token, which has to close every document; give it one", load, bare)
    assert load(remade(bare, eos=False)).eos_token is None
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "words")
    tokenizer.add_special_tokens({"eos_token": "<eos>"})
    tokenizer.save_pretrained(tmp_path / "ended")
    ended = named(config, tokenizer=str(tmp_path / "ended"))
    assert load(ended).eos_token_id == 2
    refused("has no bos token; leave data.bos out, or give it one", load, remade(ended, bos=True))
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tokenizer.save_pretrained(tmp_path / "begun")
    assert load(remade(named(config, tokenizer=str(tmp_path / "begun")), bos=True))


def test_models_that_cannot_take_the_tokens(config, tmp_path):
    """Another tokenizer, or a model that was enlarged by what the message names."""
    train_tokenizer(config).save_pretrained(tmp_path / "tokenizer")
    save_tiny("gpt2", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    model.resize_token_embeddings(290)
    model.save_pretrained(tmp_path / "small")
    small = named(config, name_or_path=str(tmp_path / "small"), tokenizer=str(tmp_path / "tokenizer"))
    refused(r"enlarge the model \(resize_token_embeddings, save_pretrained\)", prepare, small)
    model.resize_token_embeddings(300)
    model.save_pretrained(tmp_path / "large")
    prepare(named(small, name_or_path=str(tmp_path / "large")))
    long = remade(named(small, name_or_path=str(tmp_path / "large")), sequence_length=2000)
    with pytest.raises(ValueError, match=r"Set data.sequence_length to (\d+) at most") as told:
        prepare(long)
    prepare(remade(long, sequence_length=int(str(told.value).split()[-3])))
    refused("give a hub id, a directory with weights, or a model config", prepare, named(small, name_or_path="x.json"))
