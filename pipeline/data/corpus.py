"""Documents from files: PURE reading, one pass, bounded memory, in the same order every time.

Nothing is skipped in silence: what cannot be a document is a `Problem` with its file and line, in its place.
"""

import csv
import glob
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from pipeline.config.schema_data import BUILTIN, DataConfig
from pipeline.data.builtin import builtin_documents
from pipeline.data.document import Document, Problem, Split
from pipeline.data.hub import FORMS, hub_corpus, records
from pipeline.data.problems import Problems
from pipeline.data.streams import chunks, decode, pointer, utf8
from pipeline.data.streams import lines as _lines

__all__ = ["SUFFIXES", "Problems", "check_files", "field_of", "read_documents", "resolve", "same_source"]

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".parquet", ".csv", ".tsv")


def read_documents(
    files: str | list[str], data: DataConfig, split: Split, whole_records: bool = False
) -> Iterator[Document | Problem]:
    """Every document of `files` (`data.train_files` or `data.eval_files`) and every problem, in their order there.

    `split` matters to `builtin` only, which holds out a twentieth. `whole_records`: each with its `record`.
    Raises ValueError on a source that cannot be read at all (see `resolve`).
    """
    for source in resolve(files):
        if source == BUILTIN:
            yield from builtin_documents()[split]
        elif not Path(source).is_file():
            for row, record in enumerate(records(source), 1):
                yield _document(record, source, row, data.text_field, data.subset_field, whole_records)
        elif what := pointer(source):
            yield Problem(source, 0, what, whole_file=True)
        elif source.endswith(".parquet"):
            yield from _parquet(source, data, whole_records)
        elif source.endswith((".csv", ".tsv")):
            yield from _table(source, data, whole_records)
        elif source.endswith(".txt"):
            yield _document({"text": Path(source).read_bytes()}, source, 1, "text", "")
        else:
            yield from _json_lines(source, data, whole_records)


def check_files(files: str | list[str], key: str) -> None:
    """Raises ValueError, naming each, where files are none at first sight: pointers to files that were never fetched,
    or parquet without its end. Before anything takes long."""
    damaged = []
    for source in resolve(files):
        if source == BUILTIN or not Path(source).is_file():
            continue
        what = pointer(source)
        if what is None and source.endswith(".parquet"):
            try:
                pq.ParquetFile(source)
            except (pa.ArrowException, OSError) as error:
                what = f"no whole parquet file ({error})"
        damaged += [f"  {source}: {what}"] if what else []
    if damaged:
        more = [f"  ... and {len(damaged) - 20} more"] * (len(damaged) > 20)
        raise ValueError("\n".join([f"{key}: these files cannot be read:", *damaged[:20], *more]))


def resolve(files: str | list[str]) -> list[str]:
    """The sources that `files` stands for: `builtin`, existing files (a glob's are sorted) and hub ids.

    Raises ValueError on a path or glob that matches nothing, and on a file of another kind than `SUFFIXES`.
    """
    known = f"known are {', '.join(SUFFIXES)}, a hub id ({FORMS}) and `{BUILTIN}`"
    sources: list[str] = []
    for entry in [files] if isinstance(files, str) else files:
        found = [entry] if Path(entry).exists() else _matches(entry)
        if entry == BUILTIN:
            found = [BUILTIN]
        elif not found and hub_corpus(entry) and not entry.endswith(SUFFIXES):
            found = [entry]
        elif not found:
            bracket = "; a bracket of a name is written [[] beside wildcards" if "[" in entry else ""
            raise ValueError(f"data files: `{entry}` matches no file (in {Path.cwd()}){bracket}; {known}")
        elif unreal := [path for path in found if not Path(path).is_file()]:
            raise ValueError(f"data files: `{unreal[0]}` is no file (a folder, or a link that leads nowhere); {known}")
        elif unknown := [path for path in found if not path.endswith(SUFFIXES)]:
            raise ValueError(f"data files: `{unknown[0]}` is not a file of a known kind; {known}")
        sources += found
    if not sources:
        raise ValueError(f"data files: the list is empty; {known}")
    return sources


def _matches(pattern: str) -> list[str]:
    """The files of a glob, sorted; those of a folder once, by however many links one comes to it."""
    found: dict[Path, str] = {}
    for path in sorted(glob.glob(pattern, recursive=True), key=lambda path: (path.count("/"), path)):
        found.setdefault(Path(path).parent.resolve() / Path(path).name, path)
    return sorted(found.values())


def gone(files: str | list[str]) -> list[str]:
    """Those of the entries that are no file any more: a path or glob that matches nothing."""
    return [
        entry
        for entry in ([files] if isinstance(files, str) else files)
        if not (Path(entry).exists() or glob.glob(entry, recursive=True) or entry == BUILTIN)
        and (entry.endswith(SUFFIXES) or not hub_corpus(entry))
    ]


