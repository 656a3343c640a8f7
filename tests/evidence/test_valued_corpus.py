"""The corpus as a run valued it, against loops over its ledger and its files; and a step explained."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline import explain, export_corpus
from pipeline.config.schema import Config
from pipeline.data.prepared import prepare
from pipeline.evidence.explain import explain_document, explain_step
from pipeline.evidence.valued_corpus import documents_of
from pipeline.record import ledger
from tests.runs import config_of, deepspeed_json, run

STEPS = 12


@pytest.fixture(scope="module")
def done(ranks, corpus, tiny_model, tmp_path_factory) -> Config:
    """A run in a pool that read some of the documents."""
    directory = tmp_path_factory.mktemp("valued")
    config = config_of(
        corpus,
        directory / "run",
        tiny_model("llama"),
        deepspeed_json(directory / "ds.json", 0),
        max_steps=STEPS,
        influence__include_self=False,
        policy__rule="top",
        policy__pool=2,
    )
    ranks(run, config)
    return config


def by_loops(config: Config) -> dict[tuple[str, int], dict[str, Any]]:
    """Of every document that was read, by file and line."""
    found: dict[int, list[dict[str, Any]]] = {}
    for row in ledger.read(Path(config.run_dir)).to_pylist():
        for document in row["document_ids"]:
            found.setdefault(document, []).append(row)
    sources = pq.read_table(Path(config.data.prepared_dir, "documents", "train.parquet")).to_pylist()
    return {
        (source["file"], source["line"]): {
            "document_id": source["document_id"],
            "times_read": len(rows),
            "times_trained": sum(row["kept"] for row in rows),
            "score": sum(row["score"] for row in rows) / len(rows),
        }
        for source in sources
        if (rows := found.get(source["document_id"]))
    }


def records(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_every_document_that_was_read_comes_back_in_its_own_record(done, tmp_path, suffix, capsys):
    """Catches values of another document, and fields of the input that are lost."""
    export_corpus.main([done.run_dir, str(tmp_path / f"all{suffix}")])
    written, expected = records(tmp_path / f"all{suffix}"), by_loops(done)
    everything = [json.loads(line) for line in Path(str(done.data.train_files)).read_text().splitlines()]
    assert 3 < len(written) == len(expected) < len(everything)
    for record in written:
        values = record.pop("influence")
        line = everything.index(record) + 1
        own = expected[str(done.data.train_files), line]
        assert {name: values[name] for name in own} == own | {"score": pytest.approx(own["score"], rel=1e-5)}
    blend = json.loads((tmp_path / "all.blend.json").read_text())
    assert sum(row["weight"] for row in blend.values()) == pytest.approx(1)
    assert sum(row["documents"] for row in blend.values()) == len(written)
    assert f"{len(written)} of {len(everything)} documents" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "keeps"),
    [
        (["--min_trained", "0.5"], lambda own: own["times_trained"] >= 0.5 * own["times_read"]),
        (["--min_score", "0.0"], lambda own: own["score"] >= 0),
        (["--without_reason", "[top]"], lambda own: own["times_trained"] == own["times_read"]),
    ],
)
def test_what_is_asked_for_is_kept(done, tmp_path, options, keeps):
    export_corpus.main([done.run_dir, str(tmp_path / "some.jsonl"), *options])
    found = {record["influence"]["document_id"] for record in records(tmp_path / "some.jsonl")}
    every = by_loops(done).values()
    expected = {own["document_id"] for own in every if keeps(own)}
    assert 0 < len(expected) < len(every)
    assert found == expected


def test_the_best_half_by_score_and_what_was_never_read(done, tmp_path):
    export_corpus.main([done.run_dir, str(tmp_path / "half.jsonl"), "--best", "0.5", "--unread", "true"])
    written, every = records(tmp_path / "half.jsonl"), by_loops(done)
    read = [record["influence"]["score"] for record in written if record["influence"]["times_read"]]
    scores = sorted((own["score"] for own in every.values()), reverse=True)
    assert sorted(read, reverse=True) == pytest.approx(scores[: round(len(scores) / 2)], rel=1e-5)
    unread = [record for record in written if not record["influence"]["times_read"]]
    assert len(unread) == len(documents_of(Path(done.run_dir))) - len(every)


def test_a_run_trains_on_the_corpus_that_another_valued(done, ranks, corpus, tiny_model, tmp_path):
    export_corpus.main([done.run_dir, str(tmp_path / "best.jsonl"), "--best", "0.6"])
    config = config_of(
        corpus,
        tmp_path / "run",
        tiny_model("llama"),
        deepspeed_json(tmp_path / "ds.json", 0),
        data__train_files=tmp_path / "best.jsonl",
        data__prepared_dir=tmp_path / "prepared",
        max_steps=2,
    )
    prepare(config)
    ranks(run, config)
    assert set(ledger.read(tmp_path / "run")["subset"].to_pylist()) <= {"os", "argparse", "statistics"}


def test_a_step_is_explained_worst_first(done, capsys):
    rows = [row for row in ledger.read(Path(done.run_dir)).to_pylist() if row["step"] == 3]
    by_loss = explain_step(Path(done.run_dir), 3, "loss", 5).rows
    assert by_loss["position"].tolist() == [r["position"] for r in sorted(rows, key=lambda r: -r["loss"])[:5]]
    by_score = explain_step(Path(done.run_dir), 3, "score", 100).rows
    assert by_score["position"].tolist() == [r["position"] for r in sorted(rows, key=lambda r: r["score"])]
    explain.main([done.run_dir, "--step", "3"])
    assert "step 3: 8 units, 4 removed" in capsys.readouterr().out


def test_a_document_is_shown_with_its_history_and_text(done, capsys):
    rows = ledger.read(Path(done.run_dir)).to_pylist()
    everything = [json.loads(line)["text"] for line in Path(str(done.data.train_files)).read_text().splitlines()]
    number = rows[0]["document_ids"][0]
    found = explain_document(Path(done.run_dir), number)
    own = [row for row in rows if number in row["document_ids"]]
    assert found.rows["position"].tolist() == [row["position"] for row in own]
    line = documents_of(Path(done.run_dir)).loc[number, "line"]
    assert all(part in everything[line - 1] for part in found.text.removesuffix("<eos>").split("\n[...]\n"))
    explain.main([done.run_dir, "--document", str(number)])
    assert f"document {number}: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        (explain, ["--step", "99"], "step 99 is not in the ledger"),
        (explain, ["--document", "123456"], "document 123456 is not in"),
        (export_corpus, ["out.csv"], "ends in neither of .jsonl, .parquet"),
        (export_corpus, ["out.jsonl", "--min_score", "1e30"], "documents is to be kept: ask for less"),
    ],
)
def test_what_is_not_there_is_refused_in_a_sentence(done, capsys, command, options, message):
    with pytest.raises(SystemExit) as exit_:
        command.main([done.run_dir, *options])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_what_is_gone_is_named(done, tmp_path, capsys):
    """Files that no longer hold a document, and a dataset that does not say where documents came from."""
    run_dir = tmp_path / "run"
    shutil.copytree(done.run_dir, run_dir)
    shorter = tmp_path / "documents.jsonl"
    shorter.write_text("".join(Path(str(done.data.train_files)).read_text().splitlines(keepends=True)[:3]))
    config = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(config.replace(str(done.data.train_files), str(shorter)))
    with pytest.raises(SystemExit):
        export_corpus.main([str(run_dir), str(tmp_path / "out.jsonl")])
    assert "data.train_files no longer hold" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()
    (run_dir / "config.yaml").write_text(config.replace(done.data.prepared_dir, str(tmp_path / "nowhere")))
    with pytest.raises(SystemExit):
        export_corpus.main([str(run_dir), str(tmp_path / "out.jsonl")])
    assert "is missing: it says where documents came from; prepare the run's dataset again" in capsys.readouterr().err
