"""What a run says of itself before its first step."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.train import parse
from pipeline.training.opening import _output, _reference, policy_in_words
from tests.runs import ADAM, deepspeed_json

MIXTURE = '{"a": {"files": "a.txt"}, "b": {"files": "b.txt"}}'


def parsed(directory: Path, **overrides: Any):
    options = {
        "run_dir": directory / "run",
        "deepspeed_config": deepspeed_json(directory / "ds.json", accumulation=2, optimizer=ADAM),
        "model.name_or_path": "m",
        "data.prepared_dir": directory / "data",
    } | {key.replace("__", "."): value for key, value in overrides.items()}
    return parse("pipeline.train", [f"--{key}={value}" for key, value in options.items()])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({}, "drops sequences that score below 0, at most 50% of a global micro-batch"),
        (
            {"policy__threshold": 1.5, "policy__flag": "highest", "policy__max_drop_fraction": 0.25},
            "drops sequences that score above 1.5, at most 25% of a global micro-batch",
        ),
        (
            {"policy__rule": "rate", "policy__rate": 0.05, "influence__unit": "document"},
            "drops the lowest 5.0% of the documents of every global micro-batch",
        ),
        (
            {"policy__rule": "rate", "influence__scope": "step", "policy__warmup_steps": 9},
            "drops the lowest 10.0% of the sequences of every step, from step 10 on",
        ),
        ({"policy__rule": "top", "policy__pool": 4}, "trains on the best of every 4 sequences that are read"),
        (
            {"policy__rule": "top", "policy__pool": 4, "policy__temperature": 0.5},
            "trains on a draw by score (temperature 0.5) of every 4 sequences that are read",
        ),
        (
            {"policy__rule": "mixture", "data__mixture": MIXTURE},
            "moves the weights of data.mixture towards the sources whose text helps most, drops nothing",
        ),
        ({"policy__action": "observe"}, "none: all sequences are scored and trained on alike"),
        ({"policy__action": "reweight"}, "weighs sequences by the positive part of their scores"),
        ({"influence__estimator": "none"}, ""),
    ],
    ids=str,
)
def test_the_policy_in_a_sentence(tmp_path, overrides, words):
    assert policy_in_words(parsed(tmp_path, **overrides)) == words


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({}, "the global micro-batch; a sequence's influence on itself is in"),
        (
            {"influence__scope": "step", "influence__include_self": "false", "influence__unit": "document"},
            "all micro-batches of the step; a document's influence on itself is out",
        ),
        (
            {"influence__reference": "running"},
            "a running mean of the global micro-batch (decay 0.9); a sequence's influence on itself is in",
        ),
        (
            {"influence__reference": "validation", "data__reference_files": "r.txt"},
            "16 sequences of data.reference_files, drawn anew every step",
        ),
        (
            {
                "influence__reference": "validation",
                "data__reference_files": "r.txt",
                "influence__validation_every_steps": 5,
            },
            "16 sequences of data.reference_files, drawn anew every 5 steps",
        ),
        (
            {
                "influence__estimator": "ngram",
                "influence__reference": "validation",
                "data__reference_files": "r.txt",
            },
            "the text of data.reference_files",
        ),
        ({"influence__estimator": "loss", "policy__rule": "rate"}, ""),
    ],
    ids=str,
)
def test_what_scores_are_against_in_a_sentence(tmp_path, overrides, words):
    assert _reference(parsed(tmp_path, **overrides).influence) == words


def test_where_things_go_and_what_stays(tmp_path):
    said = _output(parsed(tmp_path))
    assert said.startswith(f"{tmp_path / 'run'}: ledger, TensorBoard, a checkpoint every 500 steps (the newest 2 stay)")
    more = {"checkpoint__every_steps": 1, "checkpoint__every_minutes": 30, "checkpoint__best_of": "all"}
    more |= {"data__eval_fraction": 0.1, "observe__eval_every_steps": 5}
    assert "a checkpoint every 1 step or 30 min (the newest 2 and the best stay)" in _output(parsed(tmp_path, **more))
