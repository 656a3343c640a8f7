"""Prepare a dataset and say what is in it.

python -m pipeline.prepare --config run.yaml
python -m pipeline.prepare --config run.yaml --shard 3/16     a sixteenth of the training files, on a host of its own
python -m pipeline.prepare --config run.yaml --merge 16       all of them together

Training does so by itself where the directory is missing; what is in it: pipeline/data/prepared.py.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from pipeline.config.cli import exit_on_user_error, parse
from pipeline.config.schema import Config
from pipeline.data.overlap import in_words
from pipeline.data.prepared import load_report, prepare
from pipeline.data.shards import Shard, merge, prepare_shard
from pipeline.influence.table import check_config
from pipeline.training.defaults import defaults

# The command


def _table(report: dict[str, Any]) -> str:
    lines = [f"{'':5} {'subset':24} {'documents':>12} {'tokens':>16} {'MB':>10}"]
    for split, part in report.items():
        for name, counts in [*part["subsets"].items(), ("all", part)]:
            size = f"{counts['documents']:12,} {counts['tokens']:16,} {counts['bytes'] / 1e6:10,.2f}"
            lines.append(f"{split:5} {name:24} {size}")
        lines += [
            f"{split:5} source {name}: {source['sequences']:,} sequences, {source['documents']:,} documents, "
            f"{source['tokens']:,} tokens"
            for name, source in part.get("sources", {}).items()
        ]
        lines.append(f"{split:5} {part['sequences']:,} sequences, {part['padding']:,} tokens of padding")
        if part.get("frame"):
            share = part["frame"] / max(part["tokens"], 1)
            lines.append(f"{split:5} {part['frame']:,} tokens ({share:.1%}) only divide documents (data.bos, data.eos)")
        lines += [f"{split:5} planted: {count:,} x {kind}" for kind, count in part.get("planted", {}).items()]
        lines += [f"{split:5} left out: {count:,} x {what}" for what, count in part["problems"].items()]
    return "\n".join([*lines, *in_words(report)])


def main(argv: Sequence[str] | None = None) -> None:
    """Prepare `data.prepared_dir` and print what is in it. Exits with code 2 and a message on a user's error."""
    parts = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    which = parts.add_mutually_exclusive_group()
    which.add_argument("--shard")
    which.add_argument("--merge", type=int)
    arguments, options = parts.parse_known_args(argv)
    config = parse(
        "pipeline.prepare",
        options,
        Config,
        check_config,
        epilog="--shard NUMBER/OF: only every OF-th training file, from the NUMBER-th on, into PREPARED_DIR.shards; "
        "--merge OF: put these together into PREPARED_DIR, reading and writing nothing anew.",
        fill=defaults,
    )
    with exit_on_user_error("pipeline.prepare"):
        if arguments.shard is not None:
            config = prepare_shard(config, Shard.parse(arguments.shard))
        elif arguments.merge is not None:
            merge(config, arguments.merge)
        else:
            prepare(config)
        print(_table(load_report(config.data.prepared_dir)))


if __name__ == "__main__":
    main()
