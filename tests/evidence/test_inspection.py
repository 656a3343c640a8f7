"""What `pipeline.inspect` shows, against loops over the ledger, the rows and the files."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from pipeline import inspect
from pipeline.config.schema import Config
from pipeline.data.prepared import load_split, prepare
from pipeline.evidence.inspection import inspect_row, inspect_run
from pipeline.record import ledger
from pipeline.record.subset_rates import wilson
from tests.corpora import make_config
from tests.runs import config_of, deepspeed_json, run


@pytest.fixture(scope="module")
def done(ranks, corpus, tiny_model, tmp_path_factory) -> Config:
    """Documents of a run of more than one epoch, a fifth of them dropped."""
    directory = tmp_path_factory.mktemp("inspected")
    config = config_of(
        corpus,
        directory / "run",
        tiny_model("llama"),
        deepspeed_json(directory / "ds.json", 0),
        max_steps=24,
        data__prepared_dir=directory / "prepared",
        data__max_sequences=40,
        influence__unit="document",
        influence__include_self=False,
        policy__rule="rate",
        policy__rate=0.2,
    )
    ranks(run, config)
    return config


def relative_by_loops(config: Config) -> list[dict[str, Any]]:
    rows = [row for row in ledger.read(Path(config.run_dir)).to_pylist() if row["score"] is not None]
    for row in rows:
        beside = [other["score"] for other in rows if other["step"] == row["step"]]
        row["relative"] = row["score"] / math.sqrt(sum(score**2 for score in beside) / len(beside))
    return rows


def test_the_most_harmful_and_helpful_are_those_of_a_loop_each_once(done):
    """Catches raw scores, larger in early steps, a unit that is there for every epoch, and the ends swapped."""
    content, rows = inspect_run(Path(done.run_dir), 30), relative_by_loops(done)
    assert max(row["epoch"] for row in rows) > 0
    sources = pq.read_table(Path(done.data.prepared_dir, "documents", "train.parquet")).to_pylist()
    texts = [json.loads(line)["text"] for line in Path(done.data.train_files).read_text().splitlines()]
    for kind, sign in (("harmful", 1), ("helpful", -1)):
        best: dict[Any, dict[str, Any]] = {}
        for row in sorted(rows, key=lambda row: sign * row["relative"]):
            best.setdefault((row["sample_id"], *row["document_ids"]), row)
        expected = list(best.values())[:30]
        assert [row["relative"] for row in content[kind]] == pytest.approx([row["relative"] for row in expected])
        for shown, row in zip(content[kind], expected, strict=True):
            assert shown["step"] == row["step"]
            assert (shown["kept"], shown["reason"]) == (row["kept"], row["reason"] or "")
            source = sources[row["document_ids"][0]]
            assert shown["source"] == f"{source['file']}:{source['line']}"
            assert shown["text"].removesuffix("<eos>") in texts[source["line"] - 1]
    assert content["harmful"][0]["relative"] < 0 < content["helpful"][0]["relative"]


def test_removal_over_time_adds_up_and_has_its_intervals(done):
    content, rows = inspect_run(Path(done.run_dir), 1), ledger.read(Path(done.run_dir)).to_pylist()
    for cell in content["over_time"]:
        own = [r for r in rows if r["subset"] == cell["subset"] and cell["first"] <= r["step"] <= cell["last"]]
        removed = sum(not row["kept"] for row in own)
        assert (cell["units"], cell["removed"], cell["rate"]) == (len(own), removed, removed / len(own))
        assert (cell["low"], cell["high"]) == wilson(removed, len(own))
    assert sum(cell["units"] for cell in content["over_time"]) == len(rows) == content["units"]
    assert sum(cell["removed"] for cell in content["over_time"]) == content["removed"] > 0


def test_a_packed_row_is_its_documents_marked(done):
    """Every row of the dataset: the parts are the row, and a document begins and ends in one row each."""
    prepared = Path(done.data.prepared_dir)
    tokenizer = AutoTokenizer.from_pretrained(prepared / "tokenizer")
    begins, ends = [], []
    rows = load_split(prepared, "train").to_list()
    for number, row in enumerate(rows):
        content, place = inspect_row(prepared, number), 0
        assert (content["row"], content["rows"]) == (number, len(rows))
        for document in content["documents"]:
            assert document["first"] == place
            place = document["stop"]
            assert row["document_ids"][document["first"] : place] == [document["document_id"]] * (
                place - document["first"]
            )
            assert document["text"] == tokenizer.decode(row["input_ids"][document["first"] : place])
            begins += [document["document_id"]] * document["begins"]
            ends += [document["document_id"]] * document["ends"]
        assert place == content["tokens"] == len(row["input_ids"]) - content["padding"]
    last = max(max(row["document_ids"]) for row in rows)
    assert begins == list(range(last + 1))
    assert ends[: last - 1] == list(range(last - 1))


class Text(HTMLParser):
    """The text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_pages_need_nothing_but_themselves_and_say_what_the_json_says(done, tmp_path, capsys):
    inspect.main([done.run_dir, "--rows", "3", "--json", "--html", str(tmp_path / "new" / "run.html")])
    content = json.loads(capsys.readouterr().out)
    assert content == inspect_run(Path(done.run_dir), 3)
    page = (tmp_path / "new" / "run.html").read_text()
    assert not re.search(r"<(script|link|img)\b|@import|url\(", page)
    parser = Text()
    parser.feed(page)
    for row in content["harmful"] + content["helpful"]:
        assert row["text"] in parser.text
        assert row["source"] in parser.text
    inspect.main(["--prepared", done.data.prepared_dir, "--row", "3", "--html", str(tmp_path / "row.html")])
    assert capsys.readouterr().out.split() == [str(tmp_path / "row.html")]
    parser = Text()
    parser.feed((tmp_path / "row.html").read_text())
    for document in inspect_row(Path(done.data.prepared_dir), 3)["documents"]:
        assert document["text"] in parser.text


