"""Documents held out of the training files, `data.eval_fraction`: chosen by what they say, and by nothing else."""

import hashlib
from collections.abc import Iterable, Iterator

from pipeline.config.schema_data import DataConfig
from pipeline.data.document import Document, Split


def digest(text: str) -> bytes:
    """Of 16 bytes, equal for texts that are equal but for white space at their ends: what makes two documents one."""
    return hashlib.blake2b(text.strip().encode(), digest_size=16).digest()


def is_held_out(text: str, fraction: float) -> bool:
    """Whether its digest, read as a number from 0 to 1, is below `fraction`: of many texts, this fraction is.

    A function of the text, so its copies go where it goes, in any order of files, at any seed, in any mixture; and what
    is held out at one fraction is held out at every larger one.
    """
    return int.from_bytes(digest(text)[:8], "big") < fraction * 2**64


def part_of(split: Split, documents: Iterable[Document], data: DataConfig) -> Iterator[Document]:
    """Those of `documents` that belong to `split`: of the training files' what is held out (eval) or what is not
    (train), and all where nothing is held out of them."""
    fraction = data.eval_fraction
    if fraction is None or split == "reference":
        return iter(documents)
    return (document for document in documents if is_held_out(document.text, fraction) == (split == "eval"))
