"""Several sources with weights: their order, and how they are prepared."""

import random
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.schema import Config
from pipeline.config.schema_data import SourceConfig
from pipeline.data.mixture import PARTS, Deal, MixtureOrder, Source, plan, shares_of
from pipeline.data.order import Order
from pipeline.data.prepared import ensure_prepared, load_report, load_split, prepare
from pipeline.data.samples import training_samples
from pipeline.prepare import _table
from tests.corpora import make_config, remade, write


def made(*sources: tuple[int, float, float | None]) -> list[Source]:
    """Sources of (rows, weight, epochs), their rows one after the other."""
    firsts = np.cumsum([0, *(rows for rows, *_ in sources)]).tolist()
    return [
        Source(f"s{i}", first, rows, weight, epochs)
        for i, (first, (rows, weight, epochs)) in enumerate(zip(firsts, sources, strict=False))
    ]


def slowly(sources: list[Source], seed: int, positions: int) -> list[tuple[int, int]]:
    """(row, epoch) of every position, one by one: the source that is owed most has the next one."""
    found: list[tuple[int, int]] = []
    read = [0] * len(sources)
    gone: set[int] = set()
    owed: dict[int, Fraction] = {}
    while len(found) < positions:
        now_gone = {s for s, e in enumerate(sources) if e.epochs is not None and read[s] >= int(e.epochs * e.rows)}
        if now_gone != gone or not owed:
            gone = now_gone
            owed = {s: Fraction(0) for s in range(len(sources)) if s not in gone}
        if not owed:
            break
        parts = shares_of([sources[s].weight for s in owed])
        for s, part in zip(owed, parts, strict=True):
            owed[s] += Fraction(part, sum(parts))
        chosen = max(owed, key=lambda s: (owed[s], -s))
        owed[chosen] -= 1
        epoch = read[chosen] // sources[chosen].rows
        found.append((sources[chosen].first_row + Order(sources[chosen].rows, seed).row(read[chosen]), epoch))
        read[chosen] += 1
    return found


SOURCES = st.lists(
    st.tuples(
        st.integers(1, 7), st.sampled_from([0.1, 0.25, 0.3, 0.7, 1.0, 3.0]), st.sampled_from([None, 0.1, 1, 1.5, 3])
    ),
    min_size=1,
    max_size=5,
)


@given(SOURCES, st.integers(0, 3), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=60)
def test_every_position_is_what_a_slow_loop_gives(drawn, seed, shuffled):
    """Catches an order that depends on what was asked for before, a source that goes on past its epochs, shares that
    are not renormalised, and rows of another source."""
    sources = made(*drawn)
    expected = slowly(sources, seed, 120)
    order = MixtureOrder(sources, seed)
    assert order.end is None or min(order.end, 120) == len(expected)
    positions = list(range(len(expected)))
    shuffled.shuffle(positions)
    assert {p: (order.row(p), order.epoch(p)) for p in positions} == dict(enumerate(expected))
    for n in positions[:10]:
        owners = order.sources_of_rows(np.array([row for row, _ in expected[:n]], dtype=int))
        assert order.read(n) == np.bincount(owners, minlength=len(sources)).tolist()


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=8))
@settings(deadline=None, max_examples=40)
def test_after_any_number_of_turns_everyone_is_near_its_share(weights):
    """Catches shares that hold in the end only, as drawing at random or one source after the other would."""
    shares = shares_of(weights)
    deal, total = Deal(shares), sum(shares)
    behind = sum(Fraction(1, k) for k in range(2, len(shares) + 1))
    counts = [0] * len(shares)
    for n in range(1, 300):
        s, before = deal.turn(n - 1)
        assert before == counts[s]
        counts[s] += 1
        for count, share in zip(counts, shares, strict=True):
            assert -behind <= count - Fraction(n * share, total) < 1
        assert deal.counts(n) == counts


def test_turns_far_out_are_those_of_a_loop_without_a_period():
    """Catches a wrong place or count after the first round."""
    deal, counts = Deal([7, 2, 1]), [0, 0, 0]
    assert [deal.turn(n)[0] for n in range(40)] == [deal.turn(n % 10)[0] for n in range(40)]
    for n in range(57):
        s, before = deal.turn(n)
        assert before == counts[s]
        counts[s] += 1
        assert deal.last(s, counts[s]) == n + 1
    assert deal.turn(10**12 + 3)[1] == Deal([7, 2, 1]).counts(10**12 + 3)[deal.turn(3)[0]]


def test_shares_are_weights_to_a_millionth_and_none_is_lost():
    assert shares_of([0.7, 0.3]) == shares_of([7, 3]) == [700_000, 300_000]
    assert shares_of([5.0]) == [PARTS]
    assert shares_of([1, 1, 1]) == [333_334, 333_333, 333_333]
    assert shares_of([1e-12, 1.0, 1e-12]) == [1, PARTS - 2, 1]
    assert sum(shares_of([random.Random(0).random() for _ in range(9)])) == PARTS


