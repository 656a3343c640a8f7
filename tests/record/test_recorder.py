"""TensorBoard files and the summary, read back as a person's browser would."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from pipeline.record import ledger, subset_rates
from pipeline.record.ledger import counts_by_subset
from pipeline.record.summary import print_summary
from pipeline.record.tensorboard import SHOWN_SUBSETS, TensorBoard
from tests.runs import ADAM, config_of, deepspeed_json, run


@pytest.fixture(scope="module")
def finished(ranks, corpus, tiny_model, tmp_path_factory):
    """A run of six steps that was resumed after the fourth, with evaluation and removals."""
    directory = tmp_path_factory.mktemp("observed")
    scheduler = {"type": "WarmupLR", "params": {"warmup_num_steps": 4, "warmup_max_lr": 1e-3, "warmup_type": "linear"}}
    deepspeed = deepspeed_json(directory / "ds.json", 2, accumulation=2, optimizer=ADAM, scheduler=scheduler)
    options = {
        "max_steps": 6,
        "data__eval_files": corpus / "documents.jsonl",
        "data__max_eval_sequences": 9,
        "data__prepared_dir": corpus / "prepared_with_eval",
        "influence__include_self": False,
        "policy__rule": "rate",
        "policy__rate": 0.3,
        "checkpoint__every_steps": 4,
        "observe__every_steps": 2,
        "observe__eval_every_steps": 3,
    }
    run_dir = directory / "run"
    ranks(run, config_of(corpus, run_dir, tiny_model("llama"), deepspeed, **options))
    resume = run_dir / "checkpoints" / "step-4"
    ranks(run, config_of(corpus, run_dir, tiny_model("llama"), deepspeed, resume=resume, **options))
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0, "tensors": 0})
    return run_dir, events.Reload(), ledger.read(run_dir).to_pandas()


def scalars(events, tag):
    return {event.step: event.value for event in events.Scalars(tag)}


def test_every_contract_tag_is_there_and_every_step_once(finished):
    """Catches events of the future that a resumed run leaves behind."""
    _, events, rows = finished
    tags = set(events.Tags()["scalars"])
    expected = {f"train/{name}" for name in ("loss", "lr", "grad_norm", "tokens_per_second", "memory_gb")}
    expected |= {f"influence/{name}" for name in ("removed_total", "removed_fraction")} | {"kept/total"}
    expected |= {f"influence/removed_by_subset/{subset}" for subset in rows["subset"].unique()}
    assert expected <= tags
    for tag in expected - {f"influence/removed_by_subset/{subset}" for subset in rows["subset"].unique()}:
        assert [event.step for event in events.Scalars(tag)] == [1, 2, 3, 4, 5, 6], tag


def test_counts_are_the_ledgers(finished):
    """Catches totals that start again at a resume."""
    _, events, rows = finished
    assert (~rows["kept"]).any()
    assert len(rows) == 6 * 2 * 4
    for step in range(1, 7):
        so_far, now = rows[rows["step"] <= step], rows[rows["step"] == step]
        assert scalars(events, "influence/removed_total")[step] == (~so_far["kept"]).sum()
        assert scalars(events, "kept/total")[step] == so_far["kept"].sum()
        assert scalars(events, "influence/removed_fraction")[step] == pytest.approx((~now["kept"]).mean())
        for subset, part in so_far.groupby("subset"):
            tag = f"influence/removed_by_subset/{subset}"
            assert scalars(events, tag)[step] == (~part["kept"]).sum()
            fraction = scalars(events, f"removed_fraction_by_subset/{subset}")[step]
            assert fraction == pytest.approx((~part["kept"]).mean())


def test_loss_is_the_mean_over_micro_batches_of_the_mean_over_kept_tokens(finished):
    _, events, rows = finished
    for step, part in rows.groupby("step"):
        means = []
        for _, micro in part[part["kept"]].groupby("micro_step"):
            means.append((micro["loss"] * micro["tokens"]).sum() / micro["tokens"].sum())
        assert scalars(events, "train/loss")[step] == pytest.approx(sum(means) / 2, rel=1e-5)


def test_learning_rate_is_the_one_that_the_step_was_taken_with(finished):
    """Catches the rate of the step to come, which DeepSpeed shows after its step."""
    rates = scalars(finished[1], "train/lr")
    assert list(rates.values()) == pytest.approx([0, 0, 2.5e-4, 5e-4, 7.5e-4, 1e-3], abs=1e-9)


def test_gradient_norm_throughput_and_memory_are_real_numbers(finished):
    for tag in ("grad_norm", "tokens_per_second", "memory_gb"):
        assert all(0 < value < 1e9 for value in scalars(finished[1], f"train/{tag}").values())


def test_histogram_holds_the_scores_of_the_step(finished):
    _, events, rows = finished
    histograms = {event.step: event.histogram_value for event in events.Histograms("influence/score")}
    assert list(histograms) == [2, 4, 6]
    for step, histogram in histograms.items():
        scores = rows[rows["step"] == step]["score"]
        assert histogram.num == len(scores)
        assert histogram.sum == pytest.approx(scores.sum(), rel=1e-4)


def test_removed_texts_show_score_document_and_text(finished):
    _, events, rows = finished
    texts = {
        event.step: event.tensor_proto.string_val[0].decode()
        for event in events.Tensors("influence/removed_text/text_summary")
    }
    assert texts
    assert set(texts) <= {2, 4, 6}
    for step, text in texts.items():
        worst = rows[(rows["step"] == step) & ~rows["kept"]].sort_values("score").iloc[0]
        assert text.startswith(f"**score {worst['score']:.4g}**")
        assert f"documents {', '.join(map(str, worst['document_ids']))}" in text
        assert f"subset `{worst['subset']}`" in text
        assert "\n    " in text


def test_activation_norms_of_every_layer_and_hyperparameters(finished):
    _, events, _ = finished
    norms = [tag for tag in events.Tags()["scalars"] if tag.startswith("layers/activation_norm/")]
    assert len(norms) == 2 * 7 + 1
    assert all(value > 0 for tag in norms for value in scalars(events, tag).values())
    assert "hyperparameters/text_summary" in events.Tags()["tensors"]


def test_evaluations_come_before_every_few_steps_and_after(finished):
    _, events, _ = finished
    losses = scalars(events, "validation/loss/all")
    assert list(losses) == [0, 3, 6]
    assert losses[6] < losses[0]
    subsets = [tag for tag in events.Tags()["scalars"] if tag.startswith("validation/bits_per_byte/")]
    assert len(subsets) > 1
    assert all(set(scalars(events, tag)) == {0, 3, 6} for tag in subsets)


def test_summary_says_what_the_ledger_says(finished):
    run_dir, events, _ = finished
    summary = json.loads(Path(run_dir, "summary.json").read_text())
    assert {k: tuple(v) for k, v in summary["units_by_subset"].items()} == counts_by_subset(ledger.read(run_dir))
    assert summary["evaluation_after"]["all"]["loss"] == pytest.approx(scalars(events, "validation/loss/all")[6])
    assert summary["standing_out"] == subset_rates.standing_out(summary["units_by_subset"])
    assert summary["sequences"] == 48
    assert 0 < summary["scoring_fraction"] < 1


def test_summary_holds_every_evaluation(finished):
    """Catches a summary of the part after the resume alone."""
    run_dir, events, _ = finished
    summary = json.loads(Path(run_dir, "summary.json").read_text())
    losses = {int(step): figures["all"]["loss"] for step, figures in summary["evaluations"].items()}
    assert losses == pytest.approx(scalars(events, "validation/loss/all"))
    assert summary["evaluations"]["0"] == summary["evaluation_before"]
    assert summary["evaluations"]["6"] == summary["evaluation_after"]


def step_rows(step, removed):
    """20 units of each of two subsets, `removed` of those of `bad` and one of the others removed."""
    kept = [index >= removed for index in range(20)] + [index > 0 for index in range(20)]
    everywhere = {"micro_step": 0, "rank": 0, "epoch": 0, "tokens": 5, "loss": 1.0, "score": 0.5, "reason": ""}
    own = {"position": list(range(40)), "sample_id": list(range(40)), "document_ids": [[0]] * 40}
    subsets = ["bad"] * 20 + ["usual"] * 20
    weights = [float(value) for value in kept]
    return ledger.table({"step": step, **everywhere, **own, "subset": subsets, "kept": kept, "weight": weights})


def standing_out(run_dir):
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"tensors": 0}).Reload()
    tag = "influence/standing_out/text_summary"
    if tag not in events.Tags()["tensors"]:
        return {}
    return {event.step: event.tensor_proto.string_val[0].decode() for event in events.Tensors(tag)}


def test_a_subset_that_stands_out_is_warned_of_once_and_at_the_end(tmp_path):
    """Catches a warning at every look, and one about a subset of too few units to say anything."""
    board = TensorBoard(tmp_path, 0, ledger.SCHEMA.empty_table())
    for step in range(1, 7):
        board.influence(step_rows(step, removed=12), step, histogram=True)
    board.close()
    texts = standing_out(tmp_path)
    assert list(texts) == [2, 6]
    assert texts[2].startswith("- bad: 60.0 % of 40 units removed")
    assert "more than the 5.0 % of all others" in texts[2]
    assert "bad: 60.0 % of 120 units" in texts[6]


def test_a_resumed_run_does_not_warn_again_before_the_end(tmp_path):
    before = [step_rows(step, removed=12) for step in range(1, 4)]
    board = TensorBoard(tmp_path, 3, pa.concat_tables(before))
    board.influence(step_rows(4, removed=12), 4, histogram=True)
    board.influence(step_rows(5, removed=12), 5, histogram=True)
    board.close()
    assert list(standing_out(tmp_path)) == [5]


def test_nothing_is_said_where_nothing_stands_out(tmp_path):
    board = TensorBoard(tmp_path, 0, ledger.SCHEMA.empty_table())
    for step in range(1, 7):
        board.influence(step_rows(step, removed=1), step, histogram=True)
    board.close()
    assert standing_out(tmp_path) == {}


def test_the_table_at_the_end_names_what_stands_out(finished, capsys):
    summary = json.loads(Path(finished[0], "summary.json").read_text())
    units = {"bad": (100, 60), "usual": (100, 5)}
    print_summary(summary | {"units_by_subset": units, "standing_out": subset_rates.standing_out(units)})
    out = capsys.readouterr().out
    assert "stands out: bad: 60.0 % of 100 units removed (95 % interval 50.2 to 69.1)" in out


def test_private_corpora_leave_no_text_in_tensorboard(ranks, corpus, tiny_model, tmp_path):
    config = config_of(
        corpus,
        tmp_path / "run",
        tiny_model("llama"),
        deepspeed_json(tmp_path / "ds.json"),
        max_steps=2,
        policy__rule="rate",
        policy__rate=0.5,
        observe__log_texts="false",
        observe__every_steps=1,
    )
    ranks(run, config)
    assert False in ledger.read(tmp_path / "run")["kept"].to_pylist()
    tags = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload().Tags()
    assert sorted(tags["tensors"]) == ["custom_scalars__config__", "hyperparameters/text_summary"]


def test_hundreds_of_subsets_have_a_bounded_number_of_curves_that_add_up(tmp_path):
    """Catches a curve for every subset, and a rest that nobody counts."""
    names = [f"s{number:03}" for number in range(300)] + ["other"]
    [row] = step_rows(1, 0).slice(0, 1).to_pylist()
    rows = [row | {"subset": name, "kept": number % 2 == 0} for number, name in enumerate(names)]
    board = TensorBoard(tmp_path, 0, ledger.SCHEMA.empty_table(), names[::-1])
    for step in (1, 2):
        board.influence(pa.Table.from_pylist(rows, ledger.SCHEMA), step, histogram=False)
    board.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"), {"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("influence/removed_by_subset/")]
    assert len(tags) == SHOWN_SUBSETS + 1
    assert "influence/removed_by_subset/s299" in tags
    assert "influence/removed_by_subset/s000" not in tags
    assert sum(events.Scalars(tag)[-1].value for tag in tags) == 2 * 150
    assert sum(events.Scalars(tag.replace("influence/removed_", "kept/"))[-1].value for tag in tags) == 2 * 151


def test_every_chart_of_the_layout_has_a_tag_and_no_tag_is_a_regular_expression_of_another_meaning(finished, tmp_path):
    """TensorBoard's page takes tags for regular expressions, and draws nothing in a chart where one does not match
    itself. Catches a subset called `Wikipedia (en)`, and a chart of what is never written."""
    [row] = step_rows(1, 0).slice(0, 1).to_pylist()
    names = ["Wikipedia (en)", "C++ [x]", "a|b*", "Github"]
    board = TensorBoard(tmp_path, 0, ledger.SCHEMA.empty_table())
    rows = [row | {"subset": name} for name in names]
    board.influence(pa.Table.from_pylist(rows, ledger.SCHEMA), 1, histogram=False)
    board.scalars({"train/loss": 1.0, "validation/bits_per_byte/all": 1.0}, 1)
    board.close()
    made_up = EventAccumulator(str(tmp_path / "tensorboard"), {"scalars": 0, "tensors": 0}).Reload()
    for events in (made_up, finished[1]):
        tags = events.Tags()["scalars"]
        assert all(re.fullmatch(tag, tag) for tag in tags)
        content = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
        charts = [chart for category in Layout.FromString(content).category for chart in category.chart]
        assert len(charts) == 6
        for chart in charts:
            assert any(re.search(pattern, tag) for pattern in chart.multiline.tag for tag in tags), chart.title
    by_subset = [tag for tag in made_up.Tags()["scalars"] if tag.startswith("influence/removed_by_subset/")]
    assert len(by_subset) == len(names), "subsets that share a curve"


def test_held_out_subsets_beyond_those_with_curves_are_one_curve(tmp_path):
    """Catches a rest that is thrown away, a mean over subsets instead of tokens (or bytes), and two curves in one."""
    random = np.random.default_rng(0)
    figures, nats, size = {}, {}, {}
    for name in [f"s{number:02}" for number in range(60)] + ["other", "all"]:
        tokens, loss, bytes_per_token = int(random.integers(1, 1000)), random.random(), 1 + random.random()
        nats[name], size[name] = loss * tokens, bytes_per_token * tokens
        figures[name] = {"loss": loss, "tokens": tokens, "bits_per_byte": loss / math.log(2) / bytes_per_token}
    board = TensorBoard(tmp_path, 0, ledger.SCHEMA.empty_table(), ["s59", "s00", "all", "only in training"])
    board.evaluation({"all": {"loss": 9.0, "bits_per_byte": 8.0}, "subsets": figures}, 5)
    board.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"), {"scalars": 0}).Reload()
    shown = {tag.removeprefix("validation/loss/") for tag in events.Tags()["scalars"] if "/loss/" in tag}
    own = shown - {"all", "other"}
    assert len(own) == SHOWN_SUBSETS
    assert {"s00", "s59"} <= own
    rest = figures.keys() - own
    assert min(figures[name]["tokens"] for name in own - {"s00", "s59"}) >= max(
        figures[name]["tokens"] for name in rest - {"other", "all"}
    )
    expected = {
        "loss/other": sum(nats[name] for name in rest) / sum(figures[name]["tokens"] for name in rest),
        "bits_per_byte/other": sum(nats[name] for name in rest) / math.log(2) / sum(size[name] for name in rest),
        "loss/all": 9.0,
    }
    for tag, value in expected.items():
        [event] = events.Scalars(f"validation/{tag}")
        assert event.value == pytest.approx(value, rel=1e-5)
