"""Settings that nothing reads are said before a run."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import cli
from pipeline.config.schema import Config
from pipeline.cost.config import BenchmarkRun
from pipeline.train import parse
from pipeline.training.rules import without_effect
from tests.runs import ADAM, deepspeed_json

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("setting", "wanted"),
    [
        ({"data.reference_files": "r.txt"}, {"influence.reference": "validation"}),
        ({"data.max_eval_sequences": 5}, {"data.eval_files": "e.txt"}),
        ({"influence.running_decay": 0.5}, {"influence.reference": "running"}),
        (
            {"influence.validation_every_steps": 5},
            {"influence.reference": "validation", "data.reference_files": "r.txt"},
        ),
        ({"influence.adam_every_steps": 5}, {"influence.precondition": "adam_state"}),
        ({"influence.adam_decay": 0.5}, {"influence.precondition": "adam_ema"}),
        ({"influence.adam_power": 0.25}, {"influence.precondition": "adam_ema"}),
        ({"policy.rate": 0.3}, {"policy.rule": "rate"}),
        ({"policy.threshold": -1, "policy.rule": "rate"}, {"policy.rule": "threshold"}),
    ],
)
def test_a_key_that_nothing_reads_is_said_and_each_remedy_ends_it(tmp_path, setting, wanted):
    """Catches a rate of 0.3 that drops by threshold, and whatever else is set and forgotten in silence."""
    whole: dict[str, Any] = {
        "run_dir": tmp_path / "run",
        "deepspeed_config": deepspeed_json(tmp_path / "ds.json", optimizer=ADAM),
        "model.name_or_path": "m",
        "data.prepared_dir": tmp_path / "data",
    }

    def said(settings: dict[str, Any]) -> list[str]:
        return without_effect(
            parse("pipeline.train", [f"--{key}={value}" for key, value in (whole | settings).items()])
        )

    (key, _), *_ = setting.items()
    [told] = said(setting)
    assert told.startswith(f"{key} is set, and has no effect without ")
    assert any(f"{name}" in told for name in wanted)
    assert said(setting | wanted) == []
    assert said({}) == []


@pytest.mark.parametrize("file", sorted((ROOT / "launch").glob("*.yaml")), ids=lambda path: path.name)
def test_no_shipped_config_sets_what_nothing_reads(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    benchmark = "benchmark" in yaml.safe_load(file.read_text())
    command, kind = ("pipeline.benchmark", BenchmarkRun) if benchmark else ("pipeline.train", Config)
    said = without_effect(cli.parse(command, ["--config", str(file)], kind))
    # Arms share a dataset, the reference of one of them included.
    assert [each for each in said if not (file.name == "arms_pile.yaml" and "data.reference_files" in each)] == []
