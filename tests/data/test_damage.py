"""Files that are no data: each is refused by name, whatever fraction of bad records is allowed; none becomes noise."""

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from pipeline.config.differences import changes
from pipeline.config.schema_data import DataConfig
from pipeline.data.corpus import check_files, read_documents
from pipeline.data.document import Document
from pipeline.data.fingerprint import Known, fingerprint
from pipeline.data.prepared import load_report, prepare
from pipeline.data.problems import Problems
from pipeline.data.tokenizer import train_tokenizer
from tests.corpora import make_config, remade, write

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
LINES = b"".join(
    json.dumps({"text": f"document {i} of many", "meta": {"pile_set_name": "a"}}).encode() + b"\n" for i in range(200)
)


def parquet(column: str = "text") -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({column: [f"document {i}" for i in range(200)]}), sink)
    return sink.getvalue().to_pybytes()


def documents(files: list[str], **data: object) -> list[str]:
    """What is read where every record may be bad."""
    config = DataConfig(prepared_dir="unused", max_bad_fraction=1.0, **data)
    problems = Problems(config.max_bad_fraction, "data.train_files")
    return [document.text for document in problems.leave_out(read_documents(files, config, "train"))]


WHOLE = {
    ".jsonl": LINES,
    ".jsonl.gz": gzip.compress(LINES),
    ".jsonl.zst": zstandard.compress(LINES),
    ".parquet": parquet(),
}