def test_a_text_that_looks_like_markup_is_shown_as_it_is(tmp_path, capsys):
    """On the page and, in brackets that rich would take for a style, on a terminal."""
    text = "<script>alert(1)</script> & [bold red]no style[/bold red] [/]"
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": text}) + "\n")
    config = make_config(tmp_path, "train", str(tmp_path / "t.jsonl"), sequence_length=64)
    prepare(config)
    inspect.main(["--prepared", config.data.prepared_dir])
    assert text in capsys.readouterr().out.replace("\n", "")
    inspect.main(["--prepared", config.data.prepared_dir, "--html", str(tmp_path / "p.html")])
    assert "<script" not in (tmp_path / "p.html").read_text()


def test_the_terminal_shows_both_ends_the_rates_and_where_to_go_on(done, capsys):
    inspect.main([done.run_dir, "--rows", "2"])
    shown, content = capsys.readouterr().out, inspect_run(Path(done.run_dir), 2)
    for row in content["harmful"] + content["helpful"]:
        assert f"{row['relative']:+.2f} ×  score {row['score']:.3g}" in shown
        assert row["source"] in shown
    for cell in content["over_time"]:
        assert f"{cell['rate']:.0%}/{cell['units']}" in shown
    assert f"python -m pipeline.explain {done.run_dir} --document ID" in shown


def test_a_run_that_scored_nothing_says_so(ranks, corpus, tiny_model, tmp_path, capsys):
    config = config_of(
        corpus,
        tmp_path / "run",
        tiny_model("llama"),
        deepspeed_json(tmp_path / "ds.json", 0),
        max_steps=2,
        influence__estimator="none",
    )
    ranks(run, config)
    inspect.main([config.run_dir])
    said = " ".join(capsys.readouterr().out.split())  # a terminal breaks lines
    assert "8 have no score to compare and stand in neither list" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a RUN_DIR, or a dataset with --prepared"),
        (["{run}", "--prepared", "{data}"], "name a RUN_DIR, or a dataset with --prepared"),
        (["{run}", "--html", "page.htm"], "--html: page.htm does not end in .html"),
        (["--prepared", "{data}", "--row", "999"], "--row 999 is not in"),
        (["{data}"], "is no run directory"),
        (["--prepared", "{run}"], "no train split in"),
    ],
)
def test_what_is_not_there_is_refused_in_a_sentence(done, capsys, arguments, message):
    names = {"run": done.run_dir, "data": done.data.prepared_dir}
    with pytest.raises(SystemExit) as stopped:
        inspect.main([argument.format(**names) for argument in arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
