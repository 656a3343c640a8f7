"""What a user reads before the first step, in the transcript of a real launcher and line by line."""

import os
import re
import subprocess
import sys

from pipeline.train import parse
from tests.launcher import ROOT, deepspeed
from tests.runs import ADAM, config_of, deepspeed_json

OPENING = ("model", "influence", "reference", "policy", "corpus", "step", "run", "output")


def test_the_transcript_of_two_ranks_says_everything_once_and_in_order(corpus, tiny_model, tmp_path):
    """Catches what every rank says, what is said twice, and noise that a user can do nothing about."""
    config = config_of(
        corpus,
        tmp_path / "run",
        tiny_model("llama"),
        deepspeed_json(tmp_path / "ds.json", 3, accumulation=2, optimizer=ADAM),
        data__prepared_dir=tmp_path / "prepared",
        data__eval_fraction=0.1,
        max_steps=12,
        policy__rule="rate",
        policy__rate=0.25,
    )
    process = deepspeed("pipeline.train", config)
    transcript, _ = process.communicate(timeout=480)
    assert process.returncode == 0, transcript
    lines = re.split(r"[\n\r]", transcript)

    [started] = [n for n, line in enumerate(lines) if line.startswith("pipeline.train has started")]
    places = []
    for label in OPENING:
        [place] = [n for n, line in enumerate(lines) if re.match(rf"{label} +\S", line)]
        places.append(place)
    [first_step] = [n for n, line in enumerate(lines) if line.startswith("train:   0%")]
    [eta] = [n for n, line in enumerate(lines) if re.match(r"about .+ to go, at \S+ s a step", line)]
    assert started < places[0]
    assert places == sorted(places)
    assert places[-1] < first_step < eta

    ours = "\n".join(lines[started:])  # before it, the launcher speaks for itself
    assert "Setting accelerator to CPU" not in ours
    assert "built successfully" not in ours
    # Both ranks load them, and one shows it.
    assert ours.count("Loading weights: 100%") == 1
    assert "llama; float32, ZeRO 3, 2 ranks on cpu" in lines[places[0]]
    assert "lai scores " in lines[places[1]]
    assert "drops the lowest 25.0% of the sequences of every global micro-batch" in lines[places[3]]
    assert "128 tokens: 2 sequences x 2 ranks x 2 micro-batches" in lines[places[5]]
    assert "held-out loss before, after" in lines[places[6]]
    assert str(tmp_path / "run") in lines[places[7]]


def test_the_first_words_come_before_any_heavy_import(tmp_path):
    """Whatever is imported first, the words are out by then."""
    for name in ("torch", "deepspeed", "transformers", "datasets", "jsonargparse", "yaml", "numpy"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}

    def said(**ranks: str) -> str:
        command = [sys.executable, "-m", "pipeline.train"]
        return subprocess.run(command, cwd=ROOT, env=environment | ranks, capture_output=True, text=True).stderr

    for first in ({}, {"RANK": "0"}, {"OMPI_COMM_WORLD_RANK": "0"}, {"SLURM_PROCID": "0"}):
        assert re.match(r"pipeline.train has started.*\nimported", said(**first))
    for other in ({"RANK": "1"}, {"PMI_RANK": "1"}, {"SLURM_PROCID": "3"}):
        assert said(**other) == "imported\n"


def test_the_printed_config_is_nothing_but_the_config(corpus, tiny_model, tmp_path):
    """The first words are on standard error, so that `--print_config > mine.yaml` is a config."""
    config = config_of(corpus, tmp_path / "run", tiny_model("llama"), deepspeed_json(tmp_path / "ds.json"))
    keys = ("run_dir", "deepspeed_config", "model.name_or_path", "data.prepared_dir", "data.train_files")
    values = (getattr(config, keys[0]), config.deepspeed_config, config.model.name_or_path)
    values += (config.data.prepared_dir, config.data.train_files)
    options = [f"--{key}={value}" for key, value in zip(keys, values, strict=True)]
    command = [sys.executable, "-m", "pipeline.train", *options, "--print_config"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert printed.stderr.startswith("pipeline.train has started")
    (tmp_path / "mine.yaml").write_text(printed.stdout)
    assert parse("pipeline.train", ["--config", str(tmp_path / "mine.yaml")]).run_dir == config.run_dir
