"""Runs on several sources with weights."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.config.schema import Config
from pipeline.config.schema_data import SourceConfig
from pipeline.data.prepared import load_report
from pipeline.data.samples import training_samples
from pipeline.evidence.explain import explain_step
from pipeline.evidence.ledger_check import check_ledger
from pipeline.export_corpus import main as export_corpus
from pipeline.record import ledger
from pipeline.record.starts import starts_of
from pipeline.train import train
from tests.runs import ADAM, config_of, deepspeed_json, largest_difference, refusal_of, run, weights

RATE = {"policy__rule": "rate", "policy__rate": 0.25}


@pytest.fixture(scope="module")
def config_for(corpus, tiny_model, tmp_path_factory):
    """A config of a run on two files of the corpus, of 1 and 3 times the size, with its directory and sources."""
    directory = tmp_path_factory.mktemp("mixture")
    lines = (corpus / "documents.jsonl").read_text().splitlines(keepends=True)
    (directory / "few.jsonl").write_text("".join(lines[::8]))
    (directory / "many.jsonl").write_text("".join(line for number, line in enumerate(lines) if number % 8))

    def make(name: str, few: dict[str, Any], many: dict[str, Any], micro: int = 2, **overrides: Any) -> Config:
        mixture = {"few": {"files": str(directory / "few.jsonl")} | few}
        mixture |= {"many": {"files": str(directory / "many.jsonl")} | many}
        options = {
            "data__train_files": "null",
            "data__mixture": json.dumps(mixture),
            "data__prepared_dir": directory / "prepared",
            "checkpoint__every_steps": 3,
            "checkpoint__keep": 9,
        }
        deepspeed = deepspeed_json(directory / f"{micro}.json", 2, micro, optimizer=ADAM)
        return config_of(corpus, directory / name, tiny_model("llama"), deepspeed, **options | overrides)

    return make


def rows_of(config: Config):
    return ledger.read(Path(config.run_dir)).to_pandas()


def shown(config: Config, tag: str) -> dict[int, float]:
    events = EventAccumulator(str(Path(config.run_dir) / "tensorboard")).Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


def of_few(config: Config, sample_ids: list[int]) -> list[bool]:
    few = load_report(config.data.prepared_dir)["train"]["sources"]["few"]
    return [few["first_row"] <= sample < few["first_row"] + few["sequences"] for sample in sample_ids]


@pytest.fixture(scope="module")
def done(ranks, config_for) -> Config:
    """Nine steps of four sequences: a third of them of `few`, until its epoch fraction of them is over."""
    config = config_for("done", {"weight": 1, "epochs": 0.02}, {"weight": 2}, max_steps=9, **RATE)
    ranks(run, config)
    return config


def test_a_source_has_its_share_until_it_ends_and_then_the_other_has_all(done):
    """Catches weights that nothing reads, a source that goes on past its epochs, and an end that is not told."""
    rows = rows_of(done)
    few, mine = load_report(done.data.prepared_dir)["train"]["sources"]["few"], of_few(done, rows["sample_id"])
    most = few["sequences"] // 50
    assert 2 <= most <= 10
    end = next(n for n in range(36) if sum(mine[:n]) == most)
    assert all(abs(sum(mine[:n]) - n / 3) <= 1 for n in range(end))
    assert not any(mine[end:])
    said = starts_of(Path(done.run_dir))[0].mixture
    assert f"data.mixture: few ends after {end} sequences, and all that follow are many 100.00%" in said
    assert any(each.startswith(f"data.mixture: few is {most / 36:.2%} of what is read up to step 9") for each in said)
    kept = rows[rows["kept"]]
    share = kept["tokens"][of_few(done, kept["sample_id"])].sum() / kept["tokens"].sum()
    assert shown(done, "trained_share_by_source/few")[9] == pytest.approx(share)


def test_every_reader_of_the_order_puts_the_same_samples_there(done, tmp_path, capsys):
    """Catches a verifier, an explanation or an export that knows the order of one source only."""
    summary, violations = check_ledger(Path(done.run_dir))
    assert violations == []
    assert "order recomputed" in summary
    assert len(explain_step(Path(done.run_dir), 2, "loss", 4).rows) == 4
    export_corpus([done.run_dir, str(tmp_path / "all.jsonl"), "--best", "1"])
    read = {number for documents in rows_of(done)["document_ids"] for number in documents}
    written = [json.loads(line)["influence"] for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert {record["document_id"] for record in written} == read

    copy = tmp_path / "copy"
    shutil.copytree(done.run_dir, copy)
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("weight: 2", "weight: 3"))
    assert any("holds sample" in each for each in check_ledger(copy)[1])
    (copy / "config.yaml").write_text(text.replace(str(done.data.prepared_dir), str(tmp_path / "gone")))
    assert check_ledger(copy)[1] == []


def test_one_rank_reads_scores_and_trains_on_what_two_do(one_rank, config_for, done):
    """Catches an order that depends on how many read it."""
    alone = config_for("alone", {"weight": 1, "epochs": 0.02}, {"weight": 2}, 4, max_steps=9, **RATE)
    one_rank(run, alone)
    left, right = rows_of(done), rows_of(alone)
    for column in ("position", "sample_id", "epoch", "subset", "kept"):
        assert left[column].tolist() == right[column].tolist(), column
    assert largest_difference(weights(Path(done.run_dir) / "model"), weights(Path(alone.run_dir) / "model")) < 1e-3


def until(config: Config, step: int) -> None:
    """On a rank: a run that ends at `step`, its last checkpoint included."""
    train(config, step)


def test_a_run_stopped_twice_ends_as_the_one_that_was_not(ranks, config_for, done):
    """Catches an order, or shares in TensorBoard, that begin anew at a resume; the end of `few` lies between."""
    sources = ({"weight": 1, "epochs": 0.02}, {"weight": 2})
    broken = config_for("broken", *sources, max_steps=9, **RATE)
    ranks(until, broken, 2)
    resumed = config_for("broken", *sources, max_steps=9, resume="auto", **RATE)
    ranks(until, resumed, 5)
    ranks(run, resumed)
    assert rows_of(broken).drop(columns="document_ids").equals(rows_of(done).drop(columns="document_ids"))
    assert largest_difference(weights(Path(done.run_dir) / "model"), weights(Path(broken.run_dir) / "model")) == 0
    tag = "trained_share_by_source/few"
    assert shown(broken, tag) == shown(done, tag)
    assert [start.step for start in starts_of(Path(broken.run_dir))] == [0, 2, 5]
    assert check_ledger(Path(broken.run_dir))[1] == []


def refused(config: Config) -> str:
    return refusal_of(train, config)


def test_other_weights_are_refused_at_a_resume_and_equal_ones_are_not(ranks, config_for, done):
    """Catches a run whose order changes in its middle, and weights compared before they are normalised."""
    options = {"max_steps": 9, "resume": "auto"} | RATE
    [told, _] = ranks(refused, config_for("done", {"weight": 1, "epochs": 0.02}, {"weight": 3}, **options))
    assert "belongs to another run" in told
    assert "mixture.many.share" in told
    [told, _] = ranks(refused, config_for("done", {"weight": 1, "epochs": 0.2}, {"weight": 2}, **options))
    assert "mixture.few.epochs: 0.02 -> 0.2" in told
    ranks(run, config_for("done", {"weight": 10, "epochs": 0.02}, {"weight": 20}, **options))


def test_steps_beyond_all_epochs_are_refused_before_the_first_and_both_remedies_work(ranks, config_for, done):
    sources = load_report(done.data.prepared_dir)["train"]["sources"]
    most = sum(int(0.005 * source["sequences"]) for source in sources.values())
    short = {"weight": 1, "epochs": 0.005}, {"weight": 1, "epochs": 0.005}
    [told, _] = ranks(refused, config_for("short", *short, max_steps=most // 4 + 1))
    assert f"end after {most} sequences, which is data for {most // 4} steps of 4, and max_steps is" in told
    ranks(run, config_for("short", *short, max_steps=most // 4))
    longer = {"weight": 1, "epochs": 0.005}, {"weight": 1, "epochs": 0.01}
    ranks(run, config_for("longer", *longer, max_steps=most // 4 + 1))


def test_a_pool_reads_its_candidates_in_the_order_of_the_mixture(ranks, config_for, tmp_path):
    """Catches a plan that counts what is trained on for what is read, and a verifier that wants one epoch for all."""
    mixture = {"weight": 1}, {"weight": 3}
    small = {"data__max_sequences": 5, "data__prepared_dir": tmp_path / "prepared"}
    pool = config_for("pool", *mixture, max_steps=3, policy__rule="top", policy__pool=2, **small)
    ranks(run, pool)
    assert check_ledger(Path(pool.run_dir))[1] == []
    of_sources = {"few": SourceConfig("", 1), "many": SourceConfig("", 3)}
    samples = training_samples(pool.data.prepared_dir, pool.seed, "sequence", of_sources)
    assert rows_of(pool)["sample_id"].tolist() == [unit.sample_id for unit in samples.units(0, 24)]
    assert rows_of(pool)["epoch"].max() == 3
    assert (
        starts_of(Path(pool.run_dir))[0]
        .mixture[0]
        .endswith("few is 25.00% of what is read up to step 3, 1.20 of its epochs")
    )
    shutil.rmtree(tmp_path / "prepared")  # without it the epochs are looked at
    assert check_ledger(Path(pool.run_dir))[1] == []


# Weights that move

MOVING = {"policy__rule": "mixture", "policy__mixture_rate": 0.3, "max_steps": 8}
FEW, MANY = {"weight": 1}, {"weight": 2}


def lines_of(config: Config) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(config.run_dir) / "mixture.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def moved(ranks, config_for) -> Config:
    config = config_for("moved", FEW, MANY, **MOVING)
    ranks(run, config)
    return config


def by_loop(config: Config) -> list[dict[str, float]]:
    """The weights after every step, out of the ledger's scores."""
    rows, names, found = rows_of(config), ("few", "many"), []
    weight, average = {"few": 1 / 3, "many": 2 / 3}, dict[str, float]()
    rows["source"] = ["few" if mine else "many" for mine in of_few(config, rows["sample_id"])]
    for _, step in rows.groupby("step"):
        for name, own in step.groupby("source"):
            mean = (own["score"] * own["tokens"]).sum() / own["tokens"].sum()
            average[name] = 0.9 * average.get(name, mean) + 0.1 * mean
        if len(average) == 2 and average["few"] != average["many"]:
            sign = 1 if average["few"] > average["many"] else -1  # two averages lie one spread from their mean
            raw = {"few": weight["few"] * math.exp(0.3 * sign), "many": weight["many"] * math.exp(-0.3 * sign)}
            floor = {"few": 0.1 / 3, "many": 0.2 / 3}
            above = {name: max(raw[name] / sum(raw.values()) - floor[name], 0) for name in names}
            weight = {name: floor[name] + 0.9 * above[name] / sum(above.values()) for name in names}
        found.append(dict(weight))
    return found


