"""What plain steps and scored ones cost: measured by turns on one engine, on random tokens."""

import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import PreTrainedModel

from pipeline.baselines.exact_ghost import ExactGhost
from pipeline.config.cli import to_yaml
from pipeline.config.deepspeed_json import read_deepspeed_config
from pipeline.config.schema_influence import InfluenceConfig
from pipeline.config.timing import Stopwatch, outermost
from pipeline.cost.config import BenchmarkRun
from pipeline.cost.memory import PeakMemory, bytes_held
from pipeline.cost.random_tokens import RandomTokens
from pipeline.cost.work import PHASES, Work
from pipeline.data.batch import IGNORE, Batch
from pipeline.engine import collectives, deepspeed_engine, launch
from pipeline.influence.scorer import AllReduce, Scorer
from pipeline.influence.table import check_config, owns_accumulation, scorer_of
from pipeline.models.load import load_model
from pipeline.record.recorder import Recorder
from pipeline.training.influence_engine import InfluenceEngine

PLAIN = "plain"
EXACT = "ghost_exact"
BARE = "bare"
"""The loop of someone who has nothing of ours."""

_MEMORY_ROUNDS = 5


@dataclass
class Kind:
    """A kind of step, and what was measured of it on this rank."""

    config: BenchmarkRun
    engine: InfluenceEngine
    samples: RandomTokens
    recorder: Recorder | None
    """Of scored steps, on rank 0."""
    bare: deepspeed_engine.DeepSpeedEngine | None = None
    """What `bare` steps take instead of `engine`."""
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)
    parts: Counter[str] = field(default_factory=Counter)
    work: Work | None = None

    def step(self, step: int, position: int) -> None:
        """One step, with what a run takes down of it."""
        engine, rank, world = self.engine, collectives.rank(), collectives.world_size()
        engine.step, engine.position = step - 1, position
        batches = self.samples.micro_batches(position, rank, world, engine.size, engine.micro_batches, launch.device())
        if self.bare:
            _bare_step(self.bare, batches)
            return
        outcome = engine.train_step(batches)
        if self.recorder:
            with engine.timed("ledger, TensorBoard"):
                self.recorder.step(outcome, engine.size * world, {}, {"step": 1.0})


def _bare_step(ds_engine: deepspeed_engine.DeepSpeedEngine, batches: list[Batch]) -> None:
    for batch in batches:
        logits_BTV = ds_engine(input_ids=batch.input_ids_BT, use_cache=False).logits
        loss = F.cross_entropy(logits_BTV.flatten(0, 1).float(), batch.labels_BT.flatten(), ignore_index=IGNORE)
        ds_engine.backward(loss)
        ds_engine.step()


def variants(config: BenchmarkRun) -> dict[str, BenchmarkRun]:
    """The config of each kind of step by its name, `plain` first. Raises ValueError for what no estimator is called,
    and for what the estimator refuses."""
    influence, settings = config.influence, read_deepspeed_config(config)
    own = influence.estimator + ("" if influence.precondition == "none" else f"/{influence.precondition}")
    names = config.benchmark.estimators or [own]
    if own == "none" and not config.benchmark.estimators:
        raise ValueError("influence.estimator 'none' scores nothing; choose what to measure, or benchmark.estimators")
    # An audit is a forward of its own after the step, which nobody asked to measure.
    # Texts would want a tokenizer.
    config = replace(config, observe=replace(config.observe, audit_every_steps=None, log_texts=False))
    plain = replace(
        influence,
        estimator="none",
        precondition="none",
        reference="batch",
        scope="micro_step",
        passes="one",
        score_prefix=1.0,
        reference_model=None,
    )
    rule = replace(config.policy, rule="threshold", pool=None, temperature=0.0) if config.policy.pool else config.policy
    found = {PLAIN: replace(config, influence=plain, policy=rule)}
    for name in names:
        estimator, _, precondition = name.partition("/")
        if estimator in ("rho", "ngram"):
            what = "one forward of its reference model more" if estimator == "rho" else "what reading its counts takes"
            raise ValueError(f"benchmark.estimators: '{estimator}' costs {what}, which is not measured here")
        chosen: dict[str, Any] = {
            "estimator": {EXACT: "ghost", BARE: "none"}.get(name, estimator),
            "precondition": precondition or "none",
        }
        known = get_args(InfluenceConfig.__annotations__["precondition"])
        if chosen["precondition"] not in known:
            raise ValueError(f"benchmark.estimators: '{name}': no '{precondition}'; there are {', '.join(known)}")
        base, policy = (plain, rule) if chosen["estimator"] == "none" else (influence, config.policy)
        found[name] = replace(config, influence=replace(base, **chosen), policy=policy)
        try:
            check_config(found[name], settings)
        except ValueError as error:
            raise ValueError(f"benchmark.estimators: '{name}': {error}") from None
    return found


