"""The cost of knowing: plain and scored steps of one engine by turns, on random tokens.

deepspeed --num_accelerators 2 --module pipeline.benchmark --config launch/benchmark_125m.yaml

Writes RUN_DIR/benchmark.json and prints its tables. Ledger and TensorBoard, which plain training writes too, are not
part of a step here.
"""

import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from pipeline import collectives, engine
from pipeline.config import Config, InfluenceConfig, exit_on_user_error, parse, read_deepspeed_config, to_yaml
from pipeline.counting import PHASES, PeakMemory, Work, bytes_held
from pipeline.data import Batch, Samples, Unit
from pipeline.estimator import Estimator
from pipeline.exact_ghost import ExactGhost
from pipeline.loss import IGNORE
from pipeline.model import linear_layers, load_model
from pipeline.step import Step
from pipeline.timing import Stopwatch

PLAIN = "plain"
EXACT = "ghost_exact"
_MEMORY_ROUNDS = 3


class RandomTokens(Samples):
    """Sequences of `length` uniform random tokens, a function of (seed, position), each one document."""

    def __init__(self, vocabulary: int, length: int, seed: int) -> None:
        self._vocabulary, self._length, self._seed = vocabulary, length, seed

    def batch_at(self, positions: list[int], device: torch.device) -> Batch:
        rows = [np.random.default_rng([self._seed, p]).integers(self._vocabulary, size=self._length) for p in positions]
        ids_BT = torch.from_numpy(np.stack(rows))
        labels_BT = torch.full_like(ids_BT, IGNORE)
        labels_BT[:, :-1] = ids_BT[:, 1:]
        units = [
            Unit(position, position, (row * self._length, (row + 1) * self._length), [position], "-")
            for row, position in enumerate(positions)
        ]
        return Batch(ids_BT.to(device), labels_BT.to(device), units)


@dataclass(frozen=True)
class Lane:
    """One of the kinds of steps that take turns."""

    take: Step
    estimator: Estimator
    timed: Stopwatch


def variants(config: Config) -> dict[str, Config]:
    """The config of each kind of step by its name, `plain` first. Raises ValueError for what no estimator is called,
    and for what the estimator refuses."""
    influence = config.influence
    own = influence.estimator + ("" if influence.precondition == "none" else f"/{influence.precondition}")
    names = config.benchmark.estimators or [own]
    if own == "none" and not config.benchmark.estimators:
        raise ValueError("influence.estimator 'none' scores nothing; choose what to measure, or benchmark.estimators")
    # An audit is a forward of its own after the step, which nobody asked to measure.
    config = replace(config, observe=replace(config.observe, audit_every_steps=None))
    plain = replace(influence, estimator="none", precondition="none", reference="batch", scope="micro_step")
    found = {PLAIN: replace(config, influence=plain)}
    for name in names:
        estimator, _, precondition = name.partition("/")
        chosen: dict[str, Any] = {
            "estimator": "ghost" if name == EXACT else estimator,
            "precondition": precondition or "none",
        }
        for key, value in chosen.items():
            known = get_args(InfluenceConfig.__annotations__[key])
            if value not in known:
                raise ValueError(f"benchmark.estimators: '{name}': no {key} '{value}'; there are {', '.join(known)}")
        base = plain if estimator == "none" else influence
        found[name] = replace(config, influence=replace(base, **chosen))
    return found


