"""The bytes of a file as lines of UTF-8: decompressed, recoded from UTF-16 and UTF-32; pointers recognised."""

import codecs
import io
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import zstandard

DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(wbits=31),  # 31: with a gzip header
    ".zst": lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj(),  # as written with --long=31
}


POINTERS = {
    b"version https://git-lfs.github.com/spec/": "a git-lfs pointer instead of the file; fetch it with `git lfs pull`",
    b"version https://hawser.github.com/spec/": "a git-lfs pointer instead of the file; fetch it with `git lfs pull`",
    b"# xet version ": "a git-xet pointer instead of the file; fetch it with `git xet checkout`",
    b"/annex/objects/": "a git-annex pointer instead of the file; fetch it with `git annex get`",
}


BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16's, which is the beginning of it
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


CONTROLS = frozenset(range(32)) - frozenset(b"\t\n\v\f\r\x1b")
"""Bytes that hardly occur in UTF-8 text, and are half of most text in UTF-16."""


EAST_ASIAN = re.compile(r"[\s!-~\u2010-\u2030\u3000-\u9fff\uac00-\ud7a3\uff00-\uffef]+")


def pointer(file: str | Path) -> str | None:
    """What stands in the place of a file that was never fetched; None where the file is there."""
    with open(file, "rb") as stream:
        head = stream.read(64)
    return next((what for start, what in POINTERS.items() if head.startswith(start)), None)


def chunks(file: str) -> Iterator[bytes]:
    """The bytes of a file, decompressed by its suffix. Raises EOFError where a compressed stream ends too soon."""
    suffix = Path(file).suffix
    start = DECOMPRESSORS.get(suffix)
    with open(file, "rb") as stream:
        decompressor, streams = None, 0
        while chunk := stream.read(1 << 17):
            if start is None:
                yield chunk
            while start is not None and chunk:  # a file may be several compressed streams, one after the other
                if decompressor is None and streams and suffix == ".gz":
                    chunk = chunk.lstrip(b"\0")  # as gzip does: tapes and block devices pad with zeros
                    if not chunk:
                        break
                decompressor = decompressor or start()
                yield decompressor.decompress(chunk)
                chunk = decompressor.unused_data
                if decompressor.eof:
                    decompressor, streams = None, streams + 1
        if decompressor is not None:
            raise EOFError(f"{file} ends inside a compressed stream")


def utf8(parts: Iterable[bytes]) -> Iterator[bytes]:
    """A stream of JSON in UTF-8, whatever Unicode encoding it has, without a byte order mark. Bytes that are no UTF-8
    stay as they are. Raises UnicodeError where UTF-16 or UTF-32 is broken, or ends inside a character."""
    decoder = None
    begun = False
    for part in parts:
        if not begun and part:
            begun, encoding = True, json_encoding_of(part)
            part = part.removeprefix(_bom(part))
            if encoding != "utf-8":
                decoder = codecs.getincrementaldecoder(encoding)()
        yield decoder.decode(part).encode() if decoder else part
    if decoder:
        decoder.decode(b"", final=True)


def lines(parts: Iterable[bytes]) -> Iterator[bytes]:
    r"""The lines of a byte stream with their `\n`, of any length; the last may lack it."""
    waiting: list[bytes] = []
    for chunk in parts:
        for part in io.BytesIO(chunk):  # splits at \n only
            waiting.append(part)
            if part.endswith(b"\n"):
                yield b"".join(waiting)
                waiting = []
    if waiting:
        yield b"".join(waiting)


def decode(raw: bytes) -> str:
    """A whole text from its bytes, in whatever Unicode encoding, without a byte order mark. Raises UnicodeError where
    it has none, or none that can be told."""
    encoding, head = encoding_of(raw), raw[:1_000_000]
    if encoding == "utf-8" and (_may_be_utf_16(head) or b"\x1b$" in head):
        raise UnicodeError("UTF-16 without a byte order mark, or ISO-2022")
    text = raw.removeprefix(_bom(raw)).decode(encoding)
    begin = text[:1_000_000]
    if 10 * sum(begin.count(chr(control)) for control in CONTROLS) > len(begin) > 2:
        raise UnicodeError("a tenth of it or more is control characters")
    return text


def _may_be_utf_16(raw: bytes) -> bool:
    """Whether it is East Asian text in UTF-16, all of it, in either byte order, and no plain text: it is not UTF-8, or
    has control characters, or would be kana by chance. Nobody can tell a few ideographs from as many pairs of letters
    of ASCII."""
    for encoding in ("utf-16-le", "utf-16-be"):
        try:
            text = raw.decode(encoding)
        except UnicodeError:
            continue
        if EAST_ASIAN.fullmatch(text):
            kana = sum("\u3041" <= character <= "\u30ff" for character in text)
            plain = _decodes(raw, "utf-8") and not CONTROLS & set(raw)
            if not plain or 2 * kana > len(text) > 2:
                return True
    return False


def encoding_of(raw: bytes) -> str:
    """The Unicode encoding of a text, by its byte order mark or by where its control characters are; utf-8 where
    nothing speaks against it."""
    if (marked := _marked(raw)) is not None:
        return marked
    sample = raw[:4096]
    for name in ("utf-32-le", "utf-32-be"):
        # Four bytes of UTF-8 text are hardly ever a code point.
        if len(sample) >= 4 and _decodes(sample[: len(sample) // 4 * 4], name):
            return name
    if len(sample) < 4:
        return "utf-8"
    even, odd = (sum(byte in CONTROLS for byte in half) / len(half) for half in (sample[::2], sample[1::2]))
    # Of most scripts, the high bytes are 0 (Latin) to 0x1F; the low ones are anything.
    if max(even, odd) >= 0.5 and min(even, odd) <= 0.35:
        return "utf-16-le" if odd > even else "utf-16-be"
    return "utf-8"


def json_encoding_of(raw: bytes) -> str:
    """The same of JSON, which begins with a character of ASCII."""
    if (marked := _marked(raw)) is not None:
        return marked
    for name in ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be"):
        if any(raw.startswith(character.encode(name)) for character in '{["'):
            return name
    return "utf-8"


def _decodes(raw: bytes, encoding: str) -> bool:
    try:
        raw.decode(encoding)
    except UnicodeError:
        return False
    return True


def _marked(raw: bytes) -> str | None:
    return next((name for bom, name in BOMS if raw.startswith(bom)), None)


def _bom(raw: bytes) -> bytes:
    return next((bom for bom, _ in BOMS if raw.startswith(bom)), b"")
