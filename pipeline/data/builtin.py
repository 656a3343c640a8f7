"""The built-in corpus: text that every Python installation carries, so that anything runs without data."""

import hashlib
import io
import math
import pydoc_data.topics
import re
import ssl
import sys
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from pipeline.data.document import Document

PIECE = 8_192  # characters that a builtin document may have; longer ones are cut at line ends


HELD_OUT = 20  # one in so many builtin documents is for evaluation


JUNK_FRACTION = 0.05  # bytes that certificates, and tables, may add to the builtin text


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
