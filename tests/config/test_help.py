"""`--help` on one screen, and the rest on asking."""

import json
import re
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import yaml

from pipeline.config import cli
from pipeline.config.help import asked_for
from pipeline.config.schema import Config
from pipeline.cost.config import BenchmarkRun
from pipeline.train import parse

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "launch" / "quickstart.yaml"


def helped(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        parse("pipeline.train", list(arguments))
    assert stopped.value.code == 0
    return capsys.readouterr().out


def keys_of(kind: type) -> list[str]:
    found = []
    for field in fields(kind):
        inner = field.type if is_dataclass(field.type) else None
        found += [f"{field.name}.{each.name}" for each in fields(inner)] if inner else [field.name]
    return found


@pytest.mark.parametrize("columns", [80, 140])
def test_every_key_has_one_line_that_fits_with_its_default(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    shown = helped(capsys, "--config", "whatever.yaml", "--help")
    lines = shown.splitlines()
    assert max(map(len, lines)) <= columns
    for key in keys_of(Config):
        [line] = [line for line in lines if line.startswith(f"  --{key} ")]
        assert len(line.split()) > 3
    assert "  --policy.rate 0.1 " in shown
    assert "  --run_dir (needed) " in shown
    assert "  --influence.include_self true " in shown
    assert "SketchConfig(" not in shown
    for text in ("The corpus (data)", "The run (run)", "--help SECTION"):
        assert text in shown


def test_a_section_a_key_and_all_are_told_in_full(capsys):
    section = helped(capsys, "--help", "policy")
    assert all(f"--{key} " in section for key in keys_of(Config) if key.startswith("policy."))
    assert not any(f"--{key} " in section for key in keys_of(Config) if not key.startswith("policy."))
    key = helped(capsys, "--help", "checkpoint.best_of")
    assert "names it. A resume goes on from the newest as ever" in " ".join(key.split())
    assert key.count("\n  --") == 1
    run = helped(capsys, "--help", "run")
    assert "--max_steps" in run
    assert "--policy" not in run
    everything = helped(capsys, "-h", "all")
    assert all(f"--{key} " in everything for key in keys_of(Config))
    assert " ".join(key.split("names it.")[1].split()) in " ".join(everything.split())


def test_help_on_what_there_is_not_is_refused_and_names_the_sections(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse("pipeline.train", ["--help", "polcy"])
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert (
        "--help polcy: there is no such section or key; sections are run, model, data, task, influence, policy" in told
    )


def test_the_config_is_printed_with_what_each_key_means(capsys):
    told = helped(capsys, "--config", str(QUICKSTART), "--influence.estimator", "lli", "--print_config=comments")
    assert "# Where the run lives:" in told
    assert "  estimator: lli" in told
    assert yaml.safe_load(told)["influence"]["estimator"] == "lli"


def test_editors_get_a_schema_of_every_key_and_its_values(capsys):
    found = json.loads(helped(capsys, "--print_completion=jsonschema"))["properties"]
    assert found.keys() - {"$schema"} == {field.name for field in fields(Config)}
    rules = found["policy"]["properties"]["rule"]
    assert "mixture" in json.dumps(rules)
    assert found["policy"]["additionalProperties"] is False


def test_shells_complete_the_installed_command(monkeypatch, capsys):
    """Catches a script for a program of another name, which no shell would ever ask."""
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/lai-train"])
    told = helped(capsys, "--print_completion=shtab-bash")
    assert "--influence.estimator" in told
    assert re.search(r"complete .* lai-train$", told, re.MULTILINE), told[-300:]


def test_a_commands_own_section_is_there_too(capsys):
    with pytest.raises(SystemExit):
        cli.parse("pipeline.benchmark", ["--help"], BenchmarkRun)
    assert "  --benchmark.pairs 20 " in capsys.readouterr().out


def test_the_table_for_users_of_other_tools_names_keys_that_there_are():
    text = (ROOT / "launch" / "README.md").read_text().split("## Your keys and ours")[1].split("\n## ")[0]
    ours = [line.strip("|").split("|")[-1] for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(ours) > 20
    named = {key for cell in ours for key in re.findall(r"`([\w.]+)`", cell)}
    in_json = {key for cell in ours if "JSON:" in cell for key in re.findall(r"`([\w.]+)`", cell)}
    assert named - in_json <= {*keys_of(Config)}
    settings = [json.loads(path.read_text()) for path in (ROOT / "ds_configs").glob("*.json")]
    assert in_json <= {key for each in settings for key in each}


@pytest.mark.parametrize(
    ("arguments", "topic"),
    [
        (["--seed", "1"], None),
        (["--help"], ""),
        (["-h", "--config", "f"], ""),
        (["--config", "f", "--help", "data"], "data"),
    ],
)
def test_what_is_asked_for(arguments, topic):
    assert asked_for(arguments) == topic