def test_weights_follow_the_ledgers_scores_and_the_order_the_weights(moved):
    """Catches weights that move by other scores than those recorded, an order that does not follow, and a unit that is
    dropped."""
    expected, lines, rows = by_loop(moved), lines_of(moved), rows_of(moved)
    assert [line["step"] for line in lines] == list(range(9))
    found = [{name: source["weight"] for name, source in line["sources"].items()} for line in lines]
    assert found[0] == pytest.approx({"few": 1 / 3, "many": 2 / 3})
    for weight, right in zip(found[1:], expected, strict=True):
        assert weight == pytest.approx(right, rel=1e-4)
    assert len({weight["few"] for weight in found}) > 4
    assert rows["kept"].all()
    target = sum(4 * weight["few"] for weight in found[:8])
    assert abs(sum(of_few(moved, rows["sample_id"])) - target) <= 1
    assert shown(moved, "mixture/few")[8] == pytest.approx(found[8]["few"])
    assert check_ledger(Path(moved.run_dir))[1] == []


def test_a_verifier_that_forgets_the_moves_would_find_the_order_wrong(moved, tmp_path):
    """Catches moves that change nothing of what is read."""
    shutil.copytree(moved.run_dir, tmp_path / "copy")
    (tmp_path / "copy" / "mixture.jsonl").unlink()
    assert any("holds sample" in each for each in check_ledger(tmp_path / "copy")[1])


