"""A run of which only the model and the text are named."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config.deepspeed_json import read_deepspeed_config
from pipeline.engine.json_check import check_deepspeed_json
from pipeline.train import parse
from pipeline.training.defaults import JSON, JSON_BF16, defaults
from tests.launcher import ROOT, environment
from tests.runs import deepspeed_json


@pytest.fixture
def model(tiny_model, corpus, tmp_path) -> Path:
    """With its tokenizer, as a user has it."""
    shutil.copytree(tiny_model("gpt2"), tmp_path / "M")
    shutil.copytree(corpus / "tokenizer", tmp_path / "M", dirs_exist_ok=True)
    return tmp_path / "M"


def test_two_paths_are_enough(model, corpus, tmp_path):
    """The command of launch/README.md, to its last step, with nothing else; then what was said is where it was said."""
    shutil.copy(corpus / "documents.jsonl", tmp_path / "T.jsonl")
    command = [sys.executable, "-m", "pipeline.train", "--model.name_or_path", "M", "--data.train_files", "T.jsonl"]
    options = {"env": environment() | {"PYTHONPATH": str(ROOT)}, "cwd": tmp_path, "capture_output": True, "text": True}
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stderr
    for key, value in {
        "run_dir": "runs/M-T",
        "data.prepared_dir": "runs/data/M-T",
        "deepspeed_config": str(JSON_BF16 if "bf16" in done.stdout.split("model ")[1][:100] else JSON),
        "data.sequence_length": "64",
    }.items():
        assert f"pipeline.train: {key} is not set: it is {value}\n" in done.stderr
    summary = json.loads((tmp_path / "runs" / "M-T" / "summary.json").read_text())
    assert summary["steps"] == 1000
    assert (tmp_path / "runs" / "data" / "M-T" / "fingerprint.json").is_file()
    assert (tmp_path / "runs" / "M-T" / "model" / "config.json").is_file()
    again = subprocess.run([*command, "--resume=auto"], **options)
    assert again.returncode == 0, again.stderr
    assert not (tmp_path / "runs" / "M-T.1").exists()


def test_what_is_given_on_the_command_line_or_in_a_file_is_not_filled(model, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("run_dir: mine\ndata: {sequence_length: 16}\n")
    deepspeed = deepspeed_json(tmp_path / "ds.json")
    options = ["--config", str(tmp_path / "c.yaml"), f"--model.name_or_path={model}", "--deepspeed_config"]
    config = parse("pipeline.train", [*options, str(deepspeed)])
    assert (config.run_dir, config.data.sequence_length, config.deepspeed_config) == ("mine", 16, str(deepspeed))
    assert config.data.prepared_dir == "runs/data/M-builtin"
    assert capsys.readouterr().err == "pipeline.train: data.prepared_dir is not set: it is runs/data/M-builtin\n"


def test_a_whole_config_gets_nothing_else():
    whole = {"run_dir": "r", "deepspeed_config": "d", "data.prepared_dir": "p", "model.name_or_path": "m.json"}
    assert defaults(whole) == {}


def test_without_a_model_what_is_missing_is_refused_as_ever(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse("pipeline.train", ["--data.train_files=T"])
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert "model.name_or_path" in told
    assert "is not set: it is" not in told


def test_a_file_that_is_no_config_is_refused_as_ever(tmp_path, capsys):
    """Catches a trace of YAML's in the place of a message."""
    for text in ("run_dir: !unknown x", "[1, 2]", "run_dir: ["):
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(SystemExit) as stopped:
            parse("pipeline.train", ["--config", str(tmp_path / "c.yaml"), "--model.name_or_path=m"])
        assert stopped.value.code == 2
        assert "error: " in capsys.readouterr().err


def test_a_model_from_scratch_gets_a_tokenizer_of_its_own():
    assert defaults({"model.name_or_path": "launch/models/gpt_neo_tiny.json"})["model.tokenizer"] == "train"
    assert "model.tokenizer" not in defaults({"model.name_or_path": "x.json", "model.tokenizer": "t"})


@pytest.mark.parametrize(
    ("model", "files", "name"),
    [
        ("EleutherAI/pythia-70m", "my/*.jsonl.zst", "pythia-70m-my"),
        ("models/llama/", "corpus/part_1.jsonl.gz", "llama-part_1"),
        ("m.json", "owner/name:config:split@abc", "m-name-config-split"),
        ("/a b/c d.gguf", '["x/y.txt", "z.txt"]', "c-d-y"),
        ("m", "**/*.parquet", "m-text"),
        ("m", "[ab]_part.txt", "m-ab-_part"),
        ("m", None, "m-builtin"),
    ],
)
def test_places_are_named_by_model_and_text(model, files, name):
    given = {"model.name_or_path": model} | ({"data.train_files": files} if files else {})
    assert defaults(given)["run_dir"] == f"runs/{name}"
    assert defaults(given)["data.prepared_dir"] == f"runs/data/{name}"


def test_a_mixture_is_called_so():
    given = {"model.name_or_path": "m", "data.mixture.web.files": "w.txt"}
    assert defaults(given)["run_dir"] == "runs/m-mixture"


def test_the_two_jsons_are_sound_and_differ_in_precision_alone(model, tmp_path):
    for path in (JSON, JSON_BF16):
        config = parse("pipeline.train", [f"--model.name_or_path={model}", f"--deepspeed_config={path}"])
        check_deepspeed_json(config, read_deepspeed_config(config))
    plain, bf16 = (json.loads(path.read_text()) for path in (JSON, JSON_BF16))
    assert bf16 == plain | {"bf16": {"enabled": True}}