@pytest.mark.parametrize("suffix", WHOLE)
def test_a_shard_cut_in_the_middle_is_not_one_bad_record_of_many(tmp_path, suffix):
    good, cut = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    good.write_bytes(WHOLE[suffix])
    cut.write_bytes(WHOLE[suffix][: len(WHOLE[suffix]) // 2])
    assert len(documents([str(good)])) == 200
    with pytest.raises(ValueError, match=r"data\.train_files: .*b\.\S+ is damaged .*Fetch or write it again"):
        documents([str(good), str(cut)])


def test_a_shard_cut_inside_a_character_before_it_was_compressed_is_damaged(tmp_path):
    """Catches a last line that counts as badly encoded, and a verdict on the compressed stream only."""
    raw = LINES + '{"text": "Ärzte zähle'.encode()[:-1]
    (tmp_path / "f.jsonl.gz").write_bytes(gzip.compress(raw + "é".encode()[:1]))
    with pytest.raises(ValueError, match="truncated last line"):
        documents([str(tmp_path / "f.jsonl.gz")])


@pytest.mark.parametrize("suffix", [*WHOLE, ".txt"])
def test_a_pointer_is_no_document_and_is_found_before_anything_takes_long(tmp_path, suffix):
    good, pointer = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    good.write_bytes(WHOLE.get(suffix, b"text"))
    pointer.write_bytes(POINTER)
    with pytest.raises(ValueError, match=r"b\.\S+ is damaged .*git lfs pull"):
        documents([str(good), str(pointer)])
    with pytest.raises(ValueError, match=r"data\.eval_files: these files cannot be read:\n  .*b\..*git lfs pull"):
        check_files([str(good), str(pointer)], "data.eval_files")


@pytest.mark.parametrize("suffix", WHOLE)
def test_a_file_whose_records_all_lack_the_field_is_refused_among_a_million_good_ones(tmp_path, suffix):
    good, other = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    good.write_bytes(WHOLE[suffix])
    renamed = LINES.replace(b'"text"', b'"content"')
    pack = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.compress}
    other.write_bytes(pack[suffix](renamed) if suffix in pack else parquet("content"))
    with pytest.raises(ValueError, match=r"no document in .*b\.\S+ \(line 1: no text field `text`"):
        documents([str(good)] * 20 + [str(other)])
    assert len(documents([str(other)], text_field="content")) == 200


def test_one_bad_txt_of_many_is_a_bad_record_and_no_damaged_file(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text(" ")
    assert documents([str(tmp_path / "*.txt")]) == ["one"]


def test_a_preparation_refuses_a_cut_file_of_planted_noise_too(tmp_path):
    (tmp_path / "foreign.jsonl").write_bytes(LINES[:-20])
    noise = {"planted_noise": 0.5, "planted_foreign_files": str(tmp_path / "foreign.jsonl")}
    with pytest.raises(ValueError, match=r"data\.planted_foreign_files: .*is damaged"):
        prepare(make_config(tmp_path, "train", write(tmp_path / "f.jsonl", 200), max_bad_fraction=1.0, **noise))


def test_blank_lines_at_the_end_and_zero_padding_are_no_faults_and_blank_lines_between_are(tmp_path):
    path = tmp_path / "f.jsonl.gz"
    padded = gzip.compress(LINES + b"\n\n  \n") + bytes(1000)
    path.write_bytes(padded)
    found = list(read_documents(str(path), DataConfig(prepared_dir="-"), "train"))
    assert [type(item) for item in found] == [Document] * 200
    path.write_bytes(padded + gzip.compress(LINES))
    found = list(read_documents(str(path), DataConfig(prepared_dir="-"), "train"))
    assert [(p.line, p.what) for p in found if not isinstance(p, Document)] == [
        (line, "blank line") for line in (201, 202, 203)
    ]
    assert sum(isinstance(item, Document) for item in found) == 400
    path.write_bytes(bytes(100) + padded)
    with pytest.raises(ValueError, match="is damaged"):
        documents([str(path)])


TEXTS = ("plain words, one after the other\n", "Привет, мир. Добрый день\n", "Ärzte zählen Schäfchen 🐑\n")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("text", TEXTS)
def test_utf_16_and_32_are_text_and_not_zeros(tmp_path, encoding, text):
    """Catches bytes that are valid UTF-8, and mean something else."""
    text = text * 20
    (tmp_path / "f.txt").write_bytes(text.encode(encoding))
    assert documents([str(tmp_path / "f.txt")]) == [text]
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for _ in range(3))
    for name, pack in {"f.jsonl": bytes, "f.jsonl.gz": gzip.compress}.items():
        (tmp_path / name).write_bytes(pack(lines.encode(encoding)))
        assert documents([str(tmp_path / name)]) == [text] * 3
    (tmp_path / "f.jsonl").write_bytes(lines.encode(encoding)[:-3])
    with pytest.raises(ValueError, match="is damaged"):
        documents([str(tmp_path / "f.jsonl")])
    pq.write_table(pa.table({"text": [text.encode(encoding)]}), tmp_path / "f.parquet")
    assert documents([str(tmp_path / "f.parquet")]) == [text]


EAST_ASIAN = (
    "我们今天去公园散步，天气很好。\n明天再来。",
    "あいうえおかきくけこ",  # each byte of it is ASCII
    "きょうは、いいてんきですね。さんぽにいきましょう。",
    "東京は日本の首都です。ＡＢＣと12345",
    "오늘은 날씨가 좋습니다. 공원에 갑시다.",
    "mixed 文字 and words, 半分ずつ。",
)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "gb18030", "shift_jis", "iso2022_jp", "euc_kr"])
def test_east_asian_text_that_is_no_utf_8_is_never_read_as_something_else(tmp_path, encoding):
    """Catches bytes that happen to be valid UTF-8: 'あいう' in UTF-16 is 'B0D0F0'."""
    for whole in EAST_ASIAN:
        for text in {whole[:length] for length in (8, 9, 16, len(whole))}:
            try:
                raw = text.encode(encoding)
            except UnicodeEncodeError:
                continue
            if raw.isascii() and raw.decode() == text:
                continue
            (tmp_path / "f.txt").write_bytes(raw)
            pq.write_table(pa.table({"text": [raw]}), tmp_path / "f.parquet")
            for name in ("f.txt", "f.parquet"):
                [found] = read_documents(str(tmp_path / name), DataConfig(prepared_dir="-"), "train")
                assert getattr(found, "text", text) == text
    (tmp_path / "f.txt").write_text(whole)
    assert documents([str(tmp_path / "f.txt")]) == [whole]


@pytest.mark.parametrize("text", ["two\n", "word", "Bush hid the facts", "10203040", "a0b1c2d3", "\x1b[31mred\x1b[0m"])
def test_short_text_that_could_be_utf_16_is_what_it_is_in_ascii(tmp_path, text):
    """Catches a guess at UTF-16 that takes pairs of letters for ideographs."""
    (tmp_path / "f.txt").write_text(text)
    assert documents([str(tmp_path / "f.txt")]) == [text]