def measure(config: BenchmarkRun) -> dict[str, Any]:
    """What plain steps and scored ones cost; the same on all ranks but for rank 0's own parts and counts. Collective.

    A round is one step of each kind, on the same sequences, each from the weights that the last one left; who begins
    changes from round to round. Peak memory and counts come from rounds of their own, which are not timed. Times are
    the slowest rank's, memory the largest's; `cpu_time`, that of the process in all its threads, says more than the
    clock where others share the CPU, and nothing of accelerators. Counts are of one rank and optimizer step, one in
    which everything that is refreshed every n steps is due (`adam_state`, `validation`).

    Raises ValueError where config, model and engine do not go together.
    """
    configs = variants(config)
    device = launch.join_process_group()
    collectives.agree({"config": to_yaml(config)})
    with tempfile.TemporaryDirectory() as records:
        return _measure(config, configs, device, Path(records))


def _measure(
    config: BenchmarkRun, configs: dict[str, BenchmarkRun], device: torch.device, records: Path
) -> dict[str, Any]:
    ds_engine, kinds = _prepare(config, configs, device, records)
    sequences = kinds[PLAIN].engine.sequences

    last_timed = config.benchmark.warmup + config.benchmark.pairs
    for round_ in tqdm(range(last_timed), desc="rounds", unit="round", disable=collectives.rank() > 0):
        for kind in _in_turn(kinds, round_):
            _wait_for_all(device)
            start, start_cpu = time.perf_counter(), time.process_time()
            kind.step(round_ + 1, round_ * sequences)
            _wait(device)
            elapsed, elapsed_cpu = time.perf_counter() - start, time.process_time() - start_cpu
            parts = _parts(kind.engine.timed.read())
            if round_ >= config.benchmark.warmup:
                kind.seconds.append(elapsed)
                kind.cpu_seconds.append(elapsed_cpu)
                kind.parts.update(parts)
    last = last_timed + _MEMORY_ROUNDS
    for round_ in range(last_timed, last):
        for kind in _in_turn(kinds, round_):
            _wait_for_all(device)
            with PeakMemory(device) as memory:
                kind.step(round_ + 1, round_ * sequences)
                _wait(device)
            kind.peaks.append(memory.peak)
    held = {name: bytes_held(kind.engine.scorer) for name, kind in kinds.items()}
    due = config.influence.adam_every_steps * config.influence.validation_every_steps * last + 1
    for kind in kinds.values():
        with Work(ds_engine.module) as kind.work:
            kind.step(due, last * sequences)
            if kind.recorder:
                kind.recorder.close()

    figures = {}
    for name, kind in kinds.items():
        kind.seconds, kind.cpu_seconds, kind.peaks = _largest_of_ranks(kind, device)
        # What estimators hold between steps lies there in all steps: each one's own belongs to its own only.
        figures[name] = _figures(kind) | {
            "peak_memory_bytes": float(np.median(kind.peaks)) - sum(held.values()) + held[name],
            "held_bytes": held[name],
        }
    plain = figures.pop(PLAIN)
    for name, row in figures.items():
        row |= _compared(kinds[name], kinds[PLAIN])
        row["peak_memory_ratio"] = row["peak_memory_bytes"] / plain["peak_memory_bytes"]
    first = next(iter(figures))
    top = ("step_time_ratio_median", "step_time_ratio_quartiles", "peak_memory_ratio", "bytes_per_micro_batch")
    return {
        **{key: figures[first][key] for key in top},
        "estimator": first,
        "pairs": config.benchmark.pairs,
        "plain": plain,
        "estimators": figures,
        "step_seconds": {name: kind.seconds for name, kind in kinds.items()},
        "cpu_seconds": {name: kind.cpu_seconds for name, kind in kinds.items()},
        "peak_bytes": {name: kind.peaks for name, kind in kinds.items()},
        "setting": _setting(config, ds_engine, device),
    }