def _document(
    record: object, file: str, line: int, text_field: str, subset_field: str, whole: bool = False
) -> Document | Problem:
    """A document of a decoded record, or what keeps it from being one."""
    if not isinstance(record, dict):
        return Problem(file, line, "not a JSON object")
    text, subset = field_of(record, text_field), field_of(record, subset_field)
    if text is None:
        return Problem(file, line, f"no text field `{text_field}`")
    try:
        if isinstance(text, bytes):
            text = decode(text)
        if not isinstance(text, str):
            return Problem(file, line, f"text field `{text_field}` is not a string")
        text.encode()  # JSON can spell half a surrogate pair, which no tokenizer takes
        if not isinstance(subset, str | int | None):
            return Problem(file, line, f"subset field `{subset_field}` is neither a string nor an integer")
        subset = "-" if subset in (None, "") else str(subset)
        subset.encode()
    except (UnicodeDecodeError, UnicodeEncodeError):
        return Problem(file, line, "not valid UTF-8")
    except UnicodeError:
        return Problem(file, line, "no UTF-8: control characters, UTF-16 without a byte order mark, or ISO-2022")
    if not text or text.isspace():
        return Problem(file, line, "empty text")
    return Document(text, subset, file, line, record if whole else None)


def field_of(record: object, dotted: str) -> Any:
    """A value by its dotted name, None where any part is missing. A key that has the dots in it counts too, and an
    object that a file keeps as a string of JSON."""
    if isinstance(record, dict) and dotted in record:
        return record[dotted]
    for name in dotted.split("."):
        if isinstance(record, str) and record.lstrip().startswith("{"):
            try:
                record = json.loads(record)
            except (ValueError, RecursionError):
                return None
        record = record.get(name) if isinstance(record, dict) else None
    return record


def _json_lines(file: str, data: DataConfig, whole_records: bool) -> Iterator[Document | Problem]:
    """A document or a problem a line, blank lines at the end apart. Lines are split and decoded here: one bad byte
    costs one line, not the file."""
    line, blank, found = 0, 0, False
    try:
        for line, raw in enumerate(_lines(utf8(chunks(file))), 1):
            if raw.isspace():
                blank += 1
                continue
            yield from (Problem(file, number, "blank line") for number in range(line - blank, line))
            blank, found, ended = 0, True, raw.endswith(b"\n")
            try:
                record = json.loads(raw.decode())
            except UnicodeDecodeError:
                yield Problem(file, line, "not valid UTF-8") if ended else _cut(file, line)
            except (ValueError, RecursionError):
                yield Problem(file, line, "malformed JSON") if ended else _cut(file, line)
            else:
                yield _document(record, file, line, data.text_field, data.subset_field, whole_records)
        if not found:
            yield Problem(file, 0, "empty file")
    except (EOFError, zlib.error, zstandard.ZstdError):
        what = "compressed stream ends or is corrupt after this line, the rest of the file is lost"
        yield Problem(file, line, what, whole_file=True)
    except UnicodeError as error:
        what = "encoding is broken after this line, the rest of the file is lost"
        yield Problem(file, line, f"{getattr(error, 'encoding', 'UTF-16')} {what}", whole_file=True)


def _cut(file: str, line: int) -> Problem:
    return Problem(file, line, "truncated last line", whole_file=True)


def _parquet(file: str, data: DataConfig, whole_records: bool) -> Iterator[Document | Problem]:
    row = 0
    dotted = (data.text_field, data.subset_field)
    try:
        parquet = pq.ParquetFile(file)
        names = parquet.schema_arrow.names
        columns = [name if name in names else name.split(".")[0] for name in dotted]
        for batch in parquet.iter_batches(batch_size=256, columns=None if whole_records else columns):
            for index in range(batch.num_rows):
                row += 1
                try:
                    record = batch.slice(index, 1).to_pylist()[0]
                except UnicodeDecodeError:
                    yield Problem(file, row, "not valid UTF-8")
                else:
                    yield _document(record, file, row, data.text_field, data.subset_field, whole_records)
        if row == 0:
            yield Problem(file, 0, "empty file")
    except (pa.ArrowException, OSError):
        what = "parquet is corrupt after this row, the rest of the file is lost"
        yield Problem(file, row, what, whole_file=True)


def _table(file: str, data: DataConfig, whole_records: bool) -> Iterator[Document | Problem]:
    """A record a row, its fields named by the first one. `.csv`: commas, and quotes around what has them; `.tsv`: tabs,
    and quotes are characters like others, as GLUE has it."""
    csv.field_size_limit(2**31 - 1)
    how: dict[str, Any] = {} if file.endswith(".csv") else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    row = 0
    try:
        with open(file, encoding="utf-8-sig", newline="") as stream:
            lines = csv.reader(stream, **how)
            names, blank = next(lines, []), 0
            for row, values in enumerate(lines, 1):
                if not values:
                    blank += 1
                    continue
                yield from (Problem(file, number, "blank line") for number in range(row - blank, row))
                blank = 0
                if len(values) != len(names):
                    yield Problem(file, row, "another number of fields than the first line names")
                else:
                    record = dict(zip(names, values, strict=True))
                    yield _document(record, file, row, data.text_field, data.subset_field, whole_records)
    except UnicodeDecodeError:
        yield Problem(file, row, "not valid UTF-8 after this row, the rest of the file is lost", whole_file=True)
    except csv.Error as error:
        yield Problem(file, row, f"no {Path(file).suffix[1:]} after this row ({error})", whole_file=True)
    if row == 0:
        yield Problem(file, 0, "empty file")


def same_source(source: str) -> object:
    """What is equal for all names of one file (links too), and for all ways to write one hub corpus."""
    if source == BUILTIN:
        return source
    path = Path(source)
    if not path.is_file():
        return hub_corpus(source)
    state = path.stat()
    return (state.st_dev, state.st_ino) if state.st_ino else path.resolve()
