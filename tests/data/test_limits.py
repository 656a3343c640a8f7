"""A model that cannot take the data is refused before the hours of preparing, and before training on what is there."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.config.schema import Config, ModelConfig
from pipeline.data.prepared import ensure_prepared, prepare
from pipeline.data.tokenizer import train_tokenizer
from pipeline.models.load import load_model
from tests.corpora import make_config, remade, write
from tests.tiny_models import tiny


@pytest.fixture
def config(tmp_path) -> Config:
    made = make_config(tmp_path, "train", write(tmp_path / "f.jsonl", 20))
    train_tokenizer(made).save_pretrained(tmp_path / "tokenizer")
    return remade(made, tokenizer=str(tmp_path / "tokenizer"))


def smaller(config: Config, **changes: int) -> Config:
    path = Path(f"{config.run_dir}.smaller.json")
    path.write_text(json.dumps(json.loads(Path(config.model.name_or_path).read_text()) | changes))
    return replace(config, model=ModelConfig(str(path), config.model.tokenizer))


def test_ids_beyond_the_vocabulary_are_refused_before_preparing_and_after(config, tmp_path):
    for refuse in (prepare, ensure_prepared):
        with pytest.raises(
            ValueError, match=r"model\.tokenizer: the token .* has id 299, and the vocabulary .* at 298"
        ):
            refuse(smaller(config, vocab_size=299))
        assert not list(tmp_path.glob("prepared*"))
    prepare(config)
    with pytest.raises(ValueError, match="ends at 298"):
        ensure_prepared(smaller(config, vocab_size=299))


def test_a_model_that_was_enlarged_as_the_message_says_takes_the_tokenizer(config, tmp_path):
    """Catches a table that is not saved at its new size, tied or not."""
    for kind in ("llama", "gpt_neo"):
        model = tiny(kind)
        model.resize_token_embeddings(299)
        model.save_pretrained(tmp_path / kind)
        small = replace(config, model=ModelConfig(str(tmp_path / kind), config.model.tokenizer))
        with pytest.raises(ValueError, match=r"enlarge the model \(resize_token_embeddings, save_pretrained\)"):
            prepare(small)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / kind)
        model.resize_token_embeddings(300)
        model.save_pretrained(tmp_path / kind)
        prepare(small)
        assert load_model(small.model, 0).get_output_embeddings().weight.shape[0] == 300


def test_an_eos_beyond_the_vocabulary_is_refused_and_a_special_token_that_is_in_no_text_is_not(config, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(tmp_path / "padded")
    prepare(remade(config, tokenizer=str(tmp_path / "padded")))
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    tokenizer.save_pretrained(tmp_path / "ended")
    with pytest.raises(ValueError, match="its eos has id 301"):
        prepare(remade(config, tokenizer=str(tmp_path / "ended")))


def test_a_sequence_longer_than_the_table_of_positions_is_refused_and_computed_positions_are_said(
    config, tmp_path, capsys
):
    with pytest.raises(ValueError, match=r"data\.sequence_length is 65, .* positions for 64 tokens .*wpe: 64 rows"):
        prepare(remade(config, sequence_length=65))
    prepare(remade(config, sequence_length=64))
    tiny("llama").save_pretrained(tmp_path / "llama")
    rotary = replace(config, model=ModelConfig(str(tmp_path / "llama"), config.model.tokenizer))
    prepare(replace(rotary, data=replace(rotary.data, sequence_length=65)))
    assert "more than the 64 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["{}", '{"model_type": "no such"}', "not json"])
def test_a_model_that_is_none_is_refused_before_preparing(config, tmp_path, content):
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(ValueError, match=r"model\.name_or_path: no model could be loaded"):
        prepare(replace(config, model=ModelConfig(str(tmp_path / "bad.json"), config.model.tokenizer)))
