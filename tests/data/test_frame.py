"""What stands around documents: the tokenizer's own, unless the config says otherwise; and rows that stay the same."""

import json
from pathlib import Path

import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from pipeline.config.differences import changes
from pipeline.data.fingerprint import fingerprint
from pipeline.data.frame import frame_of, in_words
from pipeline.data.prepared import load_report, load_split, prepare
from pipeline.data.tokenizer import encode, load_tokenizer, train_tokenizer
from tests.corpora import make_config, remade, write


@pytest.fixture
def tokenizers(tmp_path) -> dict[str, str]:
    """One trained tokenizer that adds nothing, and copies that add bos, and bos and eos, as Llama's and others do."""
    plain = train_tokenizer(make_config(tmp_path, "train", write(tmp_path / "f.jsonl", 50)))
    plain.save_pretrained(tmp_path / "plain")
    found = {"plain": str(tmp_path / "plain")}
    plain.add_special_tokens({"bos_token": plain.convert_ids_to_tokens(5)})
    for name, template in {"bos": "B $A", "both": "B $A E"}.items():
        ids = [("B", plain.bos_token_id), ("E", plain.eos_token_id)]
        plain.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
        plain.save_pretrained(tmp_path / name)
        found[name] = str(tmp_path / name)
    return found


@pytest.mark.parametrize(
    ("name", "keys", "frame"),
    [
        ("plain", {}, "TE"),
        ("plain", {"eos": True}, "TE"),
        ("plain", {"eos": False}, "T"),
        ("bos", {}, "BT"),
        ("bos", {"eos": True}, "BTE"),
        ("bos", {"bos": False, "eos": True}, "TE"),
        ("both", {}, "BTE"),
        ("both", {"eos": False}, "BT"),
        ("both", {"bos": False}, "TE"),
    ],
)
def test_documents_are_framed_as_the_tokenizer_does_or_as_the_config_says(tmp_path, tokenizers, name, keys, frame):
    (tmp_path / "one.txt").write_text("the quick brown fox")
    config = make_config(tmp_path, tokenizers[name], str(tmp_path / "one.txt"), **keys)
    prepare(config)
    [row] = load_split(config.data.prepared_dir, "train").to_list()
    own = [token for token, owner in zip(row["input_ids"], row["document_ids"], strict=True) if owner == 0]
    tokenizer = AutoTokenizer.from_pretrained(tokenizers[name])
    text = tokenizer("the quick brown fox", add_special_tokens=False)["input_ids"]
    parts = {"B": [tokenizer.bos_token_id], "T": text, "E": [tokenizer.eos_token_id]}
    assert own == [token for letter in frame for token in parts[letter]]
    assert load_report(config.data.prepared_dir)["train"]["frame"] == len(frame) - 1


def test_only_frames_other_than_an_eos_are_in_the_fingerprint(tmp_path, tokenizers):
    """Catches data prepared before there were frames being thrown away."""
    config = make_config(tmp_path, tokenizers["plain"], write(tmp_path / "f.jsonl", 5))
    made = fingerprint(config, load_tokenizer(config))
    assert "frame" not in made
    assert "frame" not in fingerprint(config, None)
    other = remade(config, eos=False)
    assert "frame" in changes(made, fingerprint(other, load_tokenizer(other)))
    assert "frame" in fingerprint(other, None)
    own = remade(config, tokenizer=tokenizers["bos"])
    assert fingerprint(own, load_tokenizer(own))["frame"] == "5 TEXT"


def test_a_frame_that_the_tokenizer_has_no_token_for_is_refused(tmp_path, tokenizers):
    config = make_config(tmp_path, tokenizers["plain"], write(tmp_path / "f.jsonl", 5), bos=True)
    with pytest.raises(ValueError, match=r"data\.bos: .* has no bos token"):
        load_tokenizer(config)
    with pytest.raises(ValueError, match=r"data\.bos"):
        train_tokenizer(config)


def test_a_bos_that_nobody_adds_is_said(tmp_path, tokenizers):
    directory = Path(tokenizers["bos"])
    settings = json.loads((directory / "tokenizer.json").read_text())
    settings["post_processor"] = None
    (directory / "tokenizer.json").write_text(json.dumps(settings))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert frame_of(tokenizer).before == []
    assert "set data.bos to true where the model was trained with it" in in_words(tokenizer, frame_of(tokenizer))
    plain = AutoTokenizer.from_pretrained(tokenizers["plain"])
    assert "data.bos" not in in_words(plain, frame_of(plain))


def test_a_text_without_tokens_does_not_end_the_batch(tmp_path, tokenizers, monkeypatch):
    """Catches the sign of a full split being taken from an empty document."""
    monkeypatch.setattr(
        "pipeline.data.packing.encode",
        lambda tokenizer, texts, frame: [ids[: 0 if "fox" in text else None] for ids, text in
                                         zip(encode(tokenizer, texts, frame), texts, strict=True)],
    )  # fmt: skip
    lines = [json.dumps({"text": text}) + "\n" for text in ["the fox", *["the quick brown"] * 9]]
    (tmp_path / "g.jsonl").write_text("".join(lines))
    config = make_config(
        tmp_path, tokenizers["plain"], str(tmp_path / "g.jsonl"), eos=False, max_sequences=9, max_bad_fraction=0.2
    )
    prepare(config)
    report = load_report(config.data.prepared_dir)["train"]
    assert (report["documents"], report["problems"]) == (9, {"no token in its text": 1})


def test_unbroken_text_trains_a_tokenizer_in_seconds(tmp_path):
    (tmp_path / "f.txt").write_text("a" * 1_000_000 + " " + "xyz" * 100_000)
    tokenizer = train_tokenizer(make_config(tmp_path, "train", str(tmp_path / "f.txt")))
    [tokens] = encode(tokenizer, ["a" * 5000])
    assert tokenizer.decode(tokens[:-1]) == "a" * 5000
