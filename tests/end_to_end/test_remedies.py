"""What messages tell a user to do, done."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.config.cli import to_yaml
from pipeline.data.prepared import ensure_prepared, load_split
from pipeline.data.samples import Samples
from pipeline.evidence.ledger_check import check_ledger
from pipeline.record import ledger
from pipeline.record.starts import starts_of
from tests.end_to_end.test_train import run_with_overflow
from tests.launcher import ROOT, environment
from tests.runs import config_of, deepspeed_json, largest_difference, run, weights


def plain_python(config, module: str = "pipeline.train", **variables: str) -> subprocess.CompletedProcess[str]:
    file = Path(f"{config.run_dir}.yaml")
    file.write_text(to_yaml(config))
    return subprocess.run(
        [sys.executable, "-m", module, "--config", str(file)],
        cwd=ROOT,
        env=environment() | variables,
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture
def broken(corpus, tiny_model, tmp_path) -> tuple[Path, list[int]]:
    """A model in which one token's embedding is NaN, and the training documents that have it in the first four steps.

    The token is in some of the sequences of each step, and not in all.
    """
    ensure_prepared(config_of(corpus, tmp_path / "x", tiny_model("llama"), deepspeed_json(tmp_path / "ds.json")))
    rows = load_split(corpus / "prepared", "train").with_format("torch")
    batch = Samples(rows, 3, "sequence").batch(0, 16, torch.device("cpu"))
    has_TV = torch.nn.functional.one_hot(batch.input_ids_BT, 300).amax(1).view(4, 4, 300).sum(1)
    token = next(t for t in range(1, 300) if all(1 <= int(count) <= 2 for count in has_TV[:, t]))
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = torch.nan
    model.save_pretrained(tmp_path / "broken")
    documents = rows["document_ids"][:][rows["input_ids"][:] == token]
    return tmp_path / "broken", sorted(set(documents.tolist()) - {-1})


@pytest.mark.parametrize(("stage", "unit"), [(0, "sequence"), (2, "document"), (3, "sequence")])
def test_documents_that_are_not_finite_can_be_left_out_and_the_run_goes_on(
    ranks, corpus, broken, tmp_path, stage, unit
):
    """Catches a document that has no label and is still read: NaN times 0 is NaN."""
    model, documents = broken
    deepspeed = deepspeed_json(tmp_path / "ds.json", stage)
    options = {
        "max_steps": 4,
        "policy__stop_after_non_finite": 2,
        "influence__unit": unit,
        "policy__max_drop_fraction": 1,
    }
    with pytest.raises(AssertionError, match="FloatingPointError: stopped after step 2") as told:
        ranks(run, config_of(corpus, tmp_path / "run", model, deepspeed, **options))
    checkpoint = re.search(
        r"or leave documents out \(data.leave_out, ids of the ledger\), and go on with --resume (\S+)", str(told.value)
    ).group(1)
    rows = ledger.read(tmp_path / "run").to_pandas()
    named = {document for ids in rows[rows["reason"] == "non_finite"]["document_ids"] for document in ids}
    assert named & set(documents)

    (tmp_path / "ids.txt").write_text("\n".join(map(str, documents)))
    options |= {"data__leave_out": tmp_path / "ids.txt"}
    ranks(run, config_of(corpus, tmp_path / "run", model, deepspeed, resume=checkpoint, **options))
    later = ledger.read(tmp_path / "run").to_pandas().query("step > 2")
    assert later["step"].max() == 4
    assert not (later["reason"] == "non_finite").any()
    assert later["loss"][later["tokens"] > 0].notna().all()
    theirs = later["document_ids"].map(lambda ids: bool(set(ids) & set(documents)))
    assert theirs.any()
    assert set(later[theirs & (later["tokens"] == 0)]["reason"]) <= {"left_out"}
    assert not later[theirs & (later["tokens"] == 0)]["kept"].any()
    assert (later["reason"] == "left_out").any()
    if unit == "document":
        assert (later[theirs]["tokens"] == 0).all()
    assert check_ledger(tmp_path / "run")[1] == []
    assert starts_of(tmp_path / "run")[1].leave_out == documents


@pytest.mark.slow
def test_leaving_out_documents_is_training_without_their_tokens_on_any_number_of_ranks(
    ranks, one_rank, corpus, tiny_model, tmp_path
):
    common = {
        "max_steps": 2,
        "data__leave_out": "[0, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89]",
        "influence__estimator": "none",
    }
    for name, pool, micro in (("two", ranks, 4), ("one", one_rank, 8)):
        deepspeed = deepspeed_json(tmp_path / f"{name}.json", 2, micro=micro)
        pool(run, config_of(corpus, tmp_path / name, tiny_model("llama"), deepspeed, **common))
    left, right = (ledger.read(tmp_path / name).drop_columns(["rank", "loss"]) for name in ("two", "one"))
    assert left.equals(right)
    assert largest_difference(weights(tmp_path / "two" / "model"), weights(tmp_path / "one" / "model")) < 1e-5


def test_a_lower_rate_after_a_gradient_that_is_not_finite_is_trained_at(ranks, corpus, tiny_model, tmp_path):
    options = {"max_steps": 3, "checkpoint__every_steps": 1}
    deepspeed = deepspeed_json(tmp_path / "ds.json", stage=0)
    config = config_of(corpus, tmp_path / "run", tiny_model("llama"), deepspeed, **options)
    with pytest.raises(AssertionError, match="FloatingPointError: the gradient of step 2 is not finite") as told:
        ranks(run_with_overflow, config, 2)
    checkpoint = re.search(
        r"(\S+step-1) is whole: lower the learning rate in the DeepSpeed JSON", str(told.value)
    ).group(1)
    lower = deepspeed_json(tmp_path / "lower.json", 0, optimizer={"type": "SGD", "params": {"lr": 0.01}})
    ranks(run, config_of(corpus, tmp_path / "run", tiny_model("llama"), lower, resume=checkpoint, **options))
    assert "optimizer.params.lr: 0.5 -> 0.01, from here on" in starts_of(tmp_path / "run")[1].changed


def test_no_checkpoint_is_spoken_of_where_there_is_none(ranks, corpus, tiny_model, tmp_path):
    """And to start anew, the remedy, works."""
    deepspeed = deepspeed_json(tmp_path / "ds.json", stage=0)
    config = config_of(corpus, tmp_path / "run", tiny_model("llama"), deepspeed, max_steps=2)
    with pytest.raises(AssertionError, match="the gradient of step 1 is not finite") as told:
        ranks(run_with_overflow, config, 1)
    assert "There is no checkpoint yet: lower the learning rate" in str(told.value)
    assert "is whole" not in str(told.value)
    lower = deepspeed_json(tmp_path / "lower.json", 0, optimizer={"type": "SGD", "params": {"lr": 0.01}})
    ranks(run, config_of(corpus, tmp_path / "run", tiny_model("llama"), lower, max_steps=2))


@pytest.mark.slow
def test_a_policy_that_can_never_drop_is_refused_and_each_remedy_works(one_rank, corpus, tiny_model, tmp_path):
    def config(micro: int, name: str = "run", accumulation: int = 2, **overrides):
        deepspeed = deepspeed_json(tmp_path / f"{name}{micro}.json", 2, micro=micro, accumulation=accumulation)
        return config_of(corpus, tmp_path / name, tiny_model("llama"), deepspeed, max_steps=1, **overrides)

    for refused in ({}, {"policy__action": "reweight"}):
        with pytest.raises(AssertionError, match="SystemExit: 2") as told:
            one_rank(run, config(1, **refused))
        assert "take a larger train_micro_batch_size_per_gpu or more ranks, or influence.scope step" in str(told.value)
    assert not (tmp_path / "run").exists()
    one_rank(run, config(2, "larger"))
    one_rank(run, config(1, "scope", influence__scope="step"))
    one_rank(run, config(1, "raised", policy__max_drop_fraction=1))
    one_rank(run, config(1, "observe", policy__action="observe"))
    one_rank(run, config(1, "none", influence__estimator="none"))


@pytest.mark.slow
def test_a_taken_port_names_the_launchers_option_and_another_port_works(corpus, tiny_model, tmp_path):
    """In one sentence, of plain python; the warm-up that is as long as the run is said before it."""
    deepspeed = deepspeed_json(tmp_path / "ds.json")
    options = {"max_steps": 1, "policy__warmup_steps": 1}
    config = config_of(corpus, tmp_path / "run", tiny_model("llama"), deepspeed, **options)
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = plain_python(config, MASTER_PORT=port)
    assert result.returncode == 2, result.stderr
    assert f"port {port} on this host is taken" in result.stderr
    assert "--master_port" in result.stderr
    assert "Traceback" not in result.stderr
    result = plain_python(config)
    assert result.returncode == 0, result.stderr
    assert "note: policy.warmup_steps 1 is as long as the run (max_steps 1)" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("key", ["run_dir", "data.prepared_dir"])
def test_a_directory_that_cannot_be_made_is_one_sentence(corpus, tiny_model, tmp_path, key):
    """Its parent is a file: root, whom no mode keeps out, is refused too."""
    (tmp_path / "file").write_text("")
    deepspeed = deepspeed_json(tmp_path / "ds.json")
    config = config_of(corpus, tmp_path / "run", tiny_model("llama"), deepspeed, max_steps=1)
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(config))
    command = [sys.executable, "-m", "pipeline.train", "--config", str(file), f"--{key}", str(tmp_path / "file" / "x")]
    result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240)
    assert result.returncode == 2, result.stderr
    assert str(tmp_path / "file") in result.stderr
    assert "Traceback" not in result.stderr
    assert os.path.isfile(tmp_path / "file")
