"""Prepare a dataset and say what is in it.

python -m pipeline.prepare --config run.yaml

Training does so by itself where the directory is missing; what is in it: pipeline/data/prepared.py.
"""

from collections.abc import Sequence
from typing import Any

from pipeline.config.cli import exit_on_user_error, parse
from pipeline.config.schema import Config
from pipeline.data.overlap import in_words
from pipeline.data.prepared import load_report, prepare
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
    config = parse("pipeline.prepare", argv, Config, check_config, fill=defaults)
    with exit_on_user_error("pipeline.prepare"):
        prepare(config)
        print(_table(load_report(config.data.prepared_dir)))


if __name__ == "__main__":
    main()
