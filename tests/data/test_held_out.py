"""What `data.eval_fraction` holds out of the training files: a function of the texts."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.schema import Config
from pipeline.config.schema_data import SourceConfig
from pipeline.data.held_out import is_held_out
from pipeline.data.prepared import ensure_prepared, load_fingerprint, load_report, prepare
from pipeline.data.tokenizer import train_tokenizer
from pipeline.train import train
from tests.corpora import make_config, remade, text_of, write
from tests.runs import ADAM, config_of, deepspeed_json


def texts_of(config: Config, split: str) -> list[str]:
    """Of the documents of a split, by the files and lines on record."""
    rows = pq.read_table(Path(config.data.prepared_dir, "documents", f"{split}.parquet")).to_pylist()
    lines = {row["file"]: Path(row["file"]).read_text().splitlines() for row in rows}
    return sorted(json.loads(lines[row["file"]][row["line"] - 1])["text"] for row in rows)


def write_texts(path: Path, texts: Iterable[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def prepared(directory: Path, files: Any, **data: Any) -> Config:
    directory.mkdir()
    config = make_config(directory, "train", files, **{"eval_fraction": 0.3} | data)
    prepare(config)
    return config


def test_the_two_parts_are_all_and_have_no_text_in_common(tmp_path):
    """Copies, also with other white space at their ends, in one file and in two, go where the first goes."""
    copies = [f" {text_of(index)}\n" for index in range(0, 60, 3)]
    files = [
        write(tmp_path / "a.jsonl", 60),
        write_texts(tmp_path / "b.jsonl", [*copies, *(f"one {n}" for n in range(9))]),
    ]
    config = prepared(tmp_path / "p", files)
    every = sorted(json.loads(line)["text"] for file in files for line in Path(file).read_text().splitlines())
    trained, held_out = texts_of(config, "train"), texts_of(config, "eval")
    assert sorted(trained + held_out) == every
    assert not {text.strip() for text in trained} & {text.strip() for text in held_out}
    assert len(trained) > len(held_out) > 0
    report = load_report(config.data.prepared_dir)
    assert report["eval"]["overlap"] == {"train": 0}
    assert report["train"]["documents"] + report["eval"]["documents"] == len(every)


def test_what_is_held_out_knows_no_order_of_files_no_seed_and_no_mixture(tmp_path):
    a, b = write(tmp_path / "a.jsonl", 40), write(tmp_path / "b.jsonl", 40, first=40)
    first = texts_of(prepared(tmp_path / "one", [a, b]), "eval")
    assert texts_of(prepared(tmp_path / "two", [b, a], seed=5), "eval") == first
    mixture = {"x": SourceConfig(b, weight=3.0), "y": SourceConfig(a, weight=1.0)}
    mixed = prepared(tmp_path / "mixed", None, mixture=mixture)
    assert texts_of(mixed, "eval") == first
    assert set(texts_of(prepared(tmp_path / "more", [a, b], eval_fraction=0.5), "eval")) > set(first)


@given(st.text(), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_fraction_holds_out_what_a_smaller_one_does(text, one, other):
    assert is_held_out(text, max(one, other)) or not is_held_out(text, min(one, other))
    assert is_held_out(text, 1.0)
    assert not is_held_out(text, 0.0)


def test_of_many_texts_the_fraction_is_held_out():
    """Catches a threshold of too few bits, and one the wrong way round. (Standard deviation of the count: 27.)"""
    assert abs(sum(is_held_out(f"text {index}", 0.08) for index in range(10_000)) - 800) < 5 * 27


def test_the_fraction_is_on_record_and_another_is_noticed(tmp_path):
    config = prepared(tmp_path / "p", write(tmp_path / "a.jsonl", 40))
    assert load_fingerprint(config.data.prepared_dir)["eval_fraction"] == 0.3
    ensure_prepared(config)
    for change, named in (
        ({"eval_fraction": 0.2}, "eval_fraction: 0.3 -> 0.2"),
        ({"eval_fraction": None}, "eval_fraction: 0.3 -> 'absent'"),
        ({"max_eval_sequences": 1}, "max_eval_sequences: None -> 1"),
    ):
        with pytest.raises(ValueError, match=named):
            ensure_prepared(remade(config, **change))
    prepare(remade(config, eval_fraction=None))
    assert "eval_fraction" not in load_fingerprint(config.data.prepared_dir)


def test_bad_records_are_counted_once_and_judged_with_all_good_ones(tmp_path):
    """Of the held-out documents alone, 2 of so few would be more than `max_bad_fraction`."""
    config = prepared(tmp_path / "p", write(tmp_path / "a.jsonl", 60, bad=2), max_bad_fraction=0.05)
    report = load_report(config.data.prepared_dir)
    assert report["train"]["problems"] == {"malformed JSON": 2}
    assert report["eval"]["problems"] == {}


def test_a_tokenizer_is_not_trained_on_what_is_held_out(tmp_path):
    held_out = next(text for text in (f"{n} " + "zq" * 50 for n in range(1_000)) if is_held_out(text, 0.3))
    files = write_texts(tmp_path / "a.jsonl", [*(text_of(index) for index in range(40)), *[held_out] * 40])
    for fraction, known in ((None, True), (0.3, False)):
        config = make_config(tmp_path, "train", files, eval_fraction=fraction)
        assert any("zq" in token for token in train_tokenizer(config).get_vocab()) == known


def test_a_fraction_that_holds_out_nothing_is_refused_and_a_larger_one_works(tmp_path):
    config = make_config(tmp_path, "train", write(tmp_path / "a.jsonl", 10), eval_fraction=1e-9)
    with pytest.raises(ValueError, match=r"data\.eval_fraction 1e-09 holds out no document of so few; raise it"):
        prepare(config)
    prepare(remade(config, eval_fraction=0.5))
    with pytest.raises(ValueError, match=r"data\.train_files: no document in .* but what data\.eval_fraction holds"):
        prepare(remade(config, eval_fraction=1 - 1e-12))


def both(config: Config) -> dict[str, Any] | None:
    return train(config)


def test_a_run_evaluates_on_what_is_held_out(ranks, corpus, tiny_model, tmp_path):
    """Two ranks, ZeRO 2: figures before, between and after, of all held-out tokens."""
    config = config_of(
        corpus,
        tmp_path / "run",
        tiny_model("llama"),
        deepspeed_json(tmp_path / "ds.json", 2, optimizer=ADAM),
        max_steps=4,
        data__prepared_dir=tmp_path / "prepared",
        data__eval_fraction=0.2,
        observe__eval_every_steps=2,
    )
    summary, _ = ranks(both, config)
    assert list(summary["evaluations"]) == [0, 2, 4]
    part = load_report(config.data.prepared_dir)["eval"]
    # No label: the first token of each row, and padding.
    assert summary["evaluation_after"]["all"]["tokens"] == part["tokens"] - part["sequences"]
    assert summary["evaluation_after"]["all"]["loss"] < summary["evaluation_before"]["all"]["loss"]