def measure(config: Config) -> dict[str, Any]:
    """What plain steps and scored ones cost; the same on all ranks but for rank 0's own parts and counts. Collective.

    A round is one step of each kind, on the same sequences and from the weights that the last step left; who begins
    changes from round to round. Peak memory and counts come from rounds of their own, which are not timed. Times are
    the slowest rank's, memory the largest's, counts of one rank and optimizer step, in a step in which everything
    that is refreshed every n steps is due (`adam_state`, `validation`).
    """
    kinds = variants(config)
    device = engine.join_process_group()
    world = collectives.world_size()
    collectives.agree({"config": to_yaml(config)})
    backward = next((kind for kind in kinds.values() if kind.influence.estimator == "ghost"), config)
    deepspeed_config = read_deepspeed_config(backward)
    if backward.influence.estimator == "ghost" and deepspeed_config["gradient_accumulation_steps"] > 1:
        raise ValueError(
            f"benchmark: with 'ghost' every micro-batch of a plain step would be a step; set "
            f"gradient_accumulation_steps to 1 in {config.deepspeed_config}"
        )
    model = load_model(config.model, config.seed, deepspeed_config)
    length, longest = config.data.sequence_length, getattr(model.config, "max_position_embeddings", None)
    if longest and length > longest:
        raise ValueError(f"data.sequence_length {length} is more than the {longest} positions of the model")
    samples = RandomTokens(model.config.vocab_size, length, config.seed)
    reference = RandomTokens(model.config.vocab_size, length, config.seed + 1)
    estimators: dict[str, tuple[Estimator, Stopwatch]] = {}
    for name, kind in kinds.items():
        timed = Stopwatch(device)
        if name == EXACT:
            estimator: Estimator = ExactGhost(kind.influence, linear_layers(model), config.seed, device, timed)
        else:
            estimator = Estimator(kind.influence, model, config.seed, device, timed)
        estimators[name] = estimator, timed
    ds_engine = engine.initialize(model, deepspeed_config)
    lanes = {}
    for name, (estimator, timed) in estimators.items():
        compared = reference if kinds[name].influence.reference == "validation" else None
        lanes[name] = Lane(Step(ds_engine, estimator, kinds[name], samples, compared, timed), estimator, timed)
    sequences = lanes[PLAIN].take.size * world * lanes[PLAIN].take.accumulation

    seconds: dict[str, list[float]] = {name: [] for name in lanes}
    parts: dict[str, Counter[str]] = {name: Counter() for name in lanes}
    rounds = range(config.benchmark.warmup + config.benchmark.pairs)
    for round_ in rounds:
        for name, lane in _in_turn(lanes, round_):
            _wait_for_all(device)
            start = time.perf_counter()
            lane.take(round_ + 1, round_ * sequences, False)
            _wait(device)
            elapsed, found = time.perf_counter() - start, lane.timed.read()
            if round_ >= config.benchmark.warmup:
                seconds[name].append(elapsed)
                parts[name].update(found)
    peaks: dict[str, list[float]] = {name: [] for name in lanes}
    for round_ in range(len(rounds), len(rounds) + _MEMORY_ROUNDS):
        for name, lane in _in_turn(lanes, round_):
            _wait_for_all(device)
            with PeakMemory(device) as used:
                lane.take(round_ + 1, round_ * sequences, False)
                _wait(device)
            peaks[name].append(used.peak)
    held = {name: bytes_held(lane.estimator) for name, lane in lanes.items()}
    done, counts = len(rounds) + _MEMORY_ROUNDS, {}
    due = config.influence.adam_every_steps * config.influence.validation_every_steps * done
    for name, lane in lanes.items():
        with Work(ds_engine.module) as counts[name]:
            lane.take(due + 1, done * sequences, False)
        lane.timed.read()

    seconds = _largest_of_ranks(seconds, device)
    # What estimators hold between steps lies there in the plain steps too: each one's own belongs to its own only.
    all_held = sum(held.values())
    memory = {
        name: float(np.median(values)) - all_held + held[name]
        for name, values in _largest_of_ranks(peaks, device).items()
    }
    plain = _of_kind(lanes[PLAIN], seconds[PLAIN], memory[PLAIN], counts[PLAIN], parts[PLAIN], config)
    scored = {
        name: _of_kind(lane, seconds[name], memory[name], counts[name], parts[name], config)
        | _compared(lane, (seconds[name], memory[name], counts[name]), (seconds[PLAIN], memory[PLAIN], counts[PLAIN]))
        | {"held_bytes": held[name]}
        for name, lane in lanes.items()
        if name != PLAIN
    }
    first = next(iter(scored))
    top = ("step_time_ratio_median", "step_time_ratio_quartiles", "peak_memory_ratio", "bytes_per_micro_batch")
    return {
        **{key: scored[first][key] for key in top},
        "estimator": first,
        "pairs": config.benchmark.pairs,
        "plain": plain,
        "estimators": scored,
        "step_seconds": seconds,
        "setting": _setting(config, ds_engine, deepspeed_config, device),
    }


