"""The cost of knowing: plain and scored steps of one engine by turns, on random tokens.

deepspeed --num_accelerators 2 --module pipeline.benchmark --config launch/benchmark_125m.yaml

Writes RUN_DIR/benchmark.json and prints its tables. Scored steps write ledger and TensorBoard, plain ones nothing.

python -m pipeline.benchmark --config F --plan --model.name_or_path launch/models/llama_70b.json --benchmark.ranks 64

runs nothing: it estimates the cost elsewhere, and writes RUN_DIR/plan.json.
"""

import json
import sys
from pathlib import Path
from typing import Any

from pipeline.config.cli import exit_on_user_error, parse
from pipeline.cost.config import BenchmarkRun
from pipeline.cost.measure import measure
from pipeline.cost.plan import plan
from pipeline.cost.tables import print_plan, print_tables
from pipeline.engine import collectives
from pipeline.engine.json_check import check_deepspeed_json
from pipeline.engine.lost_contact import exit_on_lost_contact


def run(config: BenchmarkRun) -> dict[str, Any]:
    """Measure, and write it into RUN_DIR on rank 0. Collective."""
    with exit_on_user_error("pipeline.benchmark"):
        found = measure(config)
    _write(config, "benchmark.json", found)
    return found


def _write(config: BenchmarkRun, name: str, content: dict[str, Any]) -> None:
    if collectives.rank() == 0:
        Path(config.run_dir).mkdir(parents=True, exist_ok=True)
        Path(config.run_dir, name).write_text(json.dumps(content, indent=2))


def main(argv: list[str] | None = None) -> None:
    options = sys.argv[1:] if argv is None else argv
    config = parse(
        "pipeline.benchmark",
        [option for option in options if option != "--plan"],
        BenchmarkRun,
        check_deepspeed_json,
        epilog="--plan: run nothing, estimate the cost on benchmark.ranks ranks; any model, no launcher.",
    )
    if "--plan" in options:
        with exit_on_user_error("pipeline.benchmark"):
            planned = plan(config)
        _write(config, "plan.json", planned)
        print_plan(planned)
        return
    with exit_on_lost_contact("pipeline.benchmark"):
        found = run(config)
    if collectives.rank() == 0:
        print_tables(found)
    collectives.leave()


if __name__ == "__main__":
    main()
