"""What a run leaves for others: a model directory with tokenizer and card, of its end or of any checkpoint."""

from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from pipeline.export import main
from pipeline.record import ledger
from pipeline.train import train
from tests.runs import ADAM, config_of, deepspeed_json, largest_difference, weights

STEPS = 4


@pytest.fixture(scope="module")
def done(ranks, corpus, tiny_model, tmp_path_factory):
    """A run under ZeRO-3 with a checkpoint at step 2, which drops and is evaluated."""
    directory = tmp_path_factory.mktemp("export")
    config = config_of(
        corpus,
        directory / "run",
        tiny_model("llama"),
        deepspeed_json(directory / "ds.json", 3, optimizer=ADAM),
        max_steps=STEPS,
        data__eval_files=corpus / "documents.jsonl",
        data__max_eval_sequences=4,
        data__prepared_dir=directory / "prepared",
        checkpoint__every_steps=2,
        checkpoint__best_of="all",
        observe__eval_every_steps=2,
        policy__rule="rate",
        policy__rate=0.3,
    )
    ranks(train, config)
    return config


def test_the_card_says_what_was_read_and_removed_and_gained(done):
    """Catches figures of another step, and a card that the hub would refuse."""
    card = ModelCard.load(Path(done.run_dir, "model", "README.md"))
    assert card.data.library_name == "transformers"
    rows = ledger.read(Path(done.run_dir))
    removed = rows.num_rows - sum(rows["kept"].to_pylist())
    assert removed > 0
    assert f"Not trained on: {removed} for `rate`." in card.text
    for subset, (units, gone) in ledger.counts_by_subset(rows).items():
        assert f"| {subset} | {units} | {gone} | {gone / units:.1%} |" in card.text
    assert f"{sum(rows['tokens'].to_pylist()):,} tokens were read" in card.text
    assert "drops the lowest 30.0% of the sequences of every global micro-batch" in card.text
    held_out = card.text.split("## Held-out text")[1]
    assert "| all | " in held_out
    assert f"- `{done.data.train_files}`" in held_out


def test_a_checkpoint_becomes_a_directory_that_transformers_reads(done, tmp_path, capsys):
    """Catches the run's last weights in place of the checkpoint's, and a directory without tokenizer or card."""
    checkpoints = Path(done.run_dir, "checkpoints")
    main([str(checkpoints / f"step-{STEPS}"), str(tmp_path / "last")])
    assert largest_difference(weights(tmp_path / "last"), weights(Path(done.run_dir, "model"))) == 0
    main([str(checkpoints / "step-2"), str(tmp_path / "early")])
    assert capsys.readouterr().out.endswith(f"{tmp_path / 'early'}\n")
    assert largest_difference(weights(tmp_path / "early"), weights(tmp_path / "last")) > 0
    for name in ("latest", "best"):
        main([str(checkpoints / name), str(tmp_path / name)])
        meant = {f"step-{STEPS}": "last", "step-2": "early"}[(checkpoints / name).read_text().strip()]
        assert largest_difference(weights(tmp_path / name), weights(tmp_path / meant)) == 0
    text = (tmp_path / "early" / "README.md").read_text()
    rows = ledger.read(Path(done.run_dir)).to_pandas()
    early = rows[rows["step"] <= 2]
    assert f"Not trained on: {int((~early['kept']).sum())} for `rate`." in text
    last = (Path(done.run_dir) / "model" / "README.md").read_text()
    assert (tmp_path / "last" / "README.md").read_text() == last
    assert text.split("## Held-out text")[1] != last.split("## Held-out text")[1]

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "early")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "early")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    made = pipeline("text-generation", model=str(tmp_path / "early"), device=torch.device("cpu"))
    [found] = made("Return the", max_new_tokens=3, do_sample=False)
    assert found["generated_text"].startswith("Return the")


def test_what_is_no_checkpoint_and_a_directory_that_is_in_use_are_refused(done, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("")
    newest = Path(done.run_dir, "checkpoints", f"step-{STEPS}")
    for checkpoint, directory, told in (
        (newest, tmp_path / "mine", "exists and is no empty directory; name another one"),
        (done.run_dir, tmp_path / "new", "is no checkpoint; give RUN_DIR/checkpoints/step-N"),
        (newest.with_name("step-1"), tmp_path / "new", "cannot be used"),
    ):
        with pytest.raises(SystemExit) as exit:
            main([str(checkpoint), str(directory)])
        assert exit.value.code == 2
        assert told in capsys.readouterr().err
        assert not (tmp_path / "new").exists()
