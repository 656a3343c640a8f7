"""Reading: every record is a document or a reported problem, whatever the bytes."""

import gzip
import io
import json
from collections import Counter
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.schema_data import DataConfig
from pipeline.data import corpus
from pipeline.data.corpus import Problems, read_documents, resolve
from pipeline.data.document import Document, Problem

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_pile = pytest.mark.skipif(not (SHARED / "pile").exists(), reason=f"no real data at {SHARED}/pile")
DATA = DataConfig(prepared_dir="unused")
COMPRESS = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.ZstdCompressor().compress}


def read(path: Path | str | list[str], data: DataConfig = DATA) -> list[Document | Problem]:
    return list(read_documents(path if isinstance(path, list) else str(path), data, "train"))


def record(text: object, subset: str = "a") -> bytes:
    return json.dumps({"text": text, "meta": {"pile_set_name": subset}}).encode() + b"\n"


def write(path: Path, raw: bytes) -> Path:
    path.write_bytes(raw)
    return path


@needs_pile
def test_a_real_pile_shard_gives_every_document_with_its_subset():
    found = read(SHARED / "pile" / "val.jsonl.zst")
    raw = zstandard.ZstdDecompressor().stream_reader((SHARED / "pile" / "val.jsonl.zst").read_bytes()).read()
    expected = [json.loads(line) for line in raw.decode().split("\n") if line]
    assert len(found) == 439
    assert [(d.text, d.subset) for d in found] == [(r["text"], r["meta"]["pile_set_name"]) for r in expected]
    assert [d.line for d in found] == list(range(1, 440))
    assert len({d.subset for d in found}) == 13


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b'{"text": \n', "malformed JSON"),
        (b"[" * 100_000 + b"\n", "malformed JSON"),
        (b'{"text": "\xff"}\n', "not valid UTF-8"),
        (b'{"text": "\\ud800"}\n', "not valid UTF-8"),
        (b'{"text": ""}\n', "empty text"),
        (b'{"text": " \\n\\t"}\n', "empty text"),
        (b'{"body": "x"}\n', "no text field `text`"),
        (b'{"text": null}\n', "no text field `text`"),
        (b'{"text": 3}\n', "text field `text` is not a string"),
        (b'["text"]\n', "not a JSON object"),
        (b"  \n", "blank line"),
        (record("x", ["list"]), "subset field `meta.pile_set_name` is neither a string nor an integer"),
    ],
)
def test_malformed_lines_are_reported_with_file_and_line(tmp_path, suffix, line, what):
    path = write(tmp_path / f"f{suffix}", COMPRESS[suffix](record("one") + line + record("two")))
    assert read(path) == [
        Document("one", "a", str(path), 1), Problem(str(path), 2, what), Document("two", "a", str(path), 3)
    ]  # fmt: skip


def test_a_truncated_last_line_is_not_dropped_and_a_whole_one_needs_no_newline(tmp_path):
    cut = read(write(tmp_path / "cut.jsonl", record("one") + record("two")[:-9]))
    assert cut[1] == Problem(str(tmp_path / "cut.jsonl"), 2, "truncated last line")
    assert [d.text for d in read(write(tmp_path / "whole.jsonl", record("one") + record("two")[:-1]))] == ["one", "two"]


@settings(max_examples=60, deadline=None)
@given(lines=st.lists(st.binary(max_size=40).map(lambda b: b.replace(b"\n", b"")) | st.just(record("ok")[:-1])))
def test_every_line_is_a_document_or_a_problem(tmp_path_factory, lines):
    lines = [record("first")[:-1], *lines, record("last")[:-1]]
    path = write(tmp_path_factory.mktemp("lines") / "f.jsonl", b"".join(line + b"\n" for line in lines))
    assert [item.line for item in read(path)] == list(range(1, len(lines) + 1))


@given(raw=st.binary(max_size=80).map(lambda b: b.replace(b"a", b"\n")), size=st.integers(1, 9))
def test_lines_do_not_depend_on_where_chunks_end(raw, size):
    chunks = [raw[start : start + size] for start in range(0, len(raw), size)]
    assert list(corpus._lines(chunks)) == list(io.BytesIO(raw))


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_a_compressed_file_cut_anywhere_loses_its_end_but_never_in_silence(tmp_path, suffix):
    whole = COMPRESS[suffix](b"".join(record(f"{i} {i * i * 7919}") for i in range(60)))
    documents = read(write(tmp_path / f"whole{suffix}", whole))
    assert len(documents) == 60
    for size in range(len(whole)):
        path = write(tmp_path / f"cut{suffix}", whole[:size])
        *before, last = read(path)
        assert isinstance(last, Problem)
        assert last.line == len(before)
        assert last.what == "empty file" if size == 0 else last.what.startswith("compressed stream ends or is corrupt")
        assert [d.text for d in before] == [d.text for d in documents[: len(before)]]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_several_compressed_streams_in_a_file_are_all_read(tmp_path, suffix):
    path = write(tmp_path / f"f{suffix}", b"".join(COMPRESS[suffix](record(str(i)) * 3) for i in range(4)))
    assert [d.text for d in read(path)] == ["0"] * 3 + ["1"] * 3 + ["2"] * 3 + ["3"] * 3
    write(path, path.read_bytes() + b"garbage")
    assert [type(item) for item in read(path)] == [Document] * 12 + [Problem]