def _prepare(
    config: BenchmarkRun, configs: dict[str, BenchmarkRun], device: torch.device, records: Path
) -> tuple[deepspeed_engine.DeepSpeedEngine, dict[str, Kind]]:
    """One engine, and all kinds of steps on it."""
    ours = [own for own in configs.values() if owns_accumulation(own.influence, own.policy)]
    settings = read_deepspeed_config(config)
    if ours:
        settings["managed_gradient_accumulation"] = False
    if ours and settings["gradient_accumulation_steps"] > 1:
        raise ValueError(
            "benchmark: with estimator 'ghost' or passes 'score_first', every micro-batch of a plain step would be a "
            f"step; set gradient_accumulation_steps to 1 in {config.deepspeed_config}"
        )
    model = load_model(config.model, config.seed, settings)
    length = config.data.sequence_length
    refuse_too_long(model, length)
    samples, other = (RandomTokens(model.config.vocab_size, length, config.seed + n) for n in (0, 1))
    ds_engine = deepspeed_engine.initialize(model, settings)
    kinds = {}
    for name, own in configs.items():
        timed = Stopwatch(device)
        engine = InfluenceEngine(
            ds_engine,
            own.influence,
            own.policy,
            own.seed,
            other if own.influence.reference == "validation" else None,
            norms_every_steps=own.observe.every_steps,
            timed=timed,
            scorer=make_scorer(name, own, model, device, timed, collectives.all_reduce_sum),
        )
        recorder = None
        if name not in (PLAIN, BARE) and collectives.rank() == 0:
            recorder = Recorder(replace(own, run_dir=str(records / name)), samples, 0, quiet=True)
        kinds[name] = Kind(own, engine, samples, recorder, ds_engine if name == BARE else None)
    return ds_engine, kinds


def refuse_too_long(model: PreTrainedModel, length: int) -> None:
    """Raises ValueError for sequences that the model has no positions for."""
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest and length > longest:
        raise ValueError(f"data.sequence_length {length} is more than the {longest} positions of the model; lower it")


def make_scorer(
    name: str, config: BenchmarkRun, model: PreTrainedModel, device: torch.device, timed: Stopwatch, reduce: AllReduce
) -> Scorer:
    """What scores in the kind of step that `variants` calls `name`."""
    if name == EXACT:
        return ExactGhost(model, timed)
    return scorer_of(config.influence, model, config.seed, device, timed, reduce)


def _parts(seconds: dict[str, float]) -> dict[str, float]:
    """Of scoring, each second once: the innermost parts, and what their own surroundings took beside them."""
    inside = {name: sum(outermost(seconds, name).values()) for name in seconds}
    own = {name: value - inside[name] for name, value in seconds.items() if name != "step"}
    return {name.removeprefix("step/"): value for name, value in own.items()}


def _in_turn(kinds: Mapping[str, Kind], round_: int) -> Iterator[Kind]:
    every = list(kinds.values())
    for index in range(len(every)):
        yield every[(round_ + index) % len(every)]


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def _wait_for_all(device: torch.device) -> None:
    _wait(device)
    collectives.barrier()
    _wait(device)


