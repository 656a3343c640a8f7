"""A corpus prepared in shards and put together: the one that is prepared in one go, in another order."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from pipeline.config.schema import Config
from pipeline.config.schema_data import SourceConfig
from pipeline.data.corpus import read_documents
from pipeline.data.document import SHARD, Document, document_ids
from pipeline.data.prepared import ensure_prepared, load_fingerprint, load_report, load_split, prepare
from pipeline.data.shards import Shard, merge, prepare_shard
from pipeline.data.tokenizer import train_tokenizer
from pipeline.evidence.explain import explain_document
from pipeline.evidence.ledger_check import check_ledger
from pipeline.prepare import main
from pipeline.train import train
from tests.corpora import make_config, remade, write
from tests.runs import ADAM, config_of, deepspeed_json

SIZES = (40, 11, 25, 3, 18)
"""Documents of each training file."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    directory = tmp_path_factory.mktemp("tokenizer")
    config = make_config(directory, "train", write(directory / "f.jsonl", 50))
    train_tokenizer(config).save_pretrained(str(directory / "saved"))
    return str(directory / "saved")


@pytest.fixture(scope="module")
def merged(tokenizer, tmp_path_factory) -> Config:
    """Of two shards, the second made before the first; with held-out files, of which ten documents are trained on."""
    directory = tmp_path_factory.mktemp("merged")
    config = sharded(directory, tokenizer, eval_files=write(directory / "eval.jsonl", 20, first=30))
    for number in (2, 1):
        prepare_shard(config, Shard(number, 2))
    merge(config, 2)
    return config


def sharded(directory: Path, tokenizer: str, **data: Any) -> Config:
    firsts = [sum(SIZES[:place]) for place in range(len(SIZES))]
    files = [
        write(directory / f"{n}.jsonl", size, first=first)
        for n, size, first in zip("abcde", SIZES, firsts, strict=True)
    ]
    return make_config(directory, tokenizer, files, **data)


def in_one_go(config: Config, directory: Path) -> Config:
    config = remade(config, prepared_dir=str(directory / "one"))
    prepare(config)
    return config


def tokens_by_place(config: Config, split: str = "train") -> dict[tuple[str, int], list[int]]:
    """The tokens of every document in the rows, by its file and line on record."""
    places = pq.read_table(Path(config.data.prepared_dir, "documents", f"{split}.parquet")).to_pylist()
    found: dict[int, list[int]] = {place["document_id"]: [] for place in places}
    assert len(found) == len(places), "an id twice"
    for row in load_split(config.data.prepared_dir, split):
        for token, document in zip(row["input_ids"], row["document_ids"], strict=True):
            if document >= 0:
                found[document].append(token)
    return {(place["file"], place["line"]): found[place["document_id"]] for place in places}


def test_every_document_is_there_once_with_its_own_tokens_and_place(merged, tokenizer):
    """Catches files that no shard reads or two do, ids that two shards give, and places of another shard."""
    made = AutoTokenizer.from_pretrained(tokenizer)
    documents = read_documents(merged.data.train_files, merged.data, "train")
    slow = {
        (d.file, d.line): [*made(d.text, add_special_tokens=False)["input_ids"], made.eos_token_id]
        for d in documents
        if isinstance(d, Document)
    }
    assert tokens_by_place(merged) == slow
    ids = document_ids(load_report(merged.data.prepared_dir)["train"])
    assert [len(part) for part in ids] == [40 + 25 + 18, 11 + 3]
    assert ids[1][0] == SHARD


def test_figures_are_those_of_one_go(merged, tmp_path):
    whole, parts = (load_report(config.data.prepared_dir) for config in (in_one_go(merged, tmp_path), merged))
    assert parts["eval"] == whole["eval"]
    assert parts["eval"]["overlap"] == {"train": 20}
    for key in ("documents", "tokens", "bytes", "frame", "subsets", "problems"):
        assert parts["train"][key] == whole["train"][key], key
    train = parts["train"]
    assert train["sequences"] == len(load_split(merged.data.prepared_dir, "train"))
    assert train["padding"] == train["sequences"] * 32 - train["tokens"]


def test_nothing_is_written_anew_and_nothing_prepared_again(merged, capsys):
    """Catches a merge that copies, and a training that takes shards for another dataset."""
    shards = Path(f"{merged.data.prepared_dir}.shards")
    for name in ("1", "2"):
        [rows] = (shards / f"{name}-of-2" / "train").glob("*.arrow")
        linked = Path(merged.data.prepared_dir, "train", name, rows.name)
        assert linked.samefile(rows)
    for again in (ensure_prepared, prepare, lambda config: merge(config, 2)):
        again(merged)
    prepare_shard(merged, Shard(1, 2))
    assert capsys.readouterr().out.count("already prepared from the same inputs") == 3
    assert load_fingerprint(merged.data.prepared_dir)["shards"] == 2
    with pytest.raises(ValueError, match="was prepared from something else"):
        ensure_prepared(remade(merged, sequence_length=16))


