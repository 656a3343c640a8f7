"""Classification on the same engine: real ranks, real documents, their subsets as labels."""

import json
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from pipeline.config.schema import Config
from pipeline.data.prepared import load_answers, load_report, load_split
from pipeline.evaluate import main as evaluate
from pipeline.evidence.inspection import inspect_run
from pipeline.models.load import load_model
from pipeline.record import ledger
from pipeline.train import train
from tests.runs import ADAM, LEARNING_RATE, config_of, deepspeed_json, run

FIELD = "meta.pile_set_name"
STEPS = 3


def classification(corpus: Path, run_dir: Path, model: Path, deepspeed: Path, **overrides: Any) -> Config:
    """Texts of three modules, at most 48 tokens each, so that most are cut and some are padded."""
    options: dict[str, Any] = {
        "task__kind": "sequence_classification",
        "task__label_field": FIELD,
        "data__subset_field": "none",
        "data__prepared_dir": corpus / "labelled",
        "data__eval_files": corpus / "documents.jsonl",
        "data__reference_files": corpus / "documents.jsonl",
        "data__sequence_length": 48,
        "influence__reference": "validation",
        "influence__validation_sequences": 4,
        "policy__rule": "rate",
        "policy__rate": 0.4,
        "max_steps": STEPS,
        "checkpoint__every_steps": 2,
    }
    return config_of(corpus, run_dir, model, deepspeed, **(options | overrides))


def classifier_weights(directory: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32)
    return dict(model.named_parameters())


def largest(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).detach().abs().max()) for name in left)


CASES: list[tuple[str, int, dict[str, Any]]] = [
    ("bert", 0, {}),
    ("gpt_neo", 3, {"influence__reference": "batch", "influence__include_self": False}),
    ("llama", 2, {"influence__estimator": "ghost"}),
    ("gpt_neo", 0, {"influence__passes": "score_first"}),
    ("bert", 3, {"influence__passes": "score_first", "influence__estimator": "lookahead"}),
    ("llama", 0, {"influence__scope": "step", "influence__reference": "running", "influence__sketch": "none"}),
    ("bert", 2, {"policy__rule": "top", "policy__pool": 2}),
    ("bert", 1, {"influence__precondition": "adam_state", "influence__estimator": "ghost"}),
    ("gpt2", 0, {"influence__precondition": "adam_ema"}),
    ("gpt_neo", 2, {"influence__precondition": "adam_state", "policy__action": "reweight"}),
]