def test_the_plan_says_epochs_and_ends_and_refuses_more_steps_than_there_are():
    order = MixtureOrder(made((10, 0.5, 1.0), (100, 0.4, None), (50, 0.1, None)), 0)
    said = plan(order, 0, 0, 4, 10)
    assert [each.split(": ")[1] for each in said] == [
        "s0 is 25.00% of what is read up to step 10, 1.00 of its epochs",
        "s1 is 60.00% of what is read up to step 10, 0.24 of its epochs",
        "s2 is 15.00% of what is read up to step 10, 0.12 of its epochs",
        "s0 ends after 20 sequences, and all that follow are s1 80.00%, s2 20.00%",
    ]
    assert not any("ends" in each for each in plan(order, 0, 0, 4, 4))
    ends = MixtureOrder(made((10, 0.5, 1.0), (10, 0.5, 1.5)), 0)
    assert ends.end == 25
    assert plan(ends, 0, 0, 4, 6)
    with pytest.raises(ValueError, match=r"end after 25 sequences, which is data for 6 steps of 4, and max_steps is 7"):
        plan(ends, 0, 0, 4, 7)
    with pytest.raises(ValueError, match=r"data for 10 steps of 2, and max_steps is 12"):
        plan(ends, 16, 6, 2, 12)  # six steps of fewer sequences came before, and four of two are left
    with pytest.raises(ValueError, match=r"epochs end after 25 sequences, and position 25 was asked for"):
        ends.row(25)
    with pytest.raises(ValueError, match="data for 0 steps"):
        plan(MixtureOrder(made((3, 1.0, 0.1)), 0), 0, 0, 1, 1)


# How they are prepared


@pytest.fixture
def mixed(tmp_path: Path) -> Config:
    """Two sources, of which the first has two files."""
    files = {
        "b": [write(tmp_path / "b1.jsonl", 30), write(tmp_path / "b2.jsonl", 25, first=100)],
        "a": write(tmp_path / "a.jsonl", 40, first=200),
    }
    mixture = {name: SourceConfig(files=paths) for name, paths in files.items()}
    return make_config(tmp_path, "train", None, mixture=mixture)  # type: ignore[arg-type]


def with_mixture(config: Config, **changes: dict[str, Any]) -> Config:
    mixture = {name: SourceConfig(**(vars(old) | changes.get(name, {}))) for name, old in config.data.mixture.items()}
    return remade(config, mixture=mixture)


def test_a_row_has_one_source_and_the_report_says_which(mixed, tmp_path):
    """Catches rows packed across sources, and a report that counts them wrong."""
    prepare(mixed)
    report = load_report(mixed.data.prepared_dir)["train"]
    rows = load_split(mixed.data.prepared_dir, "train").to_list()
    documents = pq.read_table(Path(mixed.data.prepared_dir) / "documents/train.parquet").to_pylist()
    assert [document["document_id"] for document in documents] == list(range(95))
    assert list(report["sources"]) == ["a", "b"]
    place = {"first_row": 0, "first_document": 0}
    for name, source in report["sources"].items():
        assert {key: source[key] for key in place} == place
        own = rows[source["first_row"] :][: source["sequences"]]
        ids = {number for row in own for number in row["document_ids"]} - {-1}
        assert ids == set(range(source["first_document"], source["first_document"] + source["documents"]))
        assert {Path(documents[number]["file"]).name[0] for number in ids} == {name}
        assert source["tokens"] == sum(documents[number]["tokens"] for number in ids)
        assert source["tokens"] == sum(number >= 0 for row in own for number in row["document_ids"])
        place = {"first_row": place["first_row"] + source["sequences"],
                 "first_document": place["first_document"] + source["documents"]}  # fmt: skip
        for row in own:
            subsets = dict.fromkeys(number for number in row["document_ids"] if number >= 0)
            assert row["subset"] == [documents[number]["subset"] for number in subsets]
    assert place["first_row"] == len(rows) == report["sequences"]
    assert sum(source["tokens"] for source in report["sources"].values()) == report["tokens"]
    assert "train source b: " in _table(load_report(mixed.data.prepared_dir))


def test_the_first_source_is_what_its_files_alone_would_be(mixed, tmp_path):
    tokenizer = Path(mixed.data.prepared_dir) / "tokenizer"
    prepare(mixed)
    (tmp_path / "alone").mkdir()
    alone = make_config(tmp_path / "alone", str(tokenizer), mixed.data.mixture["a"].files)
    prepare(alone)
    expected = load_split(alone.data.prepared_dir, "train").to_list()
    assert load_split(mixed.data.prepared_dir, "train").to_list()[: len(expected)] == expected
    assert "sources" not in load_report(alone.data.prepared_dir)["train"]


