"""Preparing: no token lost, the same twice, never half, and noticed when it was made of something else."""

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from pipeline.config.schema import Config
from pipeline.data import packing as module
from pipeline.data.corpus import read_documents
from pipeline.data.document import Document, Encoded
from pipeline.data.planted import Planter
from pipeline.data.prepared import ensure_prepared, load_fingerprint, load_report, load_split, prepare
from pipeline.data.tokenizer import train_tokenizer
from pipeline.prepare import main
from tests.corpora import make_config, remade, text_of, write

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory) -> str:
    """A byte-level tokenizer of 300 tokens, trained here: these tests need nothing from outside."""
    directory = tmp_path_factory.mktemp("tokenizer")
    config = make_config(directory, train_files=write(directory / "f.jsonl", 50), tokenizer="train")
    train_tokenizer(config).save_pretrained(str(directory / "saved"))
    return str(directory / "saved")


@pytest.fixture(scope="session")
def gpt2() -> str:
    if not (SHARED / "tokenizers" / "gpt2").exists():
        pytest.skip(f"no real tokenizer at {SHARED}/tokenizers/gpt2")
    return str(SHARED / "tokenizers" / "gpt2")


def sources(config: Config, split: str = "train") -> list[dict[str, Any]]:
    return pq.read_table(Path(config.data.prepared_dir) / "documents" / f"{split}.parquet").to_pylist()


def rows(config: Config, split: str = "train") -> list[dict[str, Any]]:
    return load_split(config.data.prepared_dir, split).to_list()