def test_a_byte_order_mark_is_tolerated_on_the_first_line_only(tmp_path):
    one, two = read(write(tmp_path / "f.jsonl", b"\xef\xbb\xbf" + record("one") + b"\xef\xbb\xbf" + record("two")))
    assert (one.text, two.what) == ("one", "malformed JSON")
    assert [d.text for d in read(write(tmp_path / "f.txt", b"\xef\xbb\xbfone"))] == ["one"]


def test_nul_is_text_and_a_line_of_50_MB_works(tmp_path):
    long = "x" * 50_000_000
    path = write(tmp_path / "f.jsonl", record("a\0b") + record(long) + record("end"))
    assert [d.text for d in read(path)] == ["a\0b", long, "end"]


def test_nested_fields_and_missing_subsets(tmp_path):
    lines = [{"a": {"b": "x"}, "n": 3}, {"a": {"b": "y"}, "n": None}, {"a": {"b": "z"}}, {"a": "w"}]
    path = write(tmp_path / "f.jsonl", b"".join(json.dumps(line).encode() + b"\n" for line in lines))
    *documents, problem = read(path, DataConfig(prepared_dir="unused", text_field="a.b", subset_field="n"))
    assert [(d.text, d.subset) for d in documents] == [("x", "3"), ("y", "-"), ("z", "-")]
    assert problem == Problem(str(path), 4, "no text field `a.b`")


def test_a_txt_is_one_document_and_its_bytes_are_strict(tmp_path):
    assert read(write(tmp_path / "f.txt", b"one\n\ntwo\n")) == [
        Document("one\n\ntwo\n", "-", str(tmp_path / "f.txt"), 1)
    ]
    assert read(write(tmp_path / "f.txt", b"\xff")) == [Problem(str(tmp_path / "f.txt"), 1, "not valid UTF-8")]
    assert read(write(tmp_path / "f.txt", b"")) == [Problem(str(tmp_path / "f.txt"), 1, "empty text")]


def test_parquet_rows_are_documents_or_problems(tmp_path):
    path = tmp_path / "f.parquet"
    rows = [{"text": "x", "meta": {"pile_set_name": "p"}, "rest": 1}, {"text": None}, {"text": " "}, {"text": "y"}]
    pq.write_table(pa.Table.from_pylist(rows * 100), path)
    found = read(path)
    assert [item.line for item in found] == list(range(1, 401))
    assert found[4] == Document("x", "p", str(path), 5)
    assert found[7] == Document("y", "-", str(path), 8)
    assert Counter(p.what for p in found if isinstance(p, Problem)) == {"no text field `text`": 100, "empty text": 100}
    assert {p.what for p in read(path, DataConfig(prepared_dir="-", text_field="body"))} == {"no text field `body`"}
    write(path, path.read_bytes()[:-10])
    assert read(path) == [Problem(str(path), 0, "parquet is corrupt after this row, the rest of the file is lost")]


def test_globs_are_sorted_and_sources_keep_their_order(tmp_path):
    for name in ["b", "a", "c"]:
        write(tmp_path / f"{name}.txt", name.encode())
    last_first = [str(tmp_path / "c.txt"), str(tmp_path / "[ab].txt")]
    assert [d.text for d in read(last_first)] == ["c", "a", "b"]


def test_a_folder_that_links_to_itself_is_read_once(tmp_path):
    """Catches a glob that follows the link until the system gives up: forty copies of every document."""
    (tmp_path / "d" / "e").mkdir(parents=True)
    write(tmp_path / "d" / "e" / "a.txt", b"one")
    (tmp_path / "d" / "e" / "up").symlink_to(tmp_path / "d")
    assert resolve(str(tmp_path / "d" / "**" / "*.txt")) == [str(tmp_path / "d" / "e" / "a.txt")]


@pytest.mark.parametrize("name", ["a b", "a:b", "[1]", "a*b", "ä", "-x"])
def test_names_with_wildcards_in_them_are_names_where_there_is_such_a_file(tmp_path, name):
    write(tmp_path / f"{name}.txt", b"one")
    write(tmp_path / "1.txt", b"two")
    write(tmp_path / "a2b.txt", b"two")
    assert [d.text for d in read(tmp_path / f"{name}.txt")] == ["one"]


