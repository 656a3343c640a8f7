"""Documents from files: PURE reading, one pass, bounded memory, in the same order every time.

Nothing is skipped in silence: what cannot be a document is a `Problem` with its file and line, in its place.
"""

import codecs
import glob
import io
import json
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from tqdm import tqdm

from pipeline.config.schema import BUILTIN, DataConfig
from pipeline.data.builtin import builtin_documents
from pipeline.data.document import Document, Problem, Split

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".parquet")


HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.\[\]%+-]+)?")


DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(wbits=31),  # 31: with a gzip header
    ".zst": lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj(),  # as written with --long=31
}


PROBLEMS_PRINTED = 5


PROBLEMS_KEPT = 100


def read_documents(files: str | list[str], data: DataConfig, split: Split) -> Iterator[Document | Problem]:
    """Every document of `files` (`data.train_files` or `data.eval_files`) and every problem, in their order there.

    `split` matters to `builtin` only, which holds out a twentieth. Raises ValueError on a source that cannot be read
    at all (see `resolve`).
    """
    for source in resolve(files):
        if source == BUILTIN:
            yield from builtin_documents()[split]
        elif not Path(source).is_file():
            yield from _hub(source, data)
        elif source.endswith(".parquet"):
            yield from _parquet(source, data)
        elif source.endswith(".txt"):
            yield _document({"text": Path(source).read_bytes()}, source, 1, "text", "")
        else:
            yield from _json_lines(source, data)


def resolve(files: str | list[str]) -> list[str]:
    """The sources that `files` stands for: `builtin`, existing files (a glob's are sorted) and hub ids.

    Raises ValueError on a path or glob that matches nothing, and on a file of another kind than `SUFFIXES`.
    """
    known = f"known are {', '.join(SUFFIXES)}, a hub id (owner/name or owner/name:split) and `{BUILTIN}`"
    sources: list[str] = []
    for entry in [files] if isinstance(files, str) else files:
        found = [entry] if Path(entry).exists() else sorted(glob.glob(entry, recursive=True))
        if entry == BUILTIN:
            found = [BUILTIN]
        elif not found and HUB_ID.fullmatch(entry) and not entry.endswith(SUFFIXES):
            found = [entry]
        elif not found:
            raise ValueError(f"data files: `{entry}` matches no file (in {Path.cwd()}); {known}")
        elif unknown := [path for path in found if not path.endswith(SUFFIXES) or not Path(path).is_file()]:
            raise ValueError(f"data files: `{unknown[0]}` is not a file of a known kind; {known}")
        sources += found
    if not sources:
        raise ValueError(f"data files: the list is empty; {known}")
    return sources


def gone(files: str | list[str]) -> list[str]:
    """Those of the entries that are no file any more: a path or glob that matches nothing."""
    return [
        entry
        for entry in ([files] if isinstance(files, str) else files)
        if not (Path(entry).exists() or glob.glob(entry, recursive=True) or entry == BUILTIN)
        and (entry.endswith(SUFFIXES) or not HUB_ID.fullmatch(entry))
    ]


def _document(record: object, file: str, line: int, text_field: str, subset_field: str) -> Document | Problem:
    """A document of a decoded record, or what keeps it from being one."""
    if not isinstance(record, dict):
        return Problem(file, line, "not a JSON object")
    text, subset = _field(record, text_field), _field(record, subset_field)
    if text is None:
        return Problem(file, line, f"no text field `{text_field}`")
    try:
        if isinstance(text, bytes):
            text = text.removeprefix(codecs.BOM_UTF8).decode()
        if not isinstance(text, str):
            return Problem(file, line, f"text field `{text_field}` is not a string")
        text.encode()  # JSON can spell half a surrogate pair, which no tokenizer takes
        if not isinstance(subset, str | int | None):
            return Problem(file, line, f"subset field `{subset_field}` is neither a string nor an integer")
        subset = "-" if subset is None else str(subset)
        subset.encode()
    except UnicodeError:
        return Problem(file, line, "not valid UTF-8")
    if not text or text.isspace():
        return Problem(file, line, "empty text")
    return Document(text, subset, file, line)


def _field(record: object, dotted: str) -> Any:
    """A value by its dotted name, None where any part is missing."""
    for name in dotted.split("."):
        record = record.get(name) if isinstance(record, dict) else None
    return record