def naive_rows(config: Config, split: str = "train") -> list[dict[str, Any]]:
    """The rows, slowly: the documents one by one in the order of their ids, then cut."""
    files = config.data.train_files if split == "train" else config.data.eval_files
    documents = {(d.file, d.line): d for d in read_documents(files, config.data, split) if isinstance(d, Document)}
    tokenizer = AutoTokenizer.from_pretrained(config.model.tokenizer)
    tokens: list[tuple[int, int, str]] = []
    for source in sources(config, split):
        document = documents.pop((source["file"], source["line"]))
        ids = tokenizer(document.text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        tokens += [(token, source["document_id"], document.subset) for token in ids]
    assert not documents
    length = config.data.sequence_length
    result = []
    for start in range(0, len(tokens), length):
        row = tokens[start : start + length]
        padding = length - len(row)
        result.append({
            "input_ids": [token for token, _, _ in row] + [tokenizer.eos_token_id] * padding,
            "document_ids": [owner for _, owner, _ in row] + [-1] * padding,
            "subset": list({owner: subset for _, owner, subset in row}.values()),
        })  # fmt: skip
    return result


def test_no_token_is_lost_or_repeated_between_packs(tmp_path, gpt2, monkeypatch):
    monkeypatch.setattr(module, "BATCH_DOCUMENTS", 7)
    files = [write(tmp_path / "a.jsonl", 40), write(tmp_path / "b.jsonl", 33, first=40)]
    config = make_config(tmp_path, gpt2, files, eval_files=write(tmp_path / "e.jsonl", 10, first=100))
    prepare(config)
    for split, documents in ("train", 73), ("eval", 10):
        assert rows(config, split) == naive_rows(config, split)
        assert [s["document_id"] for s in sources(config, split)] == list(range(documents))


@settings(deadline=None)
@given(
    batches=st.lists(st.lists(st.integers(1, 12), max_size=5), max_size=6), length=st.integers(2, 9)
)  # fmt: skip
def test_packing_is_concatenation_and_cutting_whatever_the_batches(batches, length):
    counter = iter(range(1, 10_000))
    encoded = [
        [Encoded(np.array([next(counter) for _ in range(n)], np.int32), f"s{n}") for n in batch] for batch in batches
    ]
    flat = [(token, owner, one.subset) for owner, one in enumerate(chain(*encoded)) for token in one.ids.tolist()]
    types = [pa.list_(pa.int32(), length), pa.list_(pa.int64(), length), pa.list_(pa.string())]
    schema = pa.schema(list(zip(["input_ids", "document_ids", "subset"], types, strict=True)))
    packed = [row for batch in module._pack(encoded, length, 0, schema) for row in batch.to_pylist()]
    assert len(packed) == -(-len(flat) // length)
    for start, row in zip(range(0, len(flat), length), packed, strict=True):
        part = flat[start : start + length]
        padding = length - len(part)
        assert row["input_ids"] == [token for token, _, _ in part] + [0] * padding
        assert row["document_ids"] == [owner for _, owner, _ in part] + [-1] * padding
        assert row["subset"] == list({owner: subset for _, owner, subset in part}.values())


def test_rows_are_memory_mapped_and_of_the_promised_types(tmp_path, small_tokenizer):
    config = make_config(tmp_path, small_tokenizer, write(tmp_path / "f.jsonl", 20))
    prepare(config)
    dataset = load_split(config.data.prepared_dir, "train")
    assert dataset.cache_files
    types = dataset.data.schema
    assert types.field("input_ids").type == pa.list_(pa.int32(), 32)
    assert types.field("document_ids").type == pa.list_(pa.int64(), 32)
    assert types.field("subset").type == pa.list_(pa.string())


def test_an_audit_finds_the_text_of_every_document(tmp_path, gpt2):
    config = make_config(tmp_path, gpt2, write(tmp_path / "f.jsonl", 30))
    prepare(config)
    tokenizer = AutoTokenizer.from_pretrained(Path(config.data.prepared_dir) / "tokenizer")
    packed = rows(config)
    tokens = np.concatenate([row["input_ids"] for row in packed])
    owners = np.concatenate([row["document_ids"] for row in packed])
    lines = (tmp_path / "f.jsonl").read_text().splitlines()
    for source in sources(config):
        text = json.loads(lines[source["line"] - 1])["text"]
        own = tokens[owners == source["document_id"]]
        assert tokenizer.decode(own[:-1]) == text
        assert own[-1] == tokenizer.eos_token_id
        assert (source["file"], source["bytes"], source["tokens"]) == (
            str(tmp_path / "f.jsonl"), len(text.encode()), len(own)
        )  # fmt: skip


def test_the_report_adds_up(tmp_path, small_tokenizer):
    config = make_config(tmp_path, small_tokenizer, write(tmp_path / "f.jsonl", 50, bad=2), max_bad_fraction=0.1)
    prepare(config)
    report, listed = load_report(config.data.prepared_dir)["train"], sources(config)
    for subset, counts in report["subsets"].items():
        own = [s for s in listed if s["subset"] == subset]
        assert counts == {"documents": len(own), **{key: sum(s[key] for s in own) for key in ("tokens", "bytes")}}
    for key in ("documents", "tokens", "bytes"):
        assert report[key] == sum(counts[key] for counts in report["subsets"].values())
    owners = np.concatenate([row["document_ids"] for row in rows(config)])
    assert (report["tokens"], report["padding"]) == ((owners >= 0).sum(), (owners < 0).sum())
    assert report["sequences"] == len(rows(config))
    assert report["documents"] == 50
    assert report["problems"] == {"malformed JSON": 2}
    assert report["first_problems"][1] == {"file": str(tmp_path / "f.jsonl"), "line": 52, "what": "malformed JSON"}


def test_the_same_inputs_give_the_same_rows_and_another_seed_another_order(tmp_path, small_tokenizer):
    file = write(tmp_path / "f.jsonl", 60)
    configs = [
        make_config(tmp_path, small_tokenizer, file, prepared_dir=str(tmp_path / name), seed=seed)
        for name, seed in [("one", 0), ("two", 0), ("other", 1)]
    ]
    for config in configs:
        prepare(config)
    one, two, other = map(rows, configs)
    assert one == two
    assert sources(configs[0]) == sources(configs[1])
    assert one != other
    order = [source["line"] for source in sources(configs[0])]
    assert order != sorted(order)
    assert sorted(order) == list(range(1, 61))


def test_the_shuffle_is_another_one_in_every_batch(tmp_path, small_tokenizer, monkeypatch):
    monkeypatch.setattr(module, "BATCH_DOCUMENTS", 10)
    config = make_config(tmp_path, small_tokenizer, write(tmp_path / "f.jsonl", 20))
    prepare(config)
    order = [source["line"] for source in sources(config)]
    assert sorted(order[:10]) == list(range(1, 11))  # a streamed pass cannot look further ahead
    assert [line + 10 for line in order[:10]] != order[10:]


def test_batches_are_bounded_by_characters_too():
    documents = [Document("x" * size, "-", "f", 1) for size in (9_000_000, 1, 7_999_998, 1, 1)]
    assert [len(batch) for batch in module.batches_of(documents)] == [1, 3, 1]


def test_a_text_that_spells_the_end_of_a_document_does_not_end_it(tmp_path, gpt2):
    file = tmp_path / "f.txt"
    file.write_text("one <|endoftext|> two")
    config = make_config(tmp_path, gpt2, str(file))
    prepare(config)
    [row] = rows(config)
    tokens = [t for t, owner in zip(row["input_ids"], row["document_ids"], strict=True) if owner == 0]
    assert tokens.count(50256) == 1
    assert tokens[-1] == 50256
    assert AutoTokenizer.from_pretrained(gpt2).decode(tokens[:-1]) == file.read_text()


def test_max_sequences_stops_the_reading_and_fills_every_row(tmp_path, small_tokenizer, monkeypatch):
    read = []

    def load_dataset(*_, **__):
        for index in range(300):
            read.append(index)
            yield {"text": text_of(index)}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(module, "BATCH_DOCUMENTS", 10)
    hub = "owner/name"
    held_out = write(tmp_path / "e.jsonl", 300, first=300)
    limits = {"max_sequences": 5, "max_eval_sequences": 1}
    config = make_config(tmp_path, small_tokenizer, hub, eval_files=held_out, **limits)
    prepare(config)
    assert 0 < len(read) <= 40
    report = load_report(config.data.prepared_dir)
    assert (len(rows(config)), report["train"]["tokens"], report["train"]["padding"]) == (5, 5 * 32, 0)
    assert (len(rows(config, "eval")), report["eval"]["tokens"]) == (1, 32)
    assert sum(s["tokens"] for s in sources(config)) == 5 * 32


# Planted noise


@pytest.fixture
def planted(tmp_path, small_tokenizer):
    """The same documents, foreign ones aside, prepared without noise and with."""
    (tmp_path / "foreign.txt").write_text("ÆØÅ " * 300)
    files = {"eval_files": write(tmp_path / "e.jsonl", 50, first=200)}
    clean = make_config(
        tmp_path, small_tokenizer, write(tmp_path / "f.jsonl", 200), **files, prepared_dir=str(tmp_path / "clean")
    )
    noise = {"planted_noise": 0.2, "planted_foreign_files": str(tmp_path / "foreign.txt")}
    noisy = remade(clean, prepared_dir=str(tmp_path / "noisy"), **noise)
    for config in (clean, noisy):
        prepare(config)
    return clean, noisy


def planted_kinds(config: Config) -> list[str | None]:
    """What was planted in each row; None for those that are what they were."""
    kinds = []
    for row in rows(config):
        [kind] = {name.removeprefix("planted/") if name.startswith("planted/") else None for name in row["subset"]}
        kinds.append(kind)
    return kinds


def test_the_fraction_is_kept_in_equal_shares_and_the_report_says_so(planted):
    kinds = planted_kinds(planted[1])
    counts = {kind: kinds.count(kind) for kind in ("uniform", "shuffled", "repeated", "foreign")}
    assert abs(sum(counts.values()) - 0.2 * len(kinds)) <= 1
    assert max(counts.values()) - min(counts.values()) <= 1
    assert load_report(planted[1].data.prepared_dir)["train"]["planted"] == counts
    assert "planted" not in load_report(planted[0].data.prepared_dir)["train"]


def test_every_other_row_document_id_and_held_out_row_is_what_it_was(planted):
    """Catches noise whose draws shift the shuffle of documents, and a held-out split that is no longer comparable."""
    clean, noisy = planted
    for kind, before, after in zip(planted_kinds(noisy), rows(clean), rows(noisy), strict=True):
        assert after["document_ids"] == before["document_ids"]
        assert len(after["subset"]) == len(before["subset"])
        if kind is None:
            assert after == before
        else:
            assert after["input_ids"] != before["input_ids"]
    assert rows(noisy, "eval") == rows(clean, "eval")
    assert sources(noisy) == sources(clean)


def test_each_kind_is_what_it_says(planted, small_tokenizer):
    clean, noisy = planted
    tokenizer = AutoTokenizer.from_pretrained(small_tokenizer)
    foreign = iter(tokenizer("ÆØÅ " * 300, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id])
    seen: set[int] = set()
    for kind, before, after in zip(planted_kinds(noisy), rows(clean), rows(noisy), strict=True):
        real = sum(owner >= 0 for owner in before["document_ids"])
        old, new = before["input_ids"][:real], after["input_ids"][:real]
        assert after["input_ids"][real:] == before["input_ids"][real:]
        if kind == "shuffled":
            assert sorted(new) == sorted(old)
        elif kind == "repeated":
            assert new[8:] == new[:-8]
            assert any(old[start : start + 8] == new[:8] for start in range(real - 7))
        elif kind == "foreign":
            assert new == [next(foreign) for _ in new]
        elif kind == "uniform":
            assert len(set(new)) > 20
            seen |= set(new)
    assert min(seen) >= 0
    assert len(seen) > 150
    assert max(seen) < len(tokenizer)


def test_planted_noise_does_not_depend_on_batches_and_follows_the_seed(planted, small_tokenizer, tmp_path):
    """Catches a generator that runs on from row to row of a batch."""
    clean, noisy = planted
    tokenizer = AutoTokenizer.from_pretrained(small_tokenizer)
    foreign = tokenizer("ÆØÅ " * 300, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    for size in (1, 7):
        planter = Planter(0.2, noisy.seed, len(tokenizer), repeat(np.array(foreign, np.int32)))
        batches = load_split(clean.data.prepared_dir, "train").data.table.to_batches(max_chunksize=size)
        assert [row for batch in batches for row in planter(batch).to_pylist()] == rows(noisy)
    starts = set()
    for seed in range(4):
        other = remade(noisy, seed=seed, prepared_dir=str(tmp_path / f"seed{seed}"))
        prepare(other)
        starts.add(next(index for index, kind in enumerate(planted_kinds(other)) if kind))
    assert len(starts) > 1


def test_foreign_text_is_left_out_where_none_is_given_and_refused_where_it_is_empty(planted, tmp_path):
    without = remade(planted[1], planted_foreign_files=None, prepared_dir=str(tmp_path / "without"))
    prepare(without)
    assert set(planted_kinds(without)) == {None, "uniform", "shuffled", "repeated"}
    (tmp_path / "empty.jsonl").write_text("{}\n")
    empty = {"planted_foreign_files": str(tmp_path / "empty.jsonl"), "prepared_dir": str(tmp_path / "refused")}
    with pytest.raises(ValueError, match=r"data\.planted_foreign_files: no document"):
        prepare(remade(planted[1], **empty))


def test_planted_noise_is_part_of_what_a_preparation_was_made_of(planted):
    clean, noisy = planted
    with pytest.raises(ValueError, match=r"planted_noise: 'absent' -> 0\.2"):
        ensure_prepared(remade(clean, planted_noise=0.2))
    with pytest.raises(ValueError, match=r"planted_noise: 0\.2 -> 'absent'"):
        ensure_prepared(remade(noisy, planted_noise=0.0, planted_foreign_files=None))
    with pytest.raises(ValueError, match=r"planted_foreign_files"):
        ensure_prepared(remade(noisy, planted_foreign_files=None))
    ensure_prepared(noisy)
    assert "planted_noise" not in load_fingerprint(clean.data.prepared_dir)


def test_runs_of_several_seeds_share_what_was_prepared_with_a_seed_of_its_own(tmp_path, small_tokenizer):
    first = make_config(tmp_path, small_tokenizer, write(tmp_path / "f.jsonl", 30), seed=1)
    ensure_prepared(first)
    with pytest.raises(ValueError, match="seed: 1 -> 2"):
        ensure_prepared(remade(first, seed=2))
    ensure_prepared(replace(first, seed=2, data=replace(first.data, seed=1)))


# What a preparation was made of


@pytest.fixture
def prepared(tmp_path, small_tokenizer):
    config = make_config(tmp_path, small_tokenizer, write(tmp_path / "f.jsonl", 20))
    ensure_prepared(config)
    return config


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sequence_length": 16}, "sequence_length: 32 -> 16"),
        ({"tokenizer": "train"}, "tokenizer.trained: 'absent' -> 300"),
    ],
)
def test_a_dataset_made_with_other_settings_is_noticed(prepared, change, named):
    with pytest.raises(ValueError, match=r"data\.prepared_dir") as raised:
        ensure_prepared(remade(prepared, **change))
    assert f"  {named}\n" in str(raised.value)
    assert "python -m pipeline.prepare --config" in str(raised.value)


def test_an_eval_split_that_is_not_asked_for_is_accepted_and_one_that_is_missing_is_not(tmp_path, small_tokenizer):
    file, held_out = write(tmp_path / "f.jsonl", 20), write(tmp_path / "e.jsonl", 20, first=20)
    with_eval = make_config(tmp_path, small_tokenizer, file, eval_files=held_out, max_eval_sequences=1)
    without = remade(with_eval, eval_files=None, max_eval_sequences=None)
    ensure_prepared(with_eval)
    ensure_prepared(without)
    assert len(rows(with_eval, "eval")) == 1
    with pytest.raises(ValueError, match="  seed: 0 -> 1\n") as raised:
        ensure_prepared(remade(without, seed=1))
    assert "eval_files" not in str(raised.value)
    with pytest.raises(ValueError, match="max_eval_sequences: 1 -> 2"):
        ensure_prepared(remade(with_eval, max_eval_sequences=2))
    prepare(without)
    with pytest.raises(ValueError, match=r"eval_files\.0\.name: 'absent' -> 'e\.jsonl'"):
        ensure_prepared(with_eval)


def test_prepare_leaves_what_is_the_same_and_replaces_what_differs(prepared, tmp_path, capsys):
    before = (tmp_path / "prepared").stat().st_ino
    prepare(prepared)
    assert "already prepared" in capsys.readouterr().out
    assert (tmp_path / "prepared").stat().st_ino == before
    prepare(remade(prepared, sequence_length=16))
    assert "sequence_length: 32 -> 16" in capsys.readouterr().out
    assert len(load_split(prepared.data.prepared_dir, "train")[0]["input_ids"]) == 16
    assert load_fingerprint(prepared.data.prepared_dir)["sequence_length"] == 16
    assert sorted(path.name for path in tmp_path.glob("prepared*")) == ["prepared"]


def test_a_directory_that_is_no_prepared_dataset_is_not_deleted(tmp_path, small_tokenizer):
    (tmp_path / "prepared").mkdir()
    (tmp_path / "prepared" / "thesis.tex").write_text("ten years")
    with pytest.raises(ValueError, match="is no prepared dataset"):
        ensure_prepared(make_config(tmp_path, small_tokenizer, write(tmp_path / "f.jsonl", 5)))
    assert (tmp_path / "prepared" / "thesis.tex").read_text() == "ten years"


def test_what_was_not_prepared_is_named(prepared, tmp_path):
    with pytest.raises(ValueError, match=r"no eval split.*data\.eval_files"):
        load_split(prepared.data.prepared_dir, "eval")
    for load in load_fingerprint, load_report:
        with pytest.raises(ValueError, match="is no prepared dataset"):
            load(tmp_path)


@pytest.mark.slow
def test_a_killed_preparation_leaves_nothing_that_looks_whole(tmp_path, small_tokenizer):
    config = make_config(tmp_path, small_tokenizer, write(tmp_path / "f.jsonl", 200))
    program = f"""
import time
from pathlib import Path
from pipeline.data import split
from tests.data.test_prepared import make_config, module, prepare, read_documents
def stalling(*arguments):
    for number, document in enumerate(read_documents(*arguments)):
        if number == 150:
            print("half way", flush=True)
            time.sleep(600)
        yield document
split.read_documents, module.BATCH_DOCUMENTS = stalling, 20
prepare(make_config(Path({str(tmp_path)!r}), {small_tokenizer!r}, {config.data.train_files!r}))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert "half way" in process.stdout.read(len("half way\n"))
    [left] = tmp_path.glob("prepared*")
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert left.name == f"prepared.tmp-{socket.gethostname()}-{process.pid}"
    assert (left / "train.arrow").exists()
    assert not (left / "fingerprint.json").exists()
    ensure_prepared(config)
    assert rows(config) == naive_rows(config)
    assert [path.name for path in tmp_path.glob("prepared*")] == ["prepared"]


def test_the_directory_of_a_living_preparation_is_left_alone(tmp_path, small_tokenizer):
    alive = tmp_path / f"prepared.tmp-{socket.gethostname()}-{os.getppid()}"
    elsewhere = tmp_path / "prepared.tmp-another-host-1"
    for directory in alive, elsewhere:
        directory.mkdir()
    prepare(make_config(tmp_path, small_tokenizer, write(tmp_path / "f.jsonl", 5)))
    assert alive.exists()
    assert elsewhere.exists()


def test_a_failed_preparation_leaves_the_one_before(prepared, tmp_path):
    before = rows(prepared)
    write(tmp_path / "f.jsonl", 5, bad=5)
    with pytest.raises(ValueError, match="max_bad_fraction"):
        prepare(prepared)
    assert rows(prepared) == before
    assert sorted(path.name for path in tmp_path.glob("prepared*")) == ["prepared"]


# Problems


def test_too_many_problems_are_refused_with_their_places(tmp_path, small_tokenizer):
    file = write(tmp_path / "f.jsonl", 99, bad=1)
    prepare(make_config(tmp_path, small_tokenizer, file, max_bad_fraction=0.01))
    with pytest.raises(ValueError, match="1 of 100 records") as raised:
        prepare(make_config(tmp_path, small_tokenizer, file, max_bad_fraction=0.009, sequence_length=16))
    assert f"{file}:100: malformed JSON" in str(raised.value)
    assert "raise data.max_bad_fraction" in str(raised.value)


def test_files_without_a_document_are_refused(tmp_path, small_tokenizer):
    config = make_config(tmp_path, small_tokenizer, write(tmp_path / "f.jsonl", 0, bad=3), max_bad_fraction=1.0)
    with pytest.raises(ValueError, match=r"data\.train_files: no document"):
        prepare(config)


def test_a_trained_tokenizer_is_saved_with_the_rows_that_it_made(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.data.tokenizer.TOKENIZER_CHARACTERS", 200_000)
    monkeypatch.setattr(module, "BATCH_DOCUMENTS", 20)
    config = make_config(tmp_path, "train", "builtin", max_sequences=2, eval_files="builtin", max_eval_sequences=1)
    prepare(config)
    saved = AutoTokenizer.from_pretrained(tmp_path / "prepared" / "tokenizer")
    assert (len(saved), saved.eos_token) == (300, "<|endoftext|>")
    assert load_fingerprint(tmp_path / "prepared")["tokenizer"] == {"trained": 300}
    assert set(load_fingerprint(tmp_path / "prepared")["train_files"][0]) == {"builtin"}
    text = saved.decode(rows(config)[0]["input_ids"])
    assert any(text in document.text for document in read_documents("builtin", config.data, "train"))


# The command


def test_the_command_prints_a_table_or_the_message_alone(tmp_path, small_tokenizer, capsys):
    config = make_config(tmp_path, small_tokenizer, write(tmp_path / "f.jsonl", 20))
    values = {
        "run_dir": config.run_dir,
        "deepspeed_config": config.deepspeed_config,
        "model": {"name_or_path": config.model.name_or_path, "tokenizer": config.model.tokenizer},
        "data": {"prepared_dir": config.data.prepared_dir, "train_files": config.data.train_files},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    main(["--config", str(tmp_path / "run.yaml"), "--data.sequence_length", "16"])
    table = capsys.readouterr().out
    assert all(subset in table for subset in ("s0", "s1", "s2", "all"))
    assert "20" in table
    with pytest.raises(SystemExit) as raised:
        main(["--config", str(tmp_path / "run.yaml"), "--data.train_files", "nothing/*.jsonl"])
    assert raised.value.code == 2
    error = capsys.readouterr().err
    assert "`nothing/*.jsonl` matches no file" in error
    assert "Traceback" not in error
