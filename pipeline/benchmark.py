"""The cost of knowing: plain and scored steps of one engine by turns, on random tokens.

deepspeed --num_accelerators 2 --module pipeline.benchmark --config launch/benchmark_125m.yaml

Writes RUN_DIR/benchmark.json (with `benchmark.sweep` also sweep.json and sweep.png) and prints its tables. Scored steps
write ledger and TensorBoard, plain ones nothing.

python -m pipeline.benchmark --config F --plan --model.name_or_path launch/models/llama_70b.json --benchmark.ranks 64

runs nothing: it reckons what the like would cost, and writes RUN_DIR/plan.json.
"""

import json
import sys
from pathlib import Path
from typing import Any

from pipeline.config.cli import exit_on_user_error, parse
from pipeline.config.schema import Config
from pipeline.cost.measure import measure
from pipeline.cost.plan import plan
from pipeline.cost.sweep import sweep
from pipeline.cost.tables import print_plan, print_sweep, print_tables
from pipeline.engine import collectives, lost_contact
from pipeline.evidence import figures


def run(config: Config) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Measure, sweep where asked to, and write both into RUN_DIR on rank 0. Collective."""
    with exit_on_user_error("pipeline.benchmark"):
        found = measure(config)
        _write(config, "benchmark.json", json.dumps(found, indent=2).encode())
        rows = sweep(config) if config.benchmark.sweep else []
    if rows:
        _write(config, "sweep.json", json.dumps(rows, indent=2).encode())
        _write(config, "sweep.png", figures.sweep(rows))
    return found, rows


def _write(config: Config, name: str, content: bytes) -> None:
    if collectives.rank() == 0:
        Path(config.run_dir).mkdir(parents=True, exist_ok=True)
        Path(config.run_dir, name).write_bytes(content)


def main(argv: list[str] | None = None) -> None:
    options = sys.argv[1:] if argv is None else argv
    config = parse(
        "pipeline.benchmark",
        [option for option in options if option != "--plan"],
        epilog="--plan: run nothing, reckon what it would cost on benchmark.ranks ranks; any model, no launcher.",
    )
    if "--plan" in options:
        with exit_on_user_error("pipeline.benchmark"):
            planned = plan(config)
        _write(config, "plan.json", json.dumps(planned, indent=2).encode())
        print_plan(planned)
        return
    with lost_contact.exit_on_lost_contact("pipeline.benchmark"):
        found, rows = run(config)
    if collectives.rank() == 0:
        print_tables(found)
        if rows:
            print_sweep(rows)
    collectives.leave()


if __name__ == "__main__":
    main()
