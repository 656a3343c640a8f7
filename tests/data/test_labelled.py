"""Labelled texts: read, cut, framed, counted, noised; nothing in silence."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, BertTokenizerFast, PreTrainedTokenizerFast

from pipeline.config.schema import Config
from pipeline.config.schema_data import TaskConfig
from pipeline.data.prepared import ensure_prepared, load_answers, load_report, load_split, prepare
from pipeline.data.samples import training_samples
from tests.corpora import make_config
from tests.runs import CPU

WORDS = [f"w{number}" for number in range(40)]
COLOURS = ["red", "green", "blue"]


@pytest.fixture(scope="module")
def bert_tokenizer(tmp_path_factory) -> str:
    """[CLS] TEXT [SEP], with pairs and token types."""
    directory = tmp_path_factory.mktemp("bert")
    (directory / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizerFast(str(directory / "vocab.txt")).save_pretrained(directory / "saved")
    return str(directory / "saved")


def records(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [
        {
            "text": " ".join(WORDS[(number + place) % 40] for place in range(1 + number % 9)) + f" w{number}",
            "other": f"w{number % 7} w1",
            "label": COLOURS[number % 3],
        }
        for number in range(first, first + count)
    ]


def config_of(directory: Path, tokenizer: str, rows: list[dict[str, Any]], task: Any = None, **data: Any) -> Config:
    file = directory / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = make_config(directory, train_files=str(file), tokenizer=tokenizer, sequence_length=8, **data)
    return replace(config, task=task or TaskConfig(kind="sequence_classification"))


def places(config: Config, split: str = "train") -> list[dict[str, Any]]:
    return pq.read_table(Path(config.data.prepared_dir) / "documents" / f"{split}.parquet").to_pylist()


@pytest.mark.parametrize("pairs", [False, True])
def test_rows_are_what_the_tokenizer_makes_of_each_text_alone(tmp_path, bert_tokenizer, pairs):
    """Catches a missing [CLS] or [SEP], one cut away, and token types of the first text for both."""
    task = TaskConfig(kind="sequence_classification", pair_field="other" if pairs else None)
    config = config_of(tmp_path, bert_tokenizer, records(60), task)
    prepare(config)
    tokenizer = AutoTokenizer.from_pretrained(bert_tokenizer)
    rows = load_split(config.data.prepared_dir, "train").to_list()
    assert len(rows) == 60
    cut = 0
    for place, row in zip(places(config), rows, strict=True):
        record = records(60)[place["line"] - 1]
        texts = (record["text"], record["other"]) if pairs else (record["text"],)
        expected = tokenizer(*texts, truncation=True, max_length=8)
        size = len(expected["input_ids"])
        assert row["input_ids"] == expected["input_ids"] + [tokenizer.pad_token_id] * (8 - size)
        assert row["document_ids"] == [place["document_id"]] * size + [-1] * (8 - size)
        assert (row["label"], row["subset"]) == (record["label"], [record["label"]])
        if pairs:
            assert row["token_type_ids"] == expected["token_type_ids"] + [0] * (8 - size)
            assert 1 in row["token_type_ids"]
        cut += len(tokenizer(*texts)["input_ids"]) > 8
    report = load_report(config.data.prepared_dir)["train"]
    assert report["cut"] == cut == sum(place["cut"] for place in places(config)) > 0
    assert report["labels"] == {"blue": 20, "green": 20, "red": 20}


def test_a_text_that_spells_a_special_token_gets_none(tmp_path, bert_tokenizer):
    """Catches a text that would end, or become padding, in its middle."""
    rows = [{"text": "w1 [SEP] w2 [PAD]", "label": "red"}, {"text": "w3", "label": "blue"}]
    config = config_of(tmp_path, bert_tokenizer, rows)
    config = replace(config, data=replace(config.data, sequence_length=32))
    prepare(config)
    tokenizer = AutoTokenizer.from_pretrained(bert_tokenizer)
    for row in load_split(config.data.prepared_dir, "train").to_list():
        ids = [token for token, owner in zip(row["input_ids"], row["document_ids"], strict=True) if owner >= 0]
        assert ids.count(tokenizer.sep_token_id) == 1
        assert tokenizer.pad_token_id not in ids


def test_batches_end_with_their_longest_text_and_have_one_label_each(tmp_path, bert_tokenizer):
    config = config_of(tmp_path, bert_tokenizer, [row for row in records(40) if len(row["text"].split()) < 5])
    prepare(config)
    samples = training_samples(config.data.prepared_dir, 0, "sequence", None)
    answers = load_answers(config.data.prepared_dir)
    assert answers is not None
    rows = load_split(config.data.prepared_dir, "train")
    batch = samples.batch(0, 5, CPU)
    lengths = batch.others["attention_mask"].sum(1)
    assert batch.input_ids_BT.shape[1] == lengths.max() < 8
    assert len(lengths.unique()) > 1
    for row, unit in enumerate(batch.units):
        labels = batch.labels_BT[row]
        [at] = (labels >= 0).nonzero().flatten().tolist()
        assert at == lengths[row] - 1
        assert answers.classes[labels[at]] == rows[unit.sample_id]["label"]
    assert batch.tokens_U.tolist() == [1.0] * 5


def test_the_texts_end_is_where_the_tokenizers_own_end_begins_where_it_pads_with_eos(tmp_path):
    """A GPT-style tokenizer that ends texts with the token that also pads: such a model answers at the token before."""
    vocabulary = {"<eos>": 0, **{word: number for number, word in enumerate(WORDS, 1)}}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<eos>").save_pretrained(tmp_path / "saved")
    config = config_of(tmp_path, str(tmp_path / "saved"), records(12))
    prepare(config)
    batch = training_samples(config.data.prepared_dir, 0, "sequence", None).batch(0, 12, CPU)
    for ids, labels in zip(batch.input_ids_BT.tolist(), batch.labels_BT.tolist(), strict=True):
        at = max(place for place, token in enumerate(ids) if token != 0)
        assert [place for place, label in enumerate(labels) if label >= 0] == [at]


def test_flipped_labels_are_a_function_of_seed_and_text(tmp_path, bert_tokenizer):
    task = TaskConfig(kind="sequence_classification", label_noise=0.4)
    config = config_of(tmp_path, bert_tokenizer, records(600), task)
    prepare(config)
    given = {place["line"]: place for place in places(config)}
    flipped = {line for line, place in given.items() if place["label"] != place["true_label"]}
    assert 0.34 < len(flipped) / 600 < 0.46
    assert {line: place["true_label"] for line, place in given.items()} == {
        line: COLOURS[(line - 1) % 3] for line in given
    }
    pairs = {(place["true_label"], place["label"]) for place in given.values() if place["label"] != place["true_label"]}
    assert len(pairs) == 6  # any other label
    report = load_report(config.data.prepared_dir)["train"]
    assert report["planted"] == {"label": len(flipped)}
    assert report["subsets"]["planted/label"]["documents"] == len(flipped)

    turned = tmp_path / "turned"
    turned.mkdir()
    other = config_of(turned, bert_tokenizer, records(600)[::-1], task)
    prepare(other)
    assert {601 - place["line"] for place in places(other) if place["label"] != place["true_label"]} == flipped


def test_noisy_labels_of_a_set_are_trained_on_and_on_record_and_held_out_texts_have_true_ones(tmp_path, bert_tokenizer):
    """Catches an accuracy against noisy labels."""
    rows = [row | {"human": COLOURS[number % 2]} for number, row in enumerate(records(30))]
    task = TaskConfig(kind="sequence_classification", label_field="human", true_label_field="label")
    config = config_of(tmp_path, bert_tokenizer, rows, task)
    (tmp_path / "eval.jsonl").write_text(json.dumps(rows[2]) + "\n")
    config = replace(config, data=replace(config.data, eval_files=str(tmp_path / "eval.jsonl")))
    with pytest.raises(ValueError, match="no training text has the label 'blue'"):
        prepare(config)  # nobody gave one that label
    rows[5]["human"] = "blue"
    config = config_of(tmp_path, bert_tokenizer, rows, task)
    config = replace(config, data=replace(config.data, eval_files=str(tmp_path / "eval.jsonl")))
    prepare(config)
    found = {place["line"]: place for place in places(config)}
    assert {line: (place["label"], place["true_label"]) for line, place in found.items()} == {
        number + 1: (row["human"], row["label"]) for number, row in enumerate(rows)
    }
    wrong = sum(row["human"] != row["label"] for row in rows)
    assert load_report(config.data.prepared_dir)["train"]["planted"] == {"label": wrong}
    assert {place["subset"] for place in found.values() if place["label"] != place["true_label"]} == {"planted/label"}
    assert [(place["label"], place["subset"]) for place in places(config, "eval")] == [("blue", "blue")]


def test_tables_are_read_as_glue_writes_them(tmp_path, bert_tokenizer):
    """Catches a quote in a .tsv that swallows the lines behind it, and one in a .csv that does not."""
    (tmp_path / "a.tsv").write_text('text\tlabel\nw1 "w2\tred\nw3\tgreen\nw4\n')
    (tmp_path / "b.csv").write_text('label,text\n\nblue,"w5, w6\nw7"\n\n\n')
    config = make_config(
        tmp_path,
        train_files=[str(tmp_path / "a.tsv"), str(tmp_path / "b.csv")],
        tokenizer=bert_tokenizer,
        sequence_length=8,
        max_bad_fraction=0.5,
    )
    config = replace(config, task=TaskConfig(kind="sequence_classification"))
    prepare(config)
    assert {(Path(p["file"]).name, p["line"], p["label"]) for p in places(config)} == {
        ("a.tsv", 1, "red"),
        ("a.tsv", 2, "green"),
        ("b.csv", 2, "blue"),
    }
    report = load_report(config.data.prepared_dir)["train"]
    # Blank lines at the end are no fault.
    assert report["problems"] == {"another number of fields than the first line names": 1, "blank line": 1}


def test_records_without_a_label_or_a_second_text_are_counted(tmp_path, bert_tokenizer):
    rows = records(12)
    del rows[0]["label"]
    rows[1]["label"], rows[2]["label"], rows[3]["other"] = 1.5, "", "  "
    task = TaskConfig(kind="sequence_classification", pair_field="other")
    config = config_of(tmp_path, bert_tokenizer, rows, task, max_bad_fraction=0.9)
    prepare(config)
    report = load_report(config.data.prepared_dir)["train"]
    assert report["documents"] == 8
    assert report["problems"] == {
        "no label field `label`": 2,
        "label field `label` is neither a string nor an integer": 1,
        "no text in the field `other`": 1,
    }


def test_labels_that_are_numbers_are_in_the_order_of_numbers(tmp_path, bert_tokenizer):
    rows = [row | {"label": number % 11} for number, row in enumerate(records(44))]
    config = config_of(tmp_path, bert_tokenizer, rows)
    prepare(config)
    answers = load_answers(config.data.prepared_dir)
    assert answers is not None
    assert answers.classes == [str(number) for number in range(11)]


def test_one_label_is_refused_and_so_is_a_held_out_one_that_nobody_trains(tmp_path, bert_tokenizer):
    config = config_of(tmp_path, bert_tokenizer, [row | {"label": "red"} for row in records(6)])
    with pytest.raises(ValueError, match="all training texts have the label red, so there is nothing to learn"):
        prepare(config)
    config = config_of(tmp_path, bert_tokenizer, records(6))
    held_out = tmp_path / "eval.jsonl"
    held_out.write_text(json.dumps({"text": "w1", "label": "pink"}) + "\n")
    config = replace(config, data=replace(config.data, eval_files=str(held_out)))
    with pytest.raises(ValueError, match=r"data\.eval_files: no training text has the label 'pink'; the labels"):
        prepare(config)
    held_out.write_text(json.dumps({"text": "w1", "label": "red"}) + "\n")
    prepare(config)


def test_a_tokenizer_that_cannot_pad_is_refused(tmp_path):
    plain = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=plain).save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="has neither a pad nor an eos token to fill rows with"):
        prepare(config_of(tmp_path, str(tmp_path / "saved"), records(6)))


def test_other_task_keys_are_another_dataset(tmp_path, bert_tokenizer):
    config = config_of(tmp_path, bert_tokenizer, records(12))
    prepare(config)
    other = replace(config, task=TaskConfig(kind="sequence_classification", label_field="other"))
    with pytest.raises(ValueError, match=r"task\.label_field: 'label' -> 'other'"):
        ensure_prepared(other)
