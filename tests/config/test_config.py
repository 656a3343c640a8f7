import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import cli
from pipeline.config.cli import to_dict, to_yaml
from pipeline.config.deepspeed_json import read_deepspeed_config
from pipeline.config.schema import Config
from pipeline.cost.config import BenchmarkRun
from pipeline.influence.table import check_config
from pipeline.train import parse
from tests.runs import ADAM, deepspeed_json

ROOT = Path(__file__).parents[2]


@pytest.fixture
def options(tmp_path):
    deepspeed = deepspeed_json(tmp_path / "ds.json")
    return {
        "run_dir": tmp_path / "run",
        "deepspeed_config": deepspeed,
        "model.name_or_path": "m",
        "data.prepared_dir": tmp_path / "data",
    }


def parsed(options, **overrides) -> Config:
    arguments = options | {key.replace("__", "."): value for key, value in overrides.items()}
    return parse("pipeline.train", [f"--{key}={value}" for key, value in arguments.items()])


@pytest.mark.parametrize(
    ("stage", "settings", "overrides", "message"),
    [
        (
            1,
            {"zero_optimization": {"stage": 1, "overlap_comm": True}},
            {"influence__estimator": "ghost"},
            "estimator 'ghost' owns the end of the accumulation",
        ),
        (
            1,
            {"zero_optimization": {"stage": 1, "overlap_comm": True}},
            {"influence__passes": "score_first"},
            "influence.passes 'score_first' owns",
        ),
    ],
)
def test_what_the_deepspeed_json_cannot_do_is_refused(options, tmp_path, capsys, stage, settings, overrides, message):
    deepspeed = deepspeed_json(tmp_path / "other.json", stage, **{"optimizer": ADAM} | settings)
    with pytest.raises(SystemExit):
        parsed(options | {"deepspeed_config": str(deepspeed)}, **overrides)
    assert message in capsys.readouterr().err


def test_yaml_round_trip_gives_an_equal_config(options, tmp_path):
    config = parsed(options, influence__sketch="none", policy__rule="rate", data__train_files='["a.txt", "b.txt"]')
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert parse("pipeline.train", ["--config", str(tmp_path / "c.yaml")]) == config


def test_overrides_win_over_the_file_and_the_launchers_rank_is_accepted(options, tmp_path):
    (tmp_path / "c.yaml").write_text(to_yaml(parsed(options, seed=4)))
    config = parse(
        "pipeline.train", ["--local_rank=1", "--config", str(tmp_path / "c.yaml"), "--influence.sketch.input_width=9"]
    )
    assert (config.seed, config.influence.sketch.input_width, config.influence.sketch.logit_width) == (4, 9, 2048)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"influence__estimator": "ip"}, "'ip' is none of loss, random, none, lai, lli, residual, ghost"),
        ({"influence__reference": "validation"}, "needs data.reference_files, which is not set"),
        ({"influence__reference": "validation", "data__reference_files": "builtin"}, "holds out nothing"),
        (
            {"influence__estimator": "random", "influence__reference": "running"},
            "is not for estimator 'random': it compares with nothing. Set it to batch",
        ),
        ({"influence__precondition": "adam_state"}, "has optimizer 'SGD'"),
        ({"influence__estimator": "ghost", "influence__precondition": "adam_ema"}, "or choose lai or lli"),
        (
            {"influence__estimator": "ghost", "influence__unit": "document"},
            "of other documents too. Set it to sequence",
        ),
        ({"influence__running_decay": 1.0}, "influence.running_decay must lie in [0, 1)"),
        ({"observe__audit_every_steps": 2, "influence__estimator": "none"}, "leave it out"),
        (
            {"influence__passes": "score_first", "influence__estimator": "ghost"},
            "it scores by the training backward itself. Set it to one",
        ),
        ({"influence__passes": "score_first", "influence__estimator": "none"}, "it scores nothing. Set it to one"),
        ({"influence__passes": "score_first", "policy__action": "observe"}, "'observe' drops nothing; set passes"),
        ({"influence__estimator": "magic"}, "magic"),
        ({"influnce__estimator": "lai"}, "influnce.estimator"),
        ({"policy__rate": 1.5}, "policy.rate is a fraction"),
        ({"policy__rule": "rate", "policy__rate": 0.8}, "above policy.max_drop_fraction"),
        (
            {"influence__estimator": "loss", "influence__precondition": "adam_ema"},
            "is not for estimator 'loss'. Set it to none",
        ),
        ({"influence__estimator": "loss"}, "its scores all have one sign. Set it to rate"),
        ({"data__sequence_length": 1}, "data.sequence_length is too small"),
        ({"seed": -1}, "seed must be 0 or more"),
        ({"data__seed": -1}, "data.seed must be 0 or more"),
        ({"data__planted_noise": 2}, "data.planted_noise is a fraction"),
        ({"data__planted_foreign_files": "f.txt"}, "set data.planted_noise"),
        ({"policy__flag": "highest", "policy__action": "reweight"}, "'reweight' drops nothing"),
        ({"observe__eval_every_steps": 5}, "needs data.eval_files"),
        ({"deepspeed_config": "nowhere.json"}, "deepspeed_config: no file nowhere.json"),
    ],
)
def test_what_cannot_work_is_refused_by_name_before_anything_starts(options, capsys, overrides, message):
    with pytest.raises(SystemExit) as stopped:
        parsed(options, **overrides)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("influence.sketch.inputs", "is called influence.sketch.input_width"),
        ("influence.sketch.gradients", "is called influence.sketch.logit_width"),
        ("influence.sketch.layers", "is called influence.sketch.hidden_width"),
        ("influence.layer_weights", "did not help"),
    ],
)
@pytest.mark.parametrize("in_file", [False, True])
def test_a_key_of_before_is_refused_with_what_became_of_it(options, tmp_path, capsys, key, message, in_file):
    """On the command line as in a file."""
    arguments = [f"--{name}={value}" for name, value in options.items()]
    nested: Any = 9
    for part in reversed(key.split(".")):
        nested = {part: nested}
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(nested))
    arguments += [f"--config={tmp_path / 'old.yaml'}"] if in_file else [f"--{key}", "9"]
    with pytest.raises(SystemExit) as stopped:
        parse("pipeline.train", arguments)
    assert stopped.value.code == 2
    assert f"{key} " in (shown := capsys.readouterr().err)
    assert message in shown


