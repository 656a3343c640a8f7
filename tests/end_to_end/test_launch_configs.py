"""Every config in launch/ runs: its own settings, with a tiny model and little text in place of what it names."""

import json
from pathlib import Path

import pytest
import yaml

from pipeline import benchmark
from pipeline.config.schema import Config
from pipeline.record import ledger
from pipeline.train import parse, train

LAUNCH = Path(__file__).parents[2] / "launch"
CONFIGS = sorted(path.name for path in LAUNCH.glob("*.yaml") if path.name != "benchmark_125m.yaml")
STEPS = 2


@pytest.fixture
def small(corpus, tiny_model, tmp_path, monkeypatch):
    """A config of launch/ as its command line reads it, made small."""
    monkeypatch.chdir(LAUNCH.parent)

    def of(name: str) -> Config:
        text = str(corpus / "documents.jsonl")
        data = yaml.safe_load((LAUNCH / name).read_text())["data"]
        options = {
            "run_dir": tmp_path / "run",
            "max_steps": STEPS,
            "model.name_or_path": tiny_model("gpt_neo"),
            "model.tokenizer": corpus / "tokenizer",
            "data.prepared_dir": tmp_path / "prepared",
            "data.sequence_length": 16,
            "data.max_sequences": 300,
            "data.max_eval_sequences": 4,
            "data.allow_overlap": True,  # one text for everything
        }
        options |= {f"data.{key}": text for key in data if key.endswith("_files")}
        if "mixture" in data:
            options["data.mixture"] = json.dumps({source: {"files": text} for source in data["mixture"]})
        if name == "emotion.yaml":
            # A plain first epoch is longer than this run.
            options |= {"task.label_field": "meta.pile_set_name", "policy.warmup_steps": 1}
        given = [f"--{key}={value}" for key, value in options.items()]
        return parse("pipeline.train", ["--config", str(LAUNCH / name), *given])

    return of


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_of_launch_runs(name, small, one_rank):
    """Catches keys that are gone, combinations that are refused by now, and a DeepSpeed JSON that has moved."""
    config = small(name)
    summary = one_rank(train, config)[0]
    assert summary["steps"] == STEPS
    rows = ledger.read(Path(config.run_dir))
    assert set(rows["step"].to_pylist()) == {1, 2}
    scored = rows["score"].null_count < len(rows)
    assert scored == (config.influence.estimator != "none")
    assert (summary["evaluation_after"] is not None) == config.data.holds_out


@pytest.mark.slow
def test_the_config_of_the_benchmark_is_planned(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(LAUNCH.parent)
    options = ["--plan", f"--run_dir={tmp_path}", f"--model.name_or_path={tiny_model('gpt_neo')}"]
    benchmark.main(["--config", "launch/benchmark_125m.yaml", *options, "--data.sequence_length=16"])
    assert "lai" in json.loads((tmp_path / "plan.json").read_text())["estimators"]
