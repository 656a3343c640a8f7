"""Two proofs that anyone can repeat: nothing was lost or repeated, and nothing depends on where it was computed.

python -m pipeline.verify ledger RUN_DIR...
python -m pipeline.verify invariance --config FILE.yaml [--steps N] [--only TEXT] [--section.key value ...]

`ledger` reads run directories; `invariance` runs the first steps of a config in many ways (see invariance.py).
Exit codes: 0 proven; 1 refuted; 2 nothing to prove, with a message.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.config.cli import exit_on_user_error, parse
from pipeline.config.schema import Config
from pipeline.evidence.invariance import invariance
from pipeline.evidence.ledger_check import check_ledger
from pipeline.training.rules import check_run

# The command


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m pipeline.verify")
    commands = parser.add_subparsers(dest="command", required=True)
    of_ledger = commands.add_parser("ledger", help="prove that no sample was lost or repeated")
    of_ledger.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="run directory of a config")
    of_invariance = commands.add_parser(
        "invariance",
        allow_abbrev=False,
        usage="%(prog)s --config FILE.yaml [--steps N] [--only TEXT] [--timeout S] [--section.key value ...]",
        help="prove that scores and decisions do not depend on ranks, ZeRO stage or launcher",
        epilog="All other options are those of `python -m pipeline.train --help`.",
    )
    of_invariance.add_argument("--steps", type=int, default=3, help="optimizer steps to compare (default: 3)")
    of_invariance.add_argument("--only", default="", help="only the configurations whose name contains this text")
    of_invariance.add_argument("--timeout", type=float, default=1800, help="seconds for one run (default: 1800)")
    arguments, options = parser.parse_known_args(argv)
    if arguments.command == "ledger" and options:
        parser.error(f"unknown options: {' '.join(options)}")
    with exit_on_user_error("pipeline.verify"):
        if arguments.command == "ledger":
            sound = _print_ledgers(arguments.run_dirs)
        else:
            config = parse("pipeline.verify invariance", options, Config, check_run)
            sound = invariance(config, arguments.steps, arguments.only, arguments.timeout)
    sys.exit(0 if sound else 1)


def _print_ledgers(run_dirs: Sequence[str]) -> bool:
    sound = True
    for run_dir in run_dirs:
        summary, violations = check_ledger(Path(run_dir))
        print(f"{run_dir}: {'VIOLATED' if violations else 'OK'}: {summary}", *violations, sep="\n    ")
        sound = sound and not violations
    return sound


if __name__ == "__main__":
    main()
