import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import cli
from pipeline.config.cli import to_dict, to_yaml
from pipeline.config.deepspeed_json import read_deepspeed_config
from pipeline.config.schema import Config
from pipeline.config.schema_data import SourceConfig
from pipeline.cost.config import BenchmarkRun
from pipeline.evidence.config import FidelityRun
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


def test_yaml_round_trip_gives_an_equal_config(options, tmp_path):
    config = parsed(options, influence__sketch="none", policy__rule="rate", data__train_files='["a.txt", "b.txt"]')
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert parse("pipeline.train", ["--config", str(tmp_path / "c.yaml")]) == config


def test_a_mixture_survives_yaml_and_stands_in_place_of_the_default(options, tmp_path):
    """Catches sources that are written as objects, and a default that counts as set."""
    mixture = {"web": {"files": "~/w.jsonl", "weight": 0.7}, "code": {"files": ["c.txt"], "weight": 1, "epochs": 2.5}}
    config = parsed(options, data__mixture=json.dumps(mixture))
    assert config.data.mixture["code"] == SourceConfig(["c.txt"], 1, 2.5)
    assert "~" not in config.data.mixture["web"].files
    assert (config.data.train_files, parsed(options).data.train_files) == (None, "builtin")
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert parse("pipeline.train", ["--config", str(tmp_path / "c.yaml")]) == config


def test_overrides_win_over_the_file_and_the_launchers_rank_is_accepted(options, tmp_path):
    (tmp_path / "c.yaml").write_text(to_yaml(parsed(options, seed=4)))
    config = parse(
        "pipeline.train", ["--local_rank=1", "--config", str(tmp_path / "c.yaml"), "--influence.sketch.input_width=9"]
    )
    assert (config.seed, config.influence.sketch.input_width, config.influence.sketch.logit_width) == (4, 9, 2048)