def _largest_of_ranks(kind: Kind, device: torch.device) -> list[list[float]]:
    """Seconds, CPU seconds and peaks. Collective."""
    series = [kind.seconds, kind.cpu_seconds, kind.peaks]
    own_1N = torch.tensor([[value for values in series for value in values]], dtype=torch.float64, device=device)
    largest_N = collectives.all_gather_rows(own_1N).amax(0)
    return [part.tolist() for part in largest_N.split([len(values) for values in series])]


def _figures(kind: Kind) -> dict[str, Any]:
    """Of one kind of step by itself."""
    assert kind.work is not None
    config, median = kind.config, float(np.median(kind.seconds))
    trained = kind.engine.micro_batches // (config.policy.pool or 1)
    tokens = kind.engine.size * trained * config.data.sequence_length
    # Three times the forward is what a model needs; recomputation is not counted in.
    peak, needed = config.benchmark.peak_tflops, 3e-12 * kind.work.flops["forward"]
    return {
        "step_seconds_median": median,
        "step_seconds_quartiles": np.percentile(kind.seconds, [25, 75]).tolist(),
        "tokens_per_second": tokens * collectives.world_size() / median,
        "model_flops_utilization": needed / median / peak if peak else None,
        "gflop": {phase: kind.work.flops[phase] / 1e9 for phase in PHASES},
        "other_giga_elements": {phase: kind.work.elements[phase] / 1e9 for phase in PHASES},
        "launches": {phase: kind.work.launches[phase] for phase in PHASES},
        "wire_bytes": dict(kind.work.wire),
        "seconds_by_part": {part: total / len(kind.seconds) for part, total in kind.parts.items()},
    }


def _compared(kind: Kind, plain: Kind) -> dict[str, Any]:
    """Beside plain steps: times by the pairs of a round, counts by their difference."""
    assert kind.work is not None
    assert plain.work is not None
    flops, base = kind.work.flops.total(), plain.work.flops.total()
    elements, base_elements = kind.work.elements.total(), plain.work.elements.total()
    wire = {name: kind.work.wire[name] - plain.work.wire[name] for name in {*kind.work.wire, *plain.work.wire}}
    return {
        **_ratios("step_time_ratio", kind.seconds, plain.seconds),
        "step_time_ratio_mean": sum(kind.seconds) / sum(plain.seconds),
        **_ratios("cpu_time_ratio", kind.cpu_seconds, plain.cpu_seconds),
        "bytes_per_micro_batch": sum(wire.values()) / kind.engine.micro_batches,
        "scoring_wire_bytes": {name: count for name, count in sorted(wire.items()) if count},
        "scoring_gflop": (flops - base) / 1e9,
        "scoring_flop_ratio": flops / base,
        "scoring_other_giga_elements": (elements - base_elements) / 1e9,
        "scoring_other_ratio": elements / base_elements,
        "scoring_launches": kind.work.launches.total() - plain.work.launches.total(),
    }


def _ratios(key: str, own: list[float], plain: list[float]) -> dict[str, Any]:
    """Median and quartiles of the ratios of a round's two steps."""
    ratios = np.array(own) / np.array(plain)
    return {f"{key}_median": float(np.median(ratios)), f"{key}_quartiles": np.percentile(ratios, [25, 75]).tolist()}


def _setting(config: BenchmarkRun, ds_engine: deepspeed_engine.DeepSpeedEngine, device: torch.device) -> dict[str, Any]:
    """What the figures are of."""
    influence = config.influence
    precision = "bf16" if ds_engine.bfloat16_enabled() else "fp16" if ds_engine.fp16_enabled() else "fp32"
    return {
        "model": config.model.name_or_path,
        "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in ds_engine.module.parameters()),
        "sequence_length": config.data.sequence_length,
        "micro_batch": ds_engine.train_micro_batch_size_per_gpu(),
        "gradient_accumulation_steps": ds_engine.gradient_accumulation_steps(),
        "ranks": collectives.world_size(),
        "zero_stage": ds_engine.zero_optimization_stage(),
        "precision": precision,
        "sketch": influence.sketch if influence.sketch == "none" else vars(influence.sketch),
        "passes": influence.passes,
        "policy": vars(config.policy),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "deepspeed", "transformers")},
    }
