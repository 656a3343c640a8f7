"""Documents from files: PURE reading, one pass, bounded memory, in the same order every time.

Nothing is skipped in silence: what cannot be a document is a `Problem` with its file and line, in its place.
"""

import codecs
import glob
import hashlib
import io
import json
import math
import pydoc_data.topics
import re
import ssl
import sys
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from pipeline.config import BUILTIN, DataConfig

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".parquet")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.\[\]%+-]+)?")
DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(wbits=31),  # 31: with a gzip header
    ".zst": lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj(),  # as written with --long=31
}

PIECE = 32_768  # characters that a builtin document may have; longer ones are cut at line ends
HELD_OUT = 20  # one in so many builtin documents is for evaluation
JUNK_FRACTION = 0.05  # bytes that certificates, and tables, may add to the builtin text


@dataclass(frozen=True)
class Document:
    text: str
    subset: str
    file: str
    line: int
    """Where it starts: line of the file, or row (hub, parquet), from 1."""


@dataclass(frozen=True)
class Problem:
    file: str
    line: int
    """As in `Document`; 0 for the file itself."""
    what: str
    """Its kind, in the same words wherever it occurs, so that kinds can be counted."""


def read_documents(
    files: str | list[str], data: DataConfig, split: Literal["train", "eval"]
) -> Iterator[Document | Problem]:
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


@cache
def builtin_documents() -> dict[str, list[Document]]:
    """The text that every Python installation carries, `train` and `eval`: the same on the same installation.

    Subsets: `stdlib`, `topics`, `packages`, and natural junk, `certificates` and `tables`. Identical texts are there
    once; every subset with two documents or more is in both splits. Splits are mixed by a hash of name and text.
    """
    unique: dict[str, Document] = {}
    for document in _builtin():
        unique.setdefault(_hash(document.text), document)
    subsets: dict[str, list[Document]] = {}
    for _, document in sorted(unique.items()):  # by hash: what is held out or left out depends on the text alone
        subsets.setdefault(document.subset, []).append(document)
    clean = sum(len(d.text) for d in unique.values() if d.subset in ("stdlib", "topics", "packages"))
    for junk in ("certificates", "tables"):
        room = int(JUNK_FRACTION * clean)
        subsets[junk] = [d for d in subsets.get(junk, []) if (room := room - len(d.text)) >= 0]
    splits: dict[str, list[Document]] = {"train": [], "eval": []}
    for documents in subsets.values():
        held_out = math.ceil(len(documents) / HELD_OUT)
        splits["eval"] += documents[:held_out]
        splits["train"] += documents[held_out:]
    for documents in splits.values():
        documents.sort(key=lambda d: _hash(f"{d.file}:{d.line}:{d.text}"))
    return splits


def _builtin() -> Iterator[Document]:
    stdlib = Path(sysconfig.get_path("stdlib"))
    for path in sorted(stdlib.rglob("*.py")):
        name = path.relative_to(stdlib)
        # Tests would triple the corpus, topics follow below, and what pip installed is not the standard library.
        if not {"test", "tests", "idle_test", "pydoc_data", "site-packages", "dist-packages"} & set(name.parts):
            text = path.read_bytes().decode(errors="replace")
            coded = name.parts[0] == "encodings" and re.search(r"^(de|en)coding_(table|map)\b", text, re.MULTILINE)
            table = coded or name.as_posix() == "html/entities.py"
            yield from _pieces("tables" if table else "stdlib", f"stdlib/{name.as_posix()}", text)
    for topic, text in sorted(pydoc_data.topics.topics.items()):
        yield from _pieces("topics", f"topics/{topic}", text)
    # Not importlib.metadata: it also looks into the current directory, and would change with it.
    installed = sorted({Path(p) for p in sys.path if Path(p).name in ("site-packages", "dist-packages")})
    for root in installed:
        for path in sorted(root.glob("*.dist-info/**/*")):
            if path.is_file() and re.match("METADATA$|LICEN[CS]E|COPYING|NOTICE", path.name):
                text = path.read_bytes().decode(errors="replace")
                if path.name == "METADATA":
                    text = text.partition("\n\n")[2]  # the description, which follows the headers
                yield from _pieces("packages", f"packages/{path.relative_to(root).as_posix()}", text)
    bundles = [root / package / "cacert.pem" for root in installed for package in ("certifi", "pip/_vendor/certifi")]
    for path in [*bundles, Path(ssl.get_default_verify_paths().cafile or "")]:
        if path.is_file():
            text, line = path.read_bytes().decode(errors="replace"), 1
            for certificate in re.findall(r".*?-----END CERTIFICATE-----\n", text, re.DOTALL):
                yield Document(certificate, "certificates", f"certificates/{path.name}", line)
                line += certificate.count("\n")
            return  # one bundle: the others hold the same authorities


def _pieces(subset: str, name: str, text: str) -> Iterator[Document]:
    """A text in pieces of at most `PIECE` characters, cut at line ends (a longer line stays whole)."""
    piece, start, end = "", 1, 1
    for line in [*io.StringIO(text), ""]:  # splits at \n only, unlike str.splitlines
        if (not line or len(piece) + len(line) > PIECE) and piece.strip():
            yield Document(piece, subset, name, start)
            piece, start = "", end
        piece += line
        end += 1


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