def test_weights_epochs_and_the_order_of_names_prepare_nothing_anew_but_files_do(mixed, tmp_path):
    prepare(mixed)
    ensure_prepared(with_mixture(mixed, a={"weight": 0.9, "epochs": 2}, b={"weight": 0.1}))
    ensure_prepared(remade(mixed, mixture=dict(reversed(mixed.data.mixture.items()))))
    b1, b2 = mixed.data.mixture["b"].files
    for other in (
        with_mixture(mixed, b={"files": [b1]}),
        with_mixture(mixed, a={"files": [mixed.data.mixture["a"].files, b2]}, b={"files": [b1]}),
        remade(mixed, mixture=None, train_files=[mixed.data.mixture["a"].files, b1, b2]),
    ):
        with pytest.raises(ValueError, match="was prepared from something else"):
            ensure_prepared(other)
    Path(b1).unlink()  # what was prepared of it is what counts
    ensure_prepared(mixed)
    Path(b2).unlink()
    ensure_prepared(mixed)
    Path(mixed.data.mixture["a"].files).write_text('{"text": "something else"}\n')
    with pytest.raises(ValueError, match=r"mixture\.a\.files\.0"):
        ensure_prepared(mixed)


def test_one_file_in_two_sources_is_refused_and_a_source_without_a_document_too(mixed, tmp_path):
    b1, b2 = mixed.data.mixture["b"].files
    both = with_mixture(mixed, a={"files": b2})
    with pytest.raises(
        ValueError,
        match=r"data\.mixture\.b\.files: .*b2\.jsonl is among data\.mixture\.a\.files too, so it would be read as both",
    ):
        prepare(both)
    prepare(remade(both, allow_overlap=True))
    (tmp_path / "space.txt").write_text(" ")
    blank = with_mixture(mixed, a={"files": str(tmp_path / "space.txt")})
    with pytest.raises(ValueError, match=r"data\.mixture\.a\.files: no document in"):
        prepare(remade(blank, max_bad_fraction=1.0))
    held_out = remade(mixed, eval_files=b1)
    with pytest.raises(ValueError, match=r"data\.eval_files: .*b1\.jsonl is among data\.mixture\.b\.files too"):
        prepare(held_out)


def test_max_sequences_is_of_each_source_and_noise_is_planted_in_all(mixed):
    """Catches a limit that the first source uses up."""
    limited = remade(mixed, max_sequences=6, planted_noise=0.25)
    prepare(limited)
    report = load_report(limited.data.prepared_dir)["train"]
    assert [source["sequences"] for source in report["sources"].values()] == [6, 6]
    assert sum(report["planted"].values()) == 3


def test_samples_follow_the_weights_and_the_documents_stay_what_they_are(mixed):
    """Catches sources that samples do not know, and a left-out document that changes the order."""
    prepare(mixed)
    weighted = with_mixture(mixed, a={"weight": 1}, b={"weight": 4})
    sources = load_report(mixed.data.prepared_dir)["train"]["sources"]
    where = (mixed.data.prepared_dir, 3, "sequence")
    samples = training_samples(*where, weighted.data.mixture)
    units = samples.units(0, 50)
    of_b = [unit.sample_id >= sources["b"]["first_row"] for unit in units]
    assert [sum(of_b[n : n + 5]) for n in range(0, 50, 5)] == [4] * 10
    natural = training_samples(*where, mixed.data.mixture).units(0, sum(s["sequences"] for s in sources.values()))
    assert sorted(unit.sample_id for unit in natural) == list(range(len(natural)))
    left = units[0].document_ids[0]
    without = training_samples(*where, weighted.data.mixture, [left]).units(0, 50)
    assert [unit.sample_id for unit in without] == [unit.sample_id for unit in units]
    assert without[0].left_out


@given(st.lists(st.tuples(st.integers(1, 9), st.lists(st.floats(0.05, 1), min_size=3, max_size=3)), max_size=8))
@settings(deadline=None, max_examples=40)
def test_an_order_whose_weights_move_is_what_a_slow_loop_gives_and_can_be_read_from_its_pieces(moves):
    """Catches a deficit that is lost at a move (a source of a small share would never be read), and a reader of the
    past that takes today's weights."""
    sources = made((5, 0.7, None), (7, 0.2, None), (3, 0.1, None))
    order = MixtureOrder(sources, 1)
    shares = shares_of([0.7, 0.2, 0.1])
    pieces, live, slow, owed, read, position = [order.piece], [], [], [0, 0, 0], [0, 0, 0], 0
    for size, weights in [(4, [1.0] * 3), *moves]:
        for place in range(position, position + size):
            live.append((order.row(place), order.epoch(place)))
            owed = [owes + share for owes, share in zip(owed, shares, strict=True)]
            s = owed.index(max(owed))
            owed[s] -= PARTS
            epoch = read[s] // sources[s].rows
            slow.append((sources[s].first_row + Order(sources[s].rows, 1).row(read[s]), epoch))
            read[s] += 1
        position += size
        order.move(position, weights)
        shares = shares_of(weights)
        assert (order.piece.read, order.piece.deficits, order.piece.shares) == (read, owed, shares)
        pieces.append(order.piece)
    assert live == slow
    later = MixtureOrder(sources, 1, pieces)
    assert [(later.row(place), later.epoch(place)) for place in reversed(range(position))] == live[::-1]
    resumed = MixtureOrder(sources, 1)
    resumed.go_on(pieces[-1])
    assert [resumed.row(position + n) for n in range(20)] == [order.row(position + n) for n in range(20)]
