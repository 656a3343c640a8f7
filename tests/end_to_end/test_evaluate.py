import json
import math
import re
from pathlib import Path

import datasets
import pytest
import torch

from pipeline.config.cli import to_yaml
from pipeline.data.prepared import load_report, load_split
from pipeline.evaluate import main
from pipeline.training.evaluation import evaluate
from tests.launcher import deepspeed
from tests.runs import ADAM, config_of, deepspeed_json, run
from tests.tiny_models import VOCABULARY, tiny

CPU = torch.device("cpu")
SIZES = {"a": {"tokens": 10, "bytes": 30}, "b": {"tokens": 20, "bytes": 40}}


def small_rows() -> datasets.Dataset:
    generator = torch.Generator().manual_seed(0)
    return datasets.Dataset.from_dict(
        {
            "input_ids": torch.randint(0, VOCABULARY, (5, 8), generator=generator).tolist(),
            "document_ids": [[0] * 8, [0, 0, 1, 1, 1, 2, 2, 2], [2] * 8, [2] * 8, [2, 2, 3, 3, -1, -1, -1, -1]],
            "subset": [["a"], ["a", "b", "a"], ["a"], ["a"], ["a", "b"]],
        }
    )


def by_loops(model, rows) -> dict[str, tuple[float, int]]:
    """Each predicted token by itself, into the subset of its own document."""
    totals = {"a": [0.0, 0], "b": [0.0, 0]}
    for row in rows:
        names = dict(zip(dict.fromkeys(row["document_ids"]), [*row["subset"], None], strict=False))
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            logs = model(input_ids=ids).logits[0].log_softmax(-1)
        for t in range(7):
            document = row["document_ids"][t + 1]
            if document != -1:
                totals[names[document]][0] -= float(logs[t, row["input_ids"][t + 1]])
                totals[names[document]][1] += 1
    return {name: tuple(total) for name, total in totals.items()}


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_figures_equal_a_loop_over_tokens(batch_size):
    """Catches padding that counts, subsets shifted by a token, and bits per byte from the wrong sizes."""
    model = tiny("llama").eval()
    figures = evaluate(lambda ids: model(input_ids=ids).logits, small_rows(), SIZES, batch_size, CPU)
    expected = by_loops(model, small_rows())
    for name, (loss, tokens) in expected.items():
        got = figures["subsets"][name]
        assert got["tokens"] == tokens
        assert got["loss"] == pytest.approx(loss / tokens, rel=1e-5)
        assert got["perplexity"] == pytest.approx(math.exp(loss / tokens), rel=1e-5)
        per_byte = SIZES[name]["tokens"] / SIZES[name]["bytes"]
        assert got["bits_per_byte"] == pytest.approx(loss / tokens / math.log(2) * per_byte, rel=1e-5)
    loss, tokens = (sum(part) for part in zip(*expected.values(), strict=True))
    assert figures["all"]["loss"] == pytest.approx(loss / tokens, rel=1e-5)
    assert figures["all"]["bits_per_byte"] == pytest.approx(loss / tokens / math.log(2) * 30 / 70, rel=1e-5)


def on_a_rank() -> dict:
    model = tiny("llama").eval()
    return evaluate(lambda ids: model(input_ids=ids).logits, small_rows(), SIZES, 2, CPU)


def test_two_ranks_share_the_rows_and_get_the_figures_of_one(ranks):
    """Five rows in batches of two: one rank has none in the second round, and must not count a row twice."""
    model = tiny("llama").eval()
    alone = evaluate(lambda ids: model(input_ids=ids).logits, small_rows(), SIZES, 2, CPU)
    both = ranks(on_a_rank)
    assert both[0] == both[1]
    assert both[0]["all"] == pytest.approx(alone["all"])


def test_the_command_without_held_out_files_is_refused(corpus, tiny_model, tmp_path, capsys):
    config = config_of(corpus, tmp_path / "run", tiny_model("llama"), deepspeed_json(tmp_path / "ds.json"))
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    with pytest.raises(SystemExit) as stopped:
        main(["--config", str(tmp_path / "c.yaml")])
    assert stopped.value.code == 2
    said = "neither data.eval_files nor data.eval_fraction is set, so there is nothing to evaluate on; set one"
    assert said in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_command_evaluates_a_checkpoint_and_an_exported_model_alike(ranks, corpus, tiny_model, tmp_path, stage):
    """Also: two ranks under the launcher, and the figures that the run itself ended with."""
    config = config_of(
        corpus,
        tmp_path / "run",
        tiny_model("llama"),
        deepspeed_json(tmp_path / "ds.json", stage, optimizer=ADAM),
        max_steps=2,
        data__eval_files=corpus / "documents.jsonl",
        data__max_eval_sequences=9,
        data__prepared_dir=corpus / "prepared_with_eval",
    )
    ranks(run, config)
    at_the_end = json.loads((tmp_path / "run" / "summary.json").read_text())["evaluation_after"]
    options = ["--resume=auto"], [f"--model.name_or_path={tmp_path / 'run' / 'model'}", "--seed=3"]
    for option in options[: 2 if stage == 3 else 1]:
        process = deepspeed("pipeline.evaluate", config, *option)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
        figures = json.loads(re.search(r"^\{.*\}$", output, re.MULTILINE).group())
        assert figures["all"] == pytest.approx(at_the_end["all"], rel=1e-5)
        assert set(figures["subsets"]) == set(load_report(corpus / "prepared_with_eval")["eval"]["subsets"])
    assert len(load_split(Path(config.data.prepared_dir), "eval")) == 9