TWO = '{"a": {"files": "g.txt"}, "b": {"files": "h.txt"}}'
"""A mixture."""
REFUSED: list[tuple[dict[str, Any], str, list[dict[str, Any]]]] = [
    (
        {"influence__estimator": "ip"},
        "is none of loss, random, none, lookahead, rho, ngram, oracle, lai, ",
        [{"influence__estimator": "lli"}],
    ),
    ({"influence__estimator": "magic"}, "magic", [{"influence__estimator": "lai"}]),
    ({"influnce__estimator": "lai"}, "influnce.estimator", [{"influnce__estimator": None}]),
    (
        {"influence__reference": "validation"},
        "needs data.reference_files, which is not set; set it, or choose batch",
        [{"data__reference_files": "builtin.jsonl"}, {"influence__reference": "batch"}],
    ),
    (
        {"influence__reference": "validation", "data__reference_files": "builtin"},
        "holds out nothing for it; give files or a hub id",
        [{"data__reference_files": "my/*.jsonl"}, {"data__reference_files": "owner/name"}],
    ),
    (
        {"influence__estimator": "random", "influence__reference": "running", "policy__rule": "rate"},
        "is not for estimator 'random': it compares with nothing. Set it to batch, or choose lai",
        [{"influence__reference": "batch"}, {"influence__estimator": "lai"}],
    ),
    (
        {"influence__precondition": "adam_state"},
        "has optimizer 'SGD'. Choose Adam or AdamW there, or another value",
        [{"deepspeed_config": "adam.json"}, {"influence__precondition": "none"}],
    ),
    (
        {"influence__estimator": "ghost", "influence__precondition": "adam_ema"},
        "Set it to none, or choose lai or lli",
        [{"influence__precondition": "none"}, {"influence__estimator": "lai"}, {"influence__estimator": "lli"}],
    ),
    (
        {"influence__estimator": "ghost", "influence__unit": "document"},
        "of other documents too. Set it to sequence",
        [{"influence__unit": "sequence"}, {"influence__estimator": "lai"}],
    ),
    ({"influence__running_decay": 1.0}, "running_decay must lie in [0, 1)", [{"influence__running_decay": 0.9}]),
    (
        {"observe__audit_every_steps": 2, "influence__estimator": "none"},
        "leave it out",
        [{"observe__audit_every_steps": None}],
    ),
    (
        {"influence__passes": "score_first", "influence__estimator": "ghost"},
        "it scores by the training backward itself. Set it to one",
        [{"influence__passes": "one"}],
    ),
    (
        {"influence__passes": "score_first", "influence__estimator": "none"},
        "it scores nothing. Set it to one",
        [{"influence__passes": "one"}],
    ),
    (
        {"influence__passes": "score_first", "policy__action": "observe"},
        "'observe' drops nothing; set passes to one",
        [{"influence__passes": "one"}],
    ),
    ({"policy__rate": 1.5}, "policy.rate is a fraction from 0 to 1", [{"policy__rate": 0.5}]),
    (
        {"policy__rule": "rate", "policy__rate": 0.8},
        "above policy.max_drop_fraction 0.5: lower the one or raise the other",
        [{"policy__rate": 0.5}, {"policy__max_drop_fraction": 0.8}],
    ),
    (
        {"influence__estimator": "loss", "influence__precondition": "adam_ema"},
        "is not for estimator 'loss'. Set it to none",
        [{"influence__precondition": "none", "policy__rule": "rate"}],
    ),
    ({"influence__estimator": "loss"}, "its scores all have one sign. Set it to rate", [{"policy__rule": "rate"}]),
    ({"data__sequence_length": 1}, "data.sequence_length must be 2 or more, not 1", [{"data__sequence_length": 2}]),
    ({"checkpoint__keep": 0}, "checkpoint.keep must be 1 or more, not 0", [{"checkpoint__keep": 1}]),
    ({"seed": -1}, "seed must be 0 or more", [{"seed": 0}]),
    ({"data__seed": -1}, "data.seed must be 0 or more", [{"data__seed": 0}]),
    ({"data__planted_noise": 2}, "data.planted_noise is a fraction", [{"data__planted_noise": 1}]),
    (
        {"data__planted_foreign_files": "f.txt"},
        "set data.planted_noise, or leave it out",
        [{"data__planted_noise": 0.1}, {"data__planted_foreign_files": None}],
    ),
    (
        {"data__train_files": "f.txt", "data__mixture": '{"a": {"files": "g.txt"}}'},
        "data.train_files and data.mixture both say what to train on: leave one of them out",
        [{"data__train_files": "null"}, {"data__mixture": "null"}],
    ),
    (
        {"data__train_files": "builtin", "data__mixture": '{"a": {"files": "g.txt"}}'},
        "both say what to train on",
        [{"data__train_files": "null"}],
    ),
    (
        {"data__mixture": "{}"},
        "data.mixture names no source",
        [{"data__mixture": "null"}, {"data__mixture": '{"a": {"files": "g.txt"}}'}],
    ),
    (
        {"data__mixture": '{"a": {"files": "g.txt", "weight": 0}}'},
        "data.mixture.a.weight must be a number above 0, not 0",
        [{"data__mixture": '{"a": {"files": "g.txt"}}'}, {"data__mixture": '{"a": {"files": "g.txt", "weight": 7}}'}],
    ),
    (
        {"data__mixture": '{"a": {"files": "g.txt", "epochs": .inf}}'},
        "data.mixture.a.epochs must be a number above 0, not inf",
        [{"data__mixture": '{"a": {"files": "g.txt"}}'}, {"data__mixture": '{"a": {"files": "g.txt", "epochs": 0.5}}'}],
    ),
    (
        {"data__mixture": '{"a": {"files": "g.txt", "weight": 1}, "b": {"files": "h.txt"}}'},
        "data.mixture: a has a weight and b has none: give every source one, or none",
        [
            {"data__mixture": '{"a": {"files": "g.txt"}, "b": {"files": "h.txt"}}'},
            {"data__mixture": '{"a": {"files": "g.txt", "weight": 1}, "b": {"files": "h.txt", "weight": 1}}'},
        ],
    ),
    (
        {"policy__rule": "mixture"},
        "policy.rule 'mixture' needs data.mixture, which is not set; set it, or choose another rule",
        [{"data__mixture": TWO}, {"policy__rule": "rate"}],
    ),
    (
        {
            "policy__rule": "mixture",
            "policy__action": "observe",
            "data__mixture": TWO,
        },
        "it goes with no policy.action 'observe'",
        [{"policy__action": None}, {"policy__rule": "rate"}],
    ),
    (
        {
            "policy__rule": "mixture",
            "policy__flag": "highest",
            "data__mixture": TWO,
        },
        "it goes with no policy.flag 'highest'",
        [{"policy__flag": None}, {"policy__rule": "rate"}],
    ),
    (
        {
            "policy__rule": "mixture",
            "policy__pool": 2,
            "data__mixture": TWO,
        },
        "policy.rule 'top' and policy.pool",
        [{"policy__pool": None}, {"policy__rule": "top"}],
    ),
    (
        {
            "policy__rule": "mixture",
            "policy__temperature": 1.0,
            "data__mixture": TWO,
        },
        "policy.temperature is for policy.rule 'top'",
        [{"policy__temperature": None}],
    ),
    (
        {"policy__rule": "mixture", "data__mixture": '{"a": {"files": "g.txt", "epochs": 2}}'},
        "leave out data.mixture.a.epochs, or choose another rule",
        [{"policy__rule": "rate"}, {"data__mixture": TWO}],
    ),
    (
        {
            "policy__rule": "mixture",
            "influence__estimator": "none",
            "data__mixture": TWO,
        },
        "influence.estimator 'none' gives none: choose another",
        [{"influence__estimator": "loss"}],
    ),
    (
        {
            "policy__rule": "mixture",
            "policy__mixture_floor": 1.0,
            "data__mixture": TWO,
        },
        "policy.mixture_floor must lie in [0, 1), not 1.0",
        [{"policy__mixture_floor": 0.0}],
    ),
    (
        {"policy__flag": "highest", "policy__action": "reweight"},
        "'reweight' drops nothing: choose drop",
        [{"policy__action": "drop"}],
    ),
    (
        {"observe__eval_every_steps": 5},
        "needs data.eval_files or data.eval_fraction, and neither is set; set one, or leave the other out",
        [{"data__eval_files": "builtin"}, {"data__eval_fraction": 0.1}, {"observe__eval_every_steps": None}],
    ),
    (
        {"checkpoint__best_of": "all", "data__eval_files": "builtin"},
        "checkpoint.best_of needs observe.eval_every_steps",
        [{"observe__eval_every_steps": 5}, {"checkpoint__best_of": None}],
    ),
    (
        {"checkpoint__every_minutes": 0},
        "checkpoint.every_minutes must be more than 0, not 0",
        [{"checkpoint__every_minutes": 0.5}],
    ),
    (
        {"data__eval_files": "builtin", "data__eval_fraction": 0.1},
        "data.eval_files and data.eval_fraction both say what is held out: leave one of them out",
        [{"data__eval_files": None}, {"data__eval_fraction": None}],
    ),
    ({"data__eval_fraction": 0.0}, "data.eval_fraction must be more than 0", [{"data__eval_fraction": 0.001}]),
    ({"data__eval_fraction": 1.0}, "data.eval_fraction must lie in [0, 1)", [{"data__eval_fraction": 0.999}]),
    (
        {"deepspeed_config": "nowhere.json"},
        "deepspeed_config: no file nowhere.json; ds_configs/ holds ready ones",
        [{"deepspeed_config": ROOT / "ds_configs" / "gpt_neo_125m.json"}],
    ),
    (
        {"data__prepared_dir": "r/data", "run_dir": "r"},
        "data.prepared_dir must lie outside run_dir",
        [{"data__prepared_dir": "data"}],
    ),
    (
        {"data__prepared_dir": "r", "run_dir": "r/run"},
        "run_dir must lie outside data.prepared_dir",
        [{"run_dir": "run"}],
    ),
    (
        {"influence__estimator": "ghost", "policy__normalize": "kept"},
        "policy.normalize 'kept' is not for estimator 'ghost', which knows what is kept when the gradient is there",
        [{"policy__normalize": "all"}, {"policy__normalize": None}, {"influence__estimator": "lai"}],
    ),
    (
        {"task__label_noise": 0.4},
        "task.label_noise is for task.kind 'sequence_classification': set that, or leave it out",
        [{"task__label_noise": None}, {"task__kind": "sequence_classification"}],
    ),
    (
        {"task__kind": "sequence_classification", "task__label_noise": 0.4, "task__true_label_field": "true"},
        "task.label_noise and task.true_label_field both say which labels are wrong: leave one of them out",
        [{"task__label_noise": None}, {"task__true_label_field": None}],
    ),
    (
        {"task__kind": "sequence_classification", "influence__unit": "document"},
        "influence.unit document is for packed text, and task.kind is 'sequence_classification': leave it out",
        [{"influence__unit": None}],
    ),
    (
        {"task__kind": "sequence_classification", "data__eos": True},
        "data.eos is for packed text, and task.kind is 'sequence_classification': leave it out",
        [{"data__eos": None}],
    ),
    (
        {"task__kind": "sequence_classification", "influence__estimator": "residual"},
        "task.kind 'sequence_classification' is not for estimator 'residual'. Set it to causal_lm, or choose lai or",
        [{"influence__estimator": "lai"}, {"influence__estimator": "loss", "policy__rule": "rate"}],
    ),
    (
        {"deepspeed_config": "overlap.json", "influence__estimator": "ghost"},
        "estimator 'ghost' owns the end of the accumulation, which DeepSpeed allows with overlap_comm at ZeRO 2 and 3",
        [{"deepspeed_config": "adam.json"}],
    ),
    (
        {"deepspeed_config": "overlap.json", "influence__passes": "score_first"},
        "set it to false in the DeepSpeed JSON",
        [{"deepspeed_config": "adam.json"}],
    ),
]


