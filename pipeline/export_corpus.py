"""The corpus as a run valued it: the input's own records, those worth keeping, each with what became of it.

python -m pipeline.export_corpus RUN_DIR OUTPUT.jsonl [--best 0.5] [--min_score S] [--min_trained F] [...]

OUTPUT ends in .jsonl or .parquet; every record has `influence`: document_id, times_read, times_trained, score, loss.
OUTPUT's name with `.blend.json` holds the documents and tokens kept and the weight of every subset. Exit code 2, with a
message, where there is no run or nothing to keep.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import jsonargparse
from rich.console import Console
from rich.table import Table

from pipeline.config.cli import exit_on_user_error, parse
from pipeline.config.schema import Config
from pipeline.evidence.valued_corpus import Keep, blend, chosen, documents_of, records_of, write
from pipeline.record.starts import config_of_run

FORMATS = (".jsonl", ".parquet")


def main(argv: Sequence[str] | None = None) -> None:
    parser = jsonargparse.ArgumentParser(
        prog="python -m pipeline.export_corpus", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="run directory of a config")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="what is written, .jsonl or .parquet")
    parser.add_class_arguments(Keep)
    arguments = parser.instantiate(parser.parse_args(argv))
    keep = Keep(**{name: getattr(arguments, name) for name in Keep.__dataclass_fields__})
    with exit_on_user_error("pipeline.export_corpus"):
        if arguments.output.suffix not in FORMATS:
            raise ValueError(f"OUTPUT: {arguments.output} ends in neither of {', '.join(FORMATS)}")
        config_of_run(arguments.run_dir)
        config = parse("pipeline.export_corpus", ["--config", str(arguments.run_dir / "config.yaml")], Config)
        documents = documents_of(arguments.run_dir)
        kept = chosen(documents, keep)
        if kept.empty:
            raise ValueError(f"none of {len(documents)} documents is to be kept: ask for less")
        count = write(records_of(config, kept), arguments.output)
        weights = blend(documents, kept)
        arguments.output.with_suffix(".blend.json").write_text(json.dumps(weights, indent=2))
    table = Table(title=f"{arguments.output}: {count} of {len(documents)} documents", title_justify="left")
    for column in ("subset", "documents", "tokens", "kept %", "weight %"):
        table.add_column(column, justify="left" if column == "subset" else "right")
    for subset, row in weights.items():
        shares = (f"{100 * row['kept']:.1f}", f"{100 * row['weight']:.1f}")
        table.add_row(subset, str(row["documents"]), str(row["tokens"]), *shares)
    Console().print(table)


if __name__ == "__main__":
    main()
