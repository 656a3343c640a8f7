"""Tokenizers: trained to any text and the same each time, or refused with a remedy."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pipeline.config.schema import Config, ModelConfig
from pipeline.data import tokenizer as module
from pipeline.data.tokenizer import encode, load_tokenizer, train_tokenizer
from tests.corpora import make_config, write


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> PreTrainedTokenizerBase:
    directory = tmp_path_factory.mktemp("tokenizer")
    return train_tokenizer(make_config(directory, "train", write(directory / "f.jsonl", 50)))


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=60))
def test_a_trained_tokenizer_gives_any_text_back(trained, text):
    [tokens] = encode(trained, [text])
    assert trained.decode(tokens[:-1]) == text
    assert tokens[-1] == trained.eos_token_id


def test_a_tokenizer_is_trained_to_the_size_of_the_model_and_the_same_each_time(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TOKENIZER_CHARACTERS", 200_000)
    config = make_config(tmp_path, "train", "builtin")
    one, two = train_tokenizer(config), train_tokenizer(config)
    assert one.backend_tokenizer.to_str() == two.backend_tokenizer.to_str()
    assert len(one) == 300
    assert one.eos_token == "<|endoftext|>"


def test_a_saved_tokenizer_is_loaded_by_its_directory_and_one_to_be_trained_is_not(tmp_path, trained):
    trained.save_pretrained(str(tmp_path / "saved"))
    loaded = load_tokenizer(make_config(tmp_path, str(tmp_path / "saved"), "builtin"))
    assert loaded is not None
    assert loaded.get_vocab() == trained.get_vocab()
    assert load_tokenizer(make_config(tmp_path, "train", "builtin")) is None


def test_tokenizers_that_cannot_serve_are_refused_with_a_remedy(tmp_path):
    config = make_config(tmp_path, "train", write(tmp_path / "f.jsonl", 5))
    no_eos = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    no_eos.save_pretrained(str(tmp_path / "no_eos"))
    (tmp_path / "tiny.json").write_text('{"vocab_size": 100}')
    for model, message in [
        (ModelConfig(str(tmp_path / "model.json")), "set model.tokenizer to a hub id"),
        (ModelConfig(str(tmp_path), "train"), r"takes its vocabulary size from a model config \(\*\.json\)"),
        (ModelConfig(str(tmp_path / "tiny.json"), "train"), "raise it to 257 at least"),
        (ModelConfig("x", str(tmp_path / "no_eos")), "has no eos token"),
        (ModelConfig("x", str(tmp_path)), "no tokenizer can be loaded"),
    ]:
        other = Config(config.run_dir, config.deepspeed_config, model, config.data)
        with pytest.raises(ValueError, match=message):
            _ = load_tokenizer(other) or train_tokenizer(other)