def test_a_key_that_a_file_has_twice_is_refused_and_keeping_one_works(options, tmp_path, capsys):
    """Catches YAML's own rule, the last one counts: a whole section of before would be forgotten."""
    file, values = tmp_path / "c.yaml", "".join(f"{name}: {value}\n" for name, value in options.items())
    for text, named in {
        "policy: {rate: 0.2}\npolicy: {rule: rate}\n": "policy",
        "policy: {rate: 0.2, rate: 0.3}\n": "policy.rate",
        "max_steps: 5\nseed: 1\nmax_steps: 7\nseed: 1\n": "max_steps, seed",
    }.items():
        file.write_text(values + text)
        with pytest.raises(SystemExit):
            parse("pipeline.train", ["--config", str(file)])
        assert f"c.yaml has {named} twice, of which only the last would count; keep one" in capsys.readouterr().err
    file.write_text(values + "policy: {rate: 0.2, rule: rate}\nmax_steps: 5\n")
    assert parse("pipeline.train", [f"--config={file}"]).policy.rate == 0.2


def test_each_command_has_its_own_keys_beside_the_runs(options, capsys):
    arguments = [f"--{name}={value}" for name, value in options.items()] + ["--benchmark.pairs", "3"]
    assert cli.parse("pipeline.benchmark", arguments, BenchmarkRun).benchmark.pairs == 3
    with pytest.raises(SystemExit):
        parse("pipeline.train", arguments)
    assert "benchmark.pairs" in capsys.readouterr().err


def test_a_dataset_inside_the_run_directory_is_refused(options, capsys):
    with pytest.raises(SystemExit):
        parsed(options, data__prepared_dir=options["run_dir"] / "data")
    assert "must lie outside run_dir" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gradient_clipping": None}, "gradient_clipping is missing"),
        ({"optimizer": None}, "optimizer is missing"),
        ({"train_micro_batch_size_per_gpu": None}, "train_micro_batch_size_per_gpu is missing"),
        ({"train_micro_batch_size_per_gpu": "auto"}, 'only scheduler.params.total_num_steps may say "auto"'),
        ({"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}, "zero_optimization.reduce_bucket_size"),
        ({"train_batch_size": 8}, "remove train_batch_size"),
        ({"gradient_accumulation_steps": 0}, "must be a whole number of at least 1"),
    ],
)
def test_a_deepspeed_json_that_is_silent_or_auto_is_refused(options, capsys, change, message):
    path = options["deepspeed_config"]
    settings = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))
    with pytest.raises(SystemExit):
        parsed(options)
    assert message in capsys.readouterr().err


def test_schedule_length_auto_is_max_steps(options):
    path = options["deepspeed_config"]
    schedule = {"type": "WarmupCosineLR", "params": {"total_num_steps": "auto", "warmup_num_steps": 5}}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"scheduler": schedule}))
    assert read_deepspeed_config(parsed(options, max_steps=77))["scheduler"]["params"]["total_num_steps"] == 77


@pytest.mark.parametrize("file", sorted((ROOT / "launch").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_is_accepted(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    keys = set(yaml.safe_load(file.read_text()))
    config = cli.parse("pipeline.benchmark", ["--config", str(file)], BenchmarkRun, check_config)
    assert keys <= set(to_dict(config))
    if "benchmark" not in keys:
        assert parse("pipeline.train", ["--config", str(file)])


@pytest.mark.parametrize("file", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.name)
def test_every_shipped_deepspeed_json_is_accepted(file, options):
    assert parsed(options, deepspeed_config=file)
