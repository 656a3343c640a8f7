"""Held-out loss, perplexity and bits per byte (of a classifier accuracy), in total and per subset.

python -m pipeline.evaluate --config FILE.yaml                                    the config's model
python -m pipeline.evaluate --config FILE.yaml --model.name_or_path DIR           any Hugging Face directory
deepspeed --module pipeline.evaluate --config FILE.yaml --resume auto             a run's newest checkpoint
"""

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.config.cli import exit_on_user_error, parse
from pipeline.config.deepspeed_json import read_deepspeed_config
from pipeline.config.schema import Config
from pipeline.data.prepared import load_answers
from pipeline.engine import collectives, launch
from pipeline.engine.checkpoint_files import load_weights
from pipeline.engine.checkpoints import find_checkpoint
from pipeline.models.load import load_model
from pipeline.record.headline import TEXT, headline
from pipeline.training.defaults import defaults
from pipeline.training.evaluation import held_out
from pipeline.training.preparing import prepare_on_rank_0
from pipeline.training.rules import check_run


def main(argv: list[str] | None = None) -> None:
    config = parse("pipeline.evaluate", argv, Config, check_run, fill=defaults)
    with exit_on_user_error("pipeline.evaluate"):
        if not config.data.holds_out:
            raise ValueError(
                "neither data.eval_files nor data.eval_fraction is set, so there is nothing to evaluate on; set one"
            )
        device = launch.join_process_group()
        prepare_on_rank_0(config)
        checkpoint = collectives.broadcast(collectives.on_rank_0(lambda: find_checkpoint(config)))
        model = load_model(config.model, config.seed, answers=load_answers(config.data.prepared_dir)).eval()
        if checkpoint:
            load_weights(model, checkpoint)
    model.to(device)
    figures = held_out(model, config, read_deepspeed_config(config)["train_micro_batch_size_per_gpu"])
    if collectives.rank() == 0:
        name = str(checkpoint or config.model.name_or_path)
        print_figures(name, figures)
        print(json.dumps({"model": name, **figures}))
    collectives.leave()


def print_figures(title: str, figures: dict[str, Any]) -> None:
    table = Table(title=title, title_justify="left")
    table.add_column("subset")
    shown = headline(figures["all"])
    columns = {"loss": 4} | ({"perplexity": 2} if shown == TEXT else {}) | {shown.key: 4}
    for column in ("tokens" if shown == TEXT else "texts", *columns):
        table.add_column(shown.short if column == shown.key else column, justify="right")
    for name, row in [*figures["subsets"].items(), ("all", figures["all"])]:
        table.add_row(name, str(row["tokens"]), *(f"{row[key]:.{digits}f}" for key, digits in columns.items()))
    Console().print(table)


if __name__ == "__main__":
    main()