def test_a_bracket_beside_a_wildcard_is_refused_and_the_remedy_works(tmp_path):
    (tmp_path / "v[1]").mkdir()
    write(tmp_path / "v[1]" / "a.txt", b"one")
    with pytest.raises(ValueError, match=r"matches no file .*a bracket of a name is written \[\[\] beside wildcards"):
        read(tmp_path / "v[1]" / "*.txt")
    assert [d.text for d in read(tmp_path / "v[[]1]" / "*.txt")] == ["one"]


def test_a_link_that_leads_nowhere_is_refused_as_one(tmp_path):
    (tmp_path / "a.txt").symlink_to(tmp_path / "gone")
    for files in ("a.txt", "*.txt"):
        with pytest.raises(ValueError, match=r"a\.txt` (is no file \(a folder, or a link|matches no file)"):
            read(tmp_path / files)
    write(tmp_path / "gone", b"one")
    assert [d.text for d in read(tmp_path / "*.txt")] == ["one"]


def test_an_empty_name_of_a_subset_is_none(tmp_path):
    assert [d.subset for d in read(write(tmp_path / "f.jsonl", record("x", "") + record("y", 0)))] == ["-", "0"]


def test_lines_end_at_line_feeds_and_nowhere_else(tmp_path):
    """Catches str.splitlines, which also splits at U+2028 and U+0085, and carriage returns that stay in the text."""
    text = "a\u2028b\x85c\x0bd"
    raw = json.dumps({"text": text}, ensure_ascii=False).encode().replace(b"\x0b", b"\\u000b")
    found = read(write(tmp_path / "f.jsonl", raw + b"\r\n" + raw + b"\r\n"))
    assert [(d.text, d.line) for d in found] == [(text, 1), (text, 2)]


@pytest.mark.parametrize(
    ("column", "what"),
    [
        (pa.array([None, None], pa.string()), "no text field `text`"),
        (pa.nulls(2), "no text field `text`"),
        (pa.array([1, 2]), "text field `text` is not a string"),
        (pa.array([["a", "b"], ["c"]]), "text field `text` is not a string"),
        (pa.array(["", " "]), "empty text"),
    ],
)
def test_a_parquet_column_without_text_gives_problems_and_no_documents(tmp_path, column, what):
    pq.write_table(pa.table({"text": column}), tmp_path / "f.parquet")
    assert {item.what for item in read(tmp_path / "f.parquet")} == {what}
    pq.write_table(pa.table({"m": [[{"text": "a"}]]}), tmp_path / "f.parquet")
    data = DataConfig(prepared_dir="-", text_field="m.text")
    assert [item.what for item in read(tmp_path / "f.parquet", data)] == ["no text field `m.text`"]


def test_skippable_frames_of_a_zst_are_skipped(tmp_path):
    """pzstd and others write them, before, between and behind what is compressed."""
    skipped, frame = b"\x50\x2a\x4d\x18\x04\0\0\0abcd", COMPRESS[".jsonl.zst"](record("one"))
    path = write(tmp_path / "f.jsonl.zst", skipped + frame + skipped + frame + skipped)
    assert [d.text for d in read(path)] == ["one", "one"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ("missing/*.jsonl", "matches no file"),
        ("missing/file.jsonl", "matches no file"),
        ("missing", "matches no file"),
        (["builtin", "*.nothing"], "matches no file"),
        ("tests", r"is no file \(a folder"),
        ("tests/*.py", "not a file of a known kind"),
        ([], "the list is empty"),
    ],
)
def test_sources_that_cannot_be_read_are_refused(monkeypatch, files, message):
    monkeypatch.chdir(Path(__file__).parents[2])
    with pytest.raises(ValueError, match=message):
        read(files)


def test_a_hub_id_is_streamed_from_the_split_that_it_names(monkeypatch):
    calls = []

    def load_dataset(name, **arguments):
        calls.append((name, arguments))
        return iter([{"text": "one"}, {"text": ""}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert resolve("owner/name") == ["owner/name"]
    found = read(["owner/name:test", "owner/name"])
    assert calls == [
        ("owner/name", {"split": split, "streaming": True}) for split in ("test", "train")
    ]  # fmt: skip
    assert found[:2] == [Document("one", "-", "owner/name:test", 1), Problem("owner/name:test", 2, "empty text")]


def test_a_hub_that_does_not_answer_is_named(monkeypatch):
    def load_dataset(name, **arguments):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"`owner/name` is no file here.*offline"):
        read("owner/name")


def test_a_hub_that_breaks_off_is_named_and_is_no_end(monkeypatch):
    """Catches a corpus that is half as long without a word, and a traceback of the network's."""

    def load_dataset(name, **arguments):
        yield {"text": "one"}
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"`owner/name` broke off after 1 records .*check the network"):
        read("owner/name")


def test_a_corpus_without_its_text_field_is_refused_early():
    problems, read = Problems(limit=0.01), []

    def records():
        for line in range(1_000_000):
            read.append(line)
            yield Problem("f", line, "no text field `text`")

    with pytest.raises(ValueError, match="1000 of 1000 records"):
        list(problems.leave_out(records()))
    assert len(read) == 1_000