def test_the_weights_move_alike_on_one_rank(one_rank, config_for, moved):
    """Catches a rank that moves by its own units."""
    alone = config_for("moved alone", FEW, MANY, 4, **MOVING)
    one_rank(run, alone)
    assert rows_of(alone)["sample_id"].tolist() == rows_of(moved)["sample_id"].tolist()
    for left, right in zip(lines_of(alone), lines_of(moved), strict=True):
        assert left["piece"]["read"] == right["piece"]["read"]
        for name in ("few", "many"):
            assert left["sources"][name]["weight"] == pytest.approx(right["sources"][name]["weight"], rel=1e-4)


def test_a_moving_run_stopped_twice_ends_as_the_one_that_was_not(ranks, config_for, moved):
    """Catches weights, averages or deficits that begin anew at a resume; steps after a checkpoint are given up."""
    ranks(until, config_for("moved twice", FEW, MANY, **MOVING), 3)
    resumed = config_for("moved twice", FEW, MANY, **MOVING, resume="auto")
    ranks(until, resumed, 6)
    back = Path(resumed.run_dir, "checkpoints", "step-3")
    ranks(run, config_for("moved twice", FEW, MANY, **MOVING, resume=back))
    assert lines_of(resumed) == lines_of(moved)
    assert rows_of(resumed).drop(columns="document_ids").equals(rows_of(moved).drop(columns="document_ids"))
    assert check_ledger(Path(resumed.run_dir))[1] == []
    [told, _] = ranks(refused, config_for("moved twice", FEW, MANY, max_steps=9, resume="auto"))
    assert "mixture_moves: True -> 'absent'" in told


@pytest.mark.parametrize(
    "estimator",
    [{"influence__estimator": "ghost"}, {"influence__estimator": "loss"},
     {"influence__estimator": "lookahead", "influence__passes": "score_first"},
     {"influence__reference": "validation"}],
    ids=["ghost", "loss", "lookahead", "lai validation"],
)  # fmt: skip
def test_any_scores_move_weights(ranks, config_for, corpus, estimator):
    """Catches a rule that is for some estimators only."""
    if estimator.get("influence__estimator") == "lookahead":
        estimator = estimator | {"influence__reference": "validation"}
    if "influence__reference" in estimator:
        estimator = estimator | {"data__reference_files": corpus / "documents.jsonl"}
        estimator |= {"data__prepared_dir": corpus / "mixture with a reference"}
    config = config_for(
        "-".join(map(str, estimator.values())).replace("/", ""), FEW, MANY, **MOVING | {"max_steps": 3}, **estimator
    )
    ranks(run, config)
    assert len({line["sources"]["few"]["weight"] for line in lines_of(config)}) > 1
    assert check_ledger(Path(config.run_dir))[1] == []
