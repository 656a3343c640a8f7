"""The built-in corpus: the same every time, its splits apart, its subsets mixed."""

import io
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.schema_data import DataConfig
from pipeline.data import builtin
from pipeline.data.builtin import builtin_documents
from pipeline.data.corpus import read_documents


def test_builtin_splits_share_no_text_and_each_holds_every_subset():
    train, held_out = (builtin_documents()[split] for split in ("train", "eval"))
    assert not {d.text for d in train} & {d.text for d in held_out}
    assert len({d.text for d in train}) == len(train)
    subsets = {"stdlib", "topics", "packages", "certificates", "tables"}
    assert {d.subset for d in train} == {d.subset for d in held_out} == subsets
    assert 0.04 < len(held_out) / len(train + held_out) < 0.06
    sizes: Counter[str] = Counter()
    for document in train + held_out:
        sizes[document.subset] += len(document.text.encode())
    assert 6e6 < sizes.total() < 20e6
    assert sizes["certificates"] + sizes["tables"] < 0.1 * sizes.total()
    places = [(d.file, d.line) for d in train + held_out]
    assert len(set(places)) == len(places)
    assert not any(Path(file).is_absolute() or ".." in Path(file).parts for file, _ in places)
    assert max(len(d.text) for d in train + held_out) < 40_000
    assert list(read_documents("builtin", DataConfig(prepared_dir="unused"), "eval")) == held_out


def test_builtin_is_the_same_when_read_again_and_mixes_its_subsets():
    first = builtin_documents()
    builtin_documents.cache_clear()
    assert builtin_documents() == first
    # Mixed, each subset's mean place lies within some standard errors (1 / sqrt(12 n)) of the middle.
    places: dict[str, list[float]] = {}
    for index, document in enumerate(first["train"]):
        places.setdefault(document.subset, []).append((index + 0.5) / len(first["train"]))
    assert len(places) == 5
    for own in places.values():
        assert abs(sum(own) / len(own) - 0.5) < 4.5 / (12 * len(own)) ** 0.5


@given(st.text(alphabet="ab \n\r\f\u2028", max_size=200))
def test_pieces_of_a_text_put_together_are_the_text(text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtin, "PIECE", 20)
        pieces = list(builtin._pieces("s", "name", text))
    assert "".join(d.text for d in pieces).strip() == text.strip()
    for piece in pieces:
        assert text.split("\n")[piece.line - 1] == piece.text.split("\n")[0]
        *before, _ = io.StringIO(piece.text)
        assert len(piece.text) <= 20 or not "".join(before).strip()  # only one line too long makes a long piece