def test_what_no_encoding_explains_is_a_problem_and_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(bytes(range(32)) * 50)
    [problem] = read_documents(str(tmp_path / "a.txt"), DataConfig(prepared_dir="-"), "train")
    assert "control characters" in problem.what or "not valid" in problem.what


def test_meta_as_a_string_of_json_names_the_subset_and_a_key_with_a_dot_does(tmp_path):
    lines = [
        {"text": "x", "meta": json.dumps({"pile_set_name": "books"})},
        {"text": "y", "meta.pile_set_name": "code"},
        {"text": "z", "meta": "{no json"},
    ]
    (tmp_path / "f.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = read_documents(str(tmp_path / "f.jsonl"), DataConfig(prepared_dir="-"), "train")
    assert [document.subset for document in found] == ["books", "code", "-"]
    pq.write_table(pa.table({"text": ["x"], "meta": ['{"pile_set_name": "books"}']}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["x"], "meta.pile_set_name": ["code"]}), tmp_path / "b.parquet")
    found = read_documents(str(tmp_path / "*.parquet"), DataConfig(prepared_dir="-"), "train")
    assert [document.subset for document in found] == ["books", "code"]


def test_a_subset_field_that_no_record_has_is_said_with_its_count(tmp_path, capfd):
    file = write(tmp_path / "f.jsonl", 20)
    prepare(make_config(tmp_path, "train", file))
    assert "data.subset_field" not in capfd.readouterr().err
    prepare(make_config(tmp_path, "train", file, subset_field="meta.source"))
    assert "20 of 20 documents have no field `meta.source`" in capfd.readouterr().err
    assert list(load_report(tmp_path / "prepared")["train"]["subsets"]) == ["-"]


def test_names_alike_in_size_and_time_are_two_files(tmp_path):
    """Catches a fingerprint that takes a file's content from another one's name."""
    for name, letter in (("one", "a"), ("two", "b")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "f.txt").write_text(letter * 100)
        os.utime(tmp_path / name / "f.txt", ns=(10**18, 10**18))
    one = make_config(tmp_path, "train", str(tmp_path / "one" / "f.txt"))
    known = Known()
    before = fingerprint(one, None, known)
    again = Known(known.files, before)
    assert "blake2b" in changes(before, fingerprint(remade(one, train_files=str(tmp_path / "two/f.txt")), None, again))
    (tmp_path / "one" / "f.txt").write_text("c" * 100)
    os.utime(tmp_path / "one" / "f.txt", ns=(10**18, 10**18))
    assert "blake2b" in changes(before, fingerprint(one, None, Known(known.files, before)))
    assert Path(tmp_path / "one" / "f.txt").stat().st_mtime_ns == 10**18


def test_a_file_that_is_known_is_not_read_again(tmp_path, monkeypatch):
    config = make_config(tmp_path, "train", write(tmp_path / "f.jsonl", 5))
    known = Known()
    before = fingerprint(config, None, known)
    monkeypatch.setattr("pipeline.data.fingerprint.open", lambda *_: pytest.fail("read again"), raising=False)
    assert fingerprint(config, None, Known(known.files, before)) == before


def test_a_file_that_is_written_to_while_it_is_read_is_refused_and_again_is_fine(tmp_path, monkeypatch):
    """Catches rows of one content under the fingerprint of another."""
    config = make_config(tmp_path, "train", write(tmp_path / "f.jsonl", 20))
    written = Path(config.data.train_files)
    whole = written.read_text()

    def train_and_write(*arguments):
        tokenizer = train_tokenizer(*arguments)
        written.write_text(whole + whole)
        return tokenizer

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.data.prepared.train_tokenizer", train_and_write)
        with pytest.raises(ValueError, match=r"f\.jsonl was written to while it was read"):
            prepare(config)
    assert not (tmp_path / "prepared").exists()
    written.write_text(whole + whole)
    prepare(config)
    assert load_report(tmp_path / "prepared")["train"]["documents"] == 40