def _in_turn(lanes: Mapping[str, Lane], round_: int) -> list[tuple[str, Lane]]:
    first = round_ % len(lanes)
    return [*lanes.items()][first:] + [*lanes.items()][:first]


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def _wait_for_all(device: torch.device) -> None:
    _wait(device)
    collectives.barrier()
    _wait(device)


def _largest_of_ranks(values: Mapping[str, list[float]], device: torch.device) -> dict[str, list[float]]:
    """Of each rank's values by name. Collective."""
    own_NR = torch.tensor([*values.values()], dtype=torch.float64, device=device)
    largest_NR = collectives.all_gather_rows(own_NR).view(-1, *own_NR.shape).amax(0)
    return dict(zip(values, largest_NR.tolist(), strict=True))


def _of_kind(
    lane: Lane, seconds: list[float], memory: float, work: Work, parts: Counter[str], config: Config
) -> dict[str, Any]:
    """Figures of one kind of step by itself."""
    median = float(np.median(seconds))
    tokens = lane.take.size * lane.take.accumulation * config.data.sequence_length
    # Three times the forward is what the model needs; what is recomputed does not count.
    peak, needed = config.benchmark.peak_tflops, 3 * work.flops["forward"]
    return {
        "step_seconds_median": median,
        "step_seconds_quartiles": np.percentile(seconds, [25, 75]).tolist(),
        "tokens_per_second": tokens * collectives.world_size() / median,
        "model_flops_utilization": needed / median / (peak * 1e12) if peak else None,
        "peak_memory_bytes": memory,
        "gflop": {phase: work.flops[phase] / 1e9 for phase in PHASES},
        "other_giga_elements": {phase: work.elements[phase] / 1e9 for phase in PHASES},
        "wire_bytes": dict(work.wire),
        "seconds_by_part": {part: total / len(seconds) for part, total in parts.items()},
    }


def _compared(
    lane: Lane, own: tuple[list[float], float, Work], plain: tuple[list[float], float, Work]
) -> dict[str, Any]:
    """A scored kind beside the plain one: times by the pairs of a round, counts by their difference."""
    ratios = np.array(own[0]) / np.array(plain[0])
    work, base = own[2], plain[2]
    flops, elements = work.flops.total() - base.flops.total(), work.elements.total() - base.elements.total()
    wire = {kind: work.wire[kind] - base.wire[kind] for kind in sorted({*work.wire, *base.wire})}
    return {
        "step_time_ratio_median": float(np.median(ratios)),
        "step_time_ratio_quartiles": np.percentile(ratios, [25, 75]).tolist(),
        "step_time_ratio_mean": float(sum(own[0]) / sum(plain[0])),
        "peak_memory_ratio": own[1] / plain[1],
        "bytes_per_micro_batch": sum(wire.values()) / lane.take.accumulation,
        "scoring_wire_bytes": {kind: count for kind, count in wire.items() if count},
        "scoring_gflop": flops / 1e9,
        "scoring_flop_ratio": 1 + flops / base.flops.total(),
        "scoring_other_giga_elements": elements / 1e9,
        "scoring_other_ratio": 1 + elements / base.elements.total(),
    }