def _json_lines(file: str, data: DataConfig) -> Iterator[Document | Problem]:
    """A document or a problem a line. Lines are split and decoded here: one bad byte costs one line, not the file."""
    line = 0
    try:
        for line, raw in enumerate(_lines(_chunks(file)), 1):
            try:
                record = json.loads(raw.removeprefix(codecs.BOM_UTF8 if line == 1 else b"").decode())
            except UnicodeDecodeError:
                yield Problem(file, line, "not valid UTF-8")
            except (ValueError, RecursionError):
                broken = "malformed JSON" if raw.endswith(b"\n") else "truncated last line"
                yield Problem(file, line, "blank line" if raw.isspace() else broken)
            else:
                yield _document(record, file, line, data.text_field, data.subset_field)
        if line == 0:
            yield Problem(file, 0, "empty file")
    except (EOFError, zlib.error, zstandard.ZstdError):
        yield Problem(file, line, "compressed stream ends or is corrupt after this line, the rest of the file is lost")


def _chunks(file: str) -> Iterator[bytes]:
    """The bytes of a file, decompressed by its suffix. Raises EOFError where a compressed stream ends too soon."""
    start = DECOMPRESSORS.get(Path(file).suffix)
    with open(file, "rb") as stream:
        decompressor = None
        while chunk := stream.read(1 << 17):
            if start is None:
                yield chunk
            while start is not None and chunk:  # a file may be several compressed streams, one after the other
                decompressor = decompressor or start()
                yield decompressor.decompress(chunk)
                chunk = decompressor.unused_data
                if decompressor.eof:
                    decompressor = None
        if decompressor is not None:
            raise EOFError(f"{file} ends inside a compressed stream")


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    r"""The lines of a byte stream with their `\n`, of any length; the last may lack it."""
    parts: list[bytes] = []
    for chunk in chunks:
        for part in io.BytesIO(chunk):  # splits at \n only
            parts.append(part)
            if part.endswith(b"\n"):
                yield b"".join(parts)
                parts = []
    if parts:
        yield b"".join(parts)


def _parquet(file: str, data: DataConfig) -> Iterator[Document | Problem]:
    row = 0
    columns = [data.text_field.split(".")[0], data.subset_field.split(".")[0]]
    try:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=256, columns=columns):
            for index in range(batch.num_rows):
                row += 1
                try:
                    record = batch.slice(index, 1).to_pylist()[0]
                except UnicodeDecodeError:
                    yield Problem(file, row, "not valid UTF-8")
                else:
                    yield _document(record, file, row, data.text_field, data.subset_field)
        if row == 0:
            yield Problem(file, 0, "empty file")
    except (pa.ArrowException, OSError):
        yield Problem(file, row, "parquet is corrupt after this row, the rest of the file is lost")


def _hub(source: str, data: DataConfig) -> Iterator[Document | Problem]:
    from datasets import load_dataset  # slow to import, and seldom wanted

    name, _, split = source.partition(":")
    try:
        stream = load_dataset(name, split=split or "train", streaming=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"data files: `{source}` is no file here, and as a hub dataset it cannot be opened ({error}); "
            "check the spelling, the split and the network"
        ) from error
    for row, record in enumerate(stream, 1):
        yield _document(record, source, row, data.text_field, data.subset_field)


@dataclass
class Problems:
    """What was wrong with the records of a split so far."""

    limit: float
    documents: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    first: list[Problem] = field(default_factory=list)

    def leave_out(self, records: Iterable[Document | Problem]) -> Iterator[Document]:
        """The documents among the records. Raises ValueError as soon as, of 1,000 records or more, ten times more than
        `limit` are problems: a wrong field name should not cost a night. The verdict on all is the caller's `check`."""
        for record in records:
            if isinstance(record, Document):
                self.documents += 1
                yield record
                continue
            self.kinds[record.what] += 1
            if len(self.first) < PROBLEMS_KEPT:
                self.first.append(record)
            if len(self.first) <= PROBLEMS_PRINTED and self.kinds.total() <= PROBLEMS_PRINTED:
                tqdm.write(f"left out: {record.file}:{record.line}: {record.what}", file=sys.stderr)
            if self.documents + self.kinds.total() >= 1_000:
                self.check(10 * self.limit)

    def check(self, limit: float) -> None:
        """Raises ValueError where more than `limit` of the records so far are problems."""
        problems, records = self.kinds.total(), self.documents + self.kinds.total()
        if problems > limit * records:
            offenders = "\n".join(f"  {p.file}:{p.line}: {p.what}" for p in self.first[:PROBLEMS_PRINTED])
            raise ValueError(
                f"{problems} of {records} records cannot be used, more than data.max_bad_fraction = {self.limit} of "
                f"them:\n{offenders}\nRepair the files, or raise data.max_bad_fraction to leave such records out."
            )