@pytest.mark.parametrize(("overrides", "message", "remedies"), REFUSED, ids=[str(case[0]) for case in REFUSED])
def test_what_cannot_work_is_refused_by_name_before_anything_starts_and_each_remedy_is_accepted(
    options, tmp_path, monkeypatch, capsys, overrides, message, remedies
):
    """Catches a remedy that is refused in its turn."""
    monkeypatch.chdir(tmp_path)
    for name, overlap in {"adam.json": False, "overlap.json": True}.items():
        zero = {"stage": 1, "overlap_comm": overlap}
        deepspeed_json(tmp_path / name, 1, optimizer=ADAM, zero_optimization=zero)
    options["deepspeed_config"] = deepspeed_json(tmp_path / "sgd.json")
    with pytest.raises(SystemExit) as stopped:
        parsed(options, **overrides)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    for remedy in remedies:
        mended = {key: value for key, value in (overrides | remedy).items() if value is not None}
        assert parsed(options, **mended)


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
def test_a_deepspeed_json_that_is_silent_or_auto_is_refused_and_what_is_asked_for_is_accepted(
    options, capsys, change, message
):
    path = options["deepspeed_config"]
    whole = path.read_text()
    settings = json.loads(whole) | change
    path.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))
    with pytest.raises(SystemExit):
        parsed(options)
    assert message in capsys.readouterr().err
    path.write_text(whole)  # which has what was missing, and whole numbers, and no train_batch_size
    assert parsed(options)