@pytest.mark.parametrize(("kind", "stage", "chosen"), CASES)
def test_two_ranks_decide_and_train_as_one(ranks, one_rank, corpus, tiny_model, tmp_path, kind, stage, chosen):
    """Catches ranks that pad apart and hand over texts whose end a GPT-style model no longer finds, a head that is made
    anew on every rank or stage, and a share of the loss that is not the mean over texts."""
    by_adam = "lookahead" in chosen.values() or "adam_state" in chosen.values()
    optimizer = {"optimizer": ADAM} if by_adam else {}
    for ranked, number in (("two", 2), ("one", 1)):
        zero = {"zero_optimization": {"stage": stage if number == 2 else 0}}
        deepspeed = deepspeed_json(tmp_path / f"{ranked}.json", micro=4 // number, accumulation=2, **optimizer, **zero)
        config = classification(corpus, tmp_path / ranked, tiny_model(kind), deepspeed, **chosen)
        (ranks if number == 2 else one_rank)(run, config)
    ours, expected = (ledger.read(tmp_path / name).to_pandas().sort_values("position") for name in ("two", "one"))
    assert not ours.kept.all()
    assert (ours.tokens == 1).all()
    assert ours.sample_id.tolist() == expected.sample_id.tolist()
    assert ours.kept.tolist() == expected.kept.tolist()
    for column in ("loss", "score"):
        left, right = (torch.tensor(table[column].tolist()) for table in (ours, expected))
        assert float((left - right).abs().max() / right.abs().max()) < 1e-4, column
    models = [classifier_weights(tmp_path / name / "model") for name in ("two", "one")]
    assert largest(*models) < 1e-4
    accuracies = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("two", "one")]
    assert accuracies[0]["evaluation_after"]["all"]["accuracy"] == accuracies[1]["evaluation_after"]["all"]["accuracy"]


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_update_after_dropping_is_that_of_pytorch_on_what_was_kept(ranks, corpus, tiny_model, tmp_path, kind):
    """Texts one by one, without padding, out of the prepared rows, with cross-entropy and SGD."""
    deepspeed = deepspeed_json(tmp_path / "ds.json", 2, micro=2, accumulation=2)
    config = classification(corpus, tmp_path / "run", tiny_model(kind), deepspeed)
    ranks(run, config)
    answers, rows = load_answers(config.data.prepared_dir), load_split(config.data.prepared_dir, "train")
    assert answers is not None
    model = load_model(config.model, config.seed, answers=answers)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    taken = ledger.read(tmp_path / "run")
    assert not all(taken["kept"].to_pylist())
    for step in range(1, STEPS + 1):
        for micro_step in range(2):
            part = taken.filter((pc.field("step") == step) & (pc.field("micro_step") == micro_step)).to_pylist()
            kept = [rows[row["sample_id"]] for row in part if row["kept"]]
            assert 0 < len(kept) < len(part) == 4
            for row in kept:
                ids = [token for token, owner in zip(row["input_ids"], row["document_ids"], strict=True) if owner >= 0]
                logits = model(input_ids=torch.tensor([ids])).logits
                label = torch.tensor([answers.classes.index(row["label"])])
                (F.cross_entropy(logits, label) / len(kept) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = classifier_weights(tmp_path / "run" / "model")
    assert largest(found, dict(model.named_parameters())) < 1e-5


def test_the_exported_model_answers_with_the_labels_as_accurately_as_reported(
    one_rank, corpus, tiny_model, tmp_path, capsys
):
    """Texts through transformers' own text-classification pipeline; pipeline.evaluate says the same, and so does a
    checkpoint that is gone on from."""
    deepspeed = deepspeed_json(tmp_path / "ds.json", 0, micro=8, optimizer=ADAM)
    config = classification(corpus, tmp_path / "run", tiny_model("bert"), deepspeed, max_steps=12)
    one_rank(run, config)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    model = tmp_path / "run" / "model"
    assert AutoModelForSequenceClassification.from_pretrained(model).config.label2id.keys() == {
        "os",
        "argparse",
        "statistics",
    }
    answer = pipeline("text-classification", model=str(model), tokenizer=AutoTokenizer.from_pretrained(model))
    documents = [json.loads(line) for line in (corpus / "documents.jsonl").read_text().splitlines()]
    found = answer([document["text"] for document in documents], truncation=True, max_length=48)
    right = [one["label"] == text["meta"]["pile_set_name"] for one, text in zip(found, documents, strict=True)]
    after = summary["evaluation_after"]
    assert after["all"]["accuracy"] == pytest.approx(sum(right) / len(right))
    assert after["all"]["tokens"] == len(documents)
    assert 0.2 < after["all"]["accuracy"] < 1
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert board.Scalars("validation/accuracy/all")[-1].value == pytest.approx(after["all"]["accuracy"])
    assert "validation/accuracy/statistics" in board.Tags()["scalars"]
    layout = next(tag for tag in board.Tags()["tensors"] if "custom_scalars" in tag)
    assert b"held-out accuracy" in board.Tensors(layout)[0].tensor_proto.SerializeToString()
    assert "text-classification" in (model / "README.md").read_text()
    assert "accuracy before" in (model / "README.md").read_text()


def test_killed_and_resumed_equals_unbroken(one_rank, corpus, tiny_model, tmp_path):
    deepspeed = deepspeed_json(tmp_path / "ds.json", 0, micro=4, optimizer=ADAM)
    whole, broken = (
        classification(corpus, tmp_path / name, tiny_model("gpt_neo"), deepspeed, max_steps=4, resume="auto")
        for name in ("whole", "broken")
    )
    one_rank(run, whole)
    one_rank(train, broken, 2)
    assert len(ledger.read(tmp_path / "broken")) == 8
    one_rank(run, broken)
    assert ledger.read(tmp_path / "broken").equals(ledger.read(tmp_path / "whole"))
    assert largest(*(classifier_weights(tmp_path / name / "model") for name in ("whole", "broken"))) == 0


def test_flipped_labels_are_on_record_and_removed_by_the_oracle(one_rank, corpus, tiny_model, tmp_path):
    deepspeed = deepspeed_json(tmp_path / "ds.json", 0, micro=8)
    config = classification(
        corpus,
        tmp_path / "run",
        tiny_model("bert"),
        deepspeed,
        data__prepared_dir=tmp_path / "noisy",
        task__label_noise=0.4,
        influence__estimator="oracle",
        influence__oracle_subsets="[!p]*",
        influence__reference="batch",
        policy__rule="threshold",
        policy__threshold=0.5,
        policy__max_drop_fraction=1.0,
        max_steps=9,
    )
    one_rank(run, config)
    rows = ledger.read(tmp_path / "run").to_pandas()
    places = pq.read_table(tmp_path / "noisy" / "documents" / "train.parquet").to_pandas().set_index("document_id")
    flipped = [bool(places.loc[ids[0], "label"] != places.loc[ids[0], "true_label"]) for ids in rows.document_ids]
    assert 0.2 < sum(flipped) / len(flipped) < 0.6
    assert (~rows.kept).tolist() == flipped
    assert (rows.subset == "planted/label").tolist() == flipped
    content = inspect_run(tmp_path / "run", rows=3)
    for row in content["harmful"]:
        place = places.loc[row["document_ids"][0]]
        assert row["source"].endswith(f"labelled {place.label} in place of {place.true_label}")
    assert all(row["source"].endswith(f"labelled {row['subset']}") for row in content["helpful"])
    report = load_report(tmp_path / "noisy")
    assert report["train"]["planted"]["label"] == int((places.label != places.true_label).sum())
    assert "planted" not in report["eval"]


def test_evaluate_says_what_the_run_said(one_rank, corpus, tiny_model, tmp_path):
    deepspeed = deepspeed_json(tmp_path / "ds.json", 0, micro=8)
    config = classification(corpus, tmp_path / "run", tiny_model("gpt_neo"), deepspeed, max_steps=2)
    one_rank(run, config)
    one_rank(_evaluated, tmp_path / "run" / "config.yaml", tmp_path / "run" / "model", tmp_path / "figures.json")
    figures = json.loads((tmp_path / "figures.json").read_text())
    after = json.loads((tmp_path / "run" / "summary.json").read_text())["evaluation_after"]
    assert figures["all"] == pytest.approx(after["all"], rel=1e-5)


def _evaluated(config: Path, model: Path, where: Path) -> None:
    """On a rank: what pipeline.evaluate prints last, in a file."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as out:
        evaluate(["--config", str(config), "--model.name_or_path", str(model)])
    where.write_text(out.getvalue().splitlines()[-1])
