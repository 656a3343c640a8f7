"""A checkpoint as a Hugging Face directory: weights, tokenizer, generation config, model card.

python -m pipeline.export RUN_DIR/checkpoints/step-N DIR     or checkpoints/best, checkpoints/latest

The run's own config says the rest. Exit code 2, with a message, where the checkpoint is none or not whole, or DIR has
something in it.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow.compute as pc

from pipeline.config.cli import exit_on_user_error, parse
from pipeline.config.schema import Config
from pipeline.data.prepared import load_answers
from pipeline.engine import checkpoint_files
from pipeline.engine.checkpoints import find_checkpoint
from pipeline.models.load import load_model
from pipeline.record import ledger
from pipeline.record.model_card import model_card
from pipeline.record.starts import config_of_run
from pipeline.training.export import save_model
from pipeline.training.opening import policy_in_words


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m pipeline.export", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("checkpoint", type=Path, metavar="RUN_DIR/checkpoints/step-N")
    parser.add_argument("directory", type=Path, metavar="DIR", help="what is written")
    arguments = parser.parse_args(argv)
    checkpoint, directory = arguments.checkpoint.resolve(), arguments.directory
    if checkpoint.name in ("best", "latest") and checkpoint.is_file():  # files that name one
        checkpoint = checkpoint.parent / checkpoint.read_text().strip()
    with exit_on_user_error("pipeline.export"):
        if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
            raise ValueError(f"{directory} exists and is no empty directory; name another one")
        if not checkpoint.name.startswith("step-"):
            raise ValueError(f"{checkpoint} is no checkpoint; give RUN_DIR/checkpoints/step-N")
        run_dir = checkpoint.parents[1]
        config_of_run(run_dir)
        config = parse("pipeline.export", ["--config", str(run_dir / "config.yaml")], Config)
        find_checkpoint(replace(config, resume=str(checkpoint)))
        model = load_model(config.model, config.seed, answers=load_answers(config.data.prepared_dir))
        checkpoint_files.load_weights(model, checkpoint)
        step = int(checkpoint.name.removeprefix("step-"))
        rows = ledger.read(run_dir).filter(pc.field("step") <= step)
        evaluations = checkpoint_files.checkpoint_evaluations(checkpoint)
        save_model(model, config, directory, model_card(config, rows, step, evaluations, policy_in_words(config)))
    print(directory)


if __name__ == "__main__":
    main()