def test_what_a_fraction_holds_out_is_what_it_holds_out_in_one_go(tokenizer, tmp_path):
    """Catches held-out documents of the first shard only, which the others would then train on."""
    config = sharded(tmp_path, tokenizer, eval_fraction=0.3)
    for number in (1, 2, 3):
        prepare_shard(config, Shard(number, 3))
    merge(config, 3)
    whole = in_one_go(config, tmp_path)
    for split in ("train", "eval"):
        assert tokens_by_place(config, split) == tokens_by_place(whole, split)
    assert 0 < load_report(config.data.prepared_dir)["eval"]["documents"] < sum(SIZES) / 2


def test_a_shard_that_is_missing_or_of_something_else_is_named_and_made_again_it_serves(merged, tmp_path):
    config = remade(merged, prepared_dir=str(tmp_path / "p"))
    prepare_shard(config, Shard(1, 2))
    with pytest.raises(ValueError, match=r"p\.shards/2-of-2 is not there or not whole; make it: .* --shard 2/2"):
        merge(config, 2)
    prepare_shard(remade(config, sequence_length=16), Shard(2, 2))
    with pytest.raises(ValueError, match=r"2-of-2 was made of something else .*; make it again: .* --shard 2/2"):
        merge(config, 2)
    prepare_shard(config, Shard(2, 2))
    merge(config, 2)
    assert tokens_by_place(config) == tokens_by_place(merged)


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"max_sequences": 5}, "data.max_sequences is of the whole corpus"),
        ({"planted_noise": 0.1}, "data.planted_noise is of the whole corpus"),
        ({"train_files": None, "mixture": {"a": SourceConfig("f")}}, "data.mixture is of the whole corpus"),
    ],
)
def test_what_no_shard_can_know_is_refused_by_name(merged, data, named):
    with pytest.raises(ValueError, match=named):
        prepare_shard(remade(merged, **data), Shard(1, 2))


def test_a_tokenizer_of_each_shards_own_and_shards_without_files_are_refused(merged):
    with pytest.raises(ValueError, match=r"model\.tokenizer train is of the whole corpus"):
        prepare_shard(remade(merged, tokenizer="train"), Shard(1, 2))
    with pytest.raises(ValueError, match="6 shards of 5 training files leave some without any; take 5 or fewer"):
        prepare_shard(merged, Shard(1, 6))


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "1/", "a/b", "-1/4", "1/0"])
def test_a_part_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="is no part of a whole; give NUMBER/OF"):
        Shard.parse(text)


def test_the_command_makes_shards_and_puts_them_together(merged, tmp_path, capsys):
    target = tmp_path / "p"
    options = [
        f"--run_dir={tmp_path}/run",
        f"--deepspeed_config={merged.deepspeed_config}",
        f"--model.name_or_path={merged.model.name_or_path}",
        f"--model.tokenizer={merged.model.tokenizer}",
        f"--data.prepared_dir={target}",
        f"--data.train_files={json.dumps(merged.data.train_files)}",
        "--data.sequence_length=32",
    ]
    for part in (["--shard", "1/2"], ["--shard=2/2"], ["--merge", "2"]):
        main([*part, *options])
    assert f"train {'all':24} {sum(SIZES):12,}" in capsys.readouterr().out
    assert len(tokens_by_place(remade(merged, prepared_dir=str(target)))) == sum(SIZES)
    for wrong, named in ((["--shard", "3/2"], "'3/2' is no part of a whole"), (["--merge=0"], "--merge: of 0 shards")):
        with pytest.raises(SystemExit):
            main([*wrong, *options])
        assert named in capsys.readouterr().err


def test_a_run_on_shards_reads_every_sequence_once_an_epoch_and_knows_each_document(
    one_rank, corpus, tiny_model, merged, tmp_path
):
    """Catches ids that the ledger, `data.leave_out` or `pipeline.explain` cannot tell from another shard's."""
    rows = len(load_split(merged.data.prepared_dir, "train"))
    data = {f"data__{key}": getattr(merged.data, key) for key in ("prepared_dir", "train_files", "eval_files")}
    options = data | {"data__sequence_length": 32, "model__tokenizer": merged.model.tokenizer}
    left = SHARD + 3
    config = config_of(
        corpus,
        tmp_path / "run",
        tiny_model("gpt2"),
        deepspeed_json(tmp_path / "ds.json", micro=1, optimizer=ADAM),
        max_steps=rows,
        data__leave_out=[left],
        data__seed=0,
        policy__action="observe",
        **options,
    )
    one_rank(train, config)
    _, violations = check_ledger(Path(config.run_dir))
    assert violations == []
    ledger = pq.read_table(Path(config.run_dir, "ledger")).to_pylist()
    assert sorted(row["sample_id"] for row in ledger) == list(range(rows))
    first, second = document_ids(load_report(merged.data.prepared_dir)["train"])
    assert {document for row in ledger for document in row["document_ids"]} == {*first, *second}
    assert {row["reason"] for row in ledger if left in row["document_ids"]} == {"left_out"}
    place = explain_document(Path(config.run_dir), SHARD + 1)
    assert f"document {SHARD + 1}: " in place.title
    with pytest.raises(ValueError, match=f"the least id there is 0, the largest {SHARD + 13}"):
        explain_document(Path(config.run_dir), 500)