def _setting(
    config: Config, ds_engine: engine.DeepSpeedEngine, settings: dict[str, Any], device: torch.device
) -> dict[str, Any]:
    """What the figures are of."""
    influence = config.influence
    precisions = [key for key in ("bf16", "fp16") if settings.get(key, {}).get("enabled")]
    return {
        "model": config.model.name_or_path,
        "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in ds_engine.module.parameters()),
        "sequence_length": config.data.sequence_length,
        "micro_batch": ds_engine.train_micro_batch_size_per_gpu(),
        "gradient_accumulation_steps": ds_engine.gradient_accumulation_steps(),
        "ranks": collectives.world_size(),
        "zero_stage": ds_engine.zero_optimization_stage(),
        "precision": precisions[0] if precisions else "fp32",
        "sketch": influence.sketch if influence.sketch == "none" else vars(influence.sketch),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "deepspeed", "transformers")},
    }


def print_tables(found: dict[str, Any]) -> None:
    """The figures on one screen."""
    setting, plain = found["setting"], found["plain"]
    title = (
        f"{setting['model']}: {setting['parameters'] / 1e6:.1f} M parameters, {setting['ranks']} ranks x "
        f"{setting['micro_batch']} x {setting['sequence_length']:,} tokens, ZeRO {setting['zero_stage']}, "
        f"{setting['precision']}, {setting['device']}, {found['pairs']} pairs"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for column in ("step s", "ratio", "quartiles", "tokens/s", "peak GB", "ratio", "GFLOP", "ratio", "MB wire"):
        table.add_column(column, justify="right")
    for name, row in {PLAIN: plain, **found["estimators"]}.items():
        compared = ["", "", "", "", ""]
        if name != PLAIN:
            low, high = row["step_time_ratio_quartiles"]
            compared = [
                f"{row['step_time_ratio_median']:.3f}",
                f"{low:.3f}-{high:.3f}",
                f"{row['peak_memory_ratio']:.3f}",
                f"{row['scoring_flop_ratio']:.4f}",
                f"{row['bytes_per_micro_batch'] / 1e6:.2f}",
            ]
        rate, memory = f"{row['tokens_per_second']:.0f}", f"{row['peak_memory_bytes'] / 1e9:.3f}"
        own = [f"{row['step_seconds_median']:.3f}", rate, memory, f"{sum(row['gflop'].values()):.1f}"]
        table.add_row(name, own[0], *compared[:2], own[1], own[2], compared[2], own[3], *compared[3:])
    parts = Table(title="seconds a step by part of scoring (rank 0, mean)", title_justify="left")
    parts.add_column("")
    names = sorted({part for row in found["estimators"].values() for part in row["seconds_by_part"]})
    for name in names:
        parts.add_column(name, justify="right")
    for name, row in found["estimators"].items():
        parts.add_row(name, *(f"{row['seconds_by_part'].get(part, 0):.4f}" for part in names))
    console = Console()
    for shown in (table, parts):
        console.print(shown)
    phases = ", ".join(f"{phase} {plain['gflop'][phase]:.1f}" for phase in PHASES)
    console.print(f"GFLOP of a plain step and rank: {phases}", highlight=False)
    if plain["model_flops_utilization"] is not None:
        console.print(f"model FLOPs utilization, plain: {plain['model_flops_utilization']:.1%}", highlight=False)


def run(config: Config) -> dict[str, Any]:
    """Measure, and write RUN_DIR/benchmark.json on rank 0. Collective."""
    with exit_on_user_error("pipeline.benchmark"):
        found = measure(config)
    if collectives.rank() == 0:
        directory = Path(config.run_dir)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "benchmark.json").write_text(json.dumps(found, indent=2) + "\n")
    return found


def main(argv: list[str] | None = None) -> None:
    config = parse("pipeline.benchmark", argv)
    with collectives.exit_on_lost_contact("pipeline.benchmark"):
        found = run(config)
    if collectives.rank() == 0:
        print_tables(found)
    collectives.leave()


if __name__ == "__main__":
    main()