def test_schedule_length_auto_is_max_steps(options):
    path = options["deepspeed_config"]
    schedule = {"type": "WarmupCosineLR", "params": {"total_num_steps": "auto", "warmup_num_steps": 5}}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"scheduler": schedule}))
    assert read_deepspeed_config(parsed(options, max_steps=77))["scheduler"]["params"]["total_num_steps"] == 77


@pytest.mark.parametrize("file", sorted((ROOT / "launch").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_is_accepted(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    keys = set(yaml.safe_load(file.read_text()))
    kind, command = (BenchmarkRun, "pipeline.benchmark") if "benchmark" in keys else (Config, "pipeline.train")
    config = cli.parse(command, ["--config", str(file)], kind, check_config)
    assert keys <= set(to_dict(config))
    if "benchmark" not in keys:
        assert parse("pipeline.train", ["--config", str(file)])


@pytest.mark.parametrize("file", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.name)
def test_every_shipped_deepspeed_json_is_accepted(file, options):
    assert parsed(options, deepspeed_config=file)


def test_commands_of_packed_text_refuse_a_classifier(options, capsys):
    """They would count, and compare, another model than the run trains."""
    arguments = [f"--{name}={value}" for name, value in options.items()]
    for command, kind in (("pipeline.benchmark", BenchmarkRun), ("pipeline.fidelity", FidelityRun)):
        with pytest.raises(SystemExit):
            cli.parse(command, [*arguments, "--task.kind=sequence_classification"], kind)
        assert f"task.kind 'sequence_classification' is not for {command}" in capsys.readouterr().err
        assert cli.parse(command, arguments, kind)
