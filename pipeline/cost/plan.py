"""What plain steps and scored ones would cost at other sizes: `python -m pipeline.benchmark --plan`.

One micro-batch of one rank is counted (`meta_step.py`), what DeepSpeed adds follows from ZeRO's formulas (arXiv
1910.02054, sections 5 and 7), and the time from the speeds in `benchmark.*`. No process group, no engine, no memory.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import set_checkpoint_early_stop
from transformers import PreTrainedModel

from pipeline.config.deepspeed_json import read_deepspeed_config
from pipeline.config.timing import Stopwatch
from pipeline.cost.config import BenchmarkConfig, BenchmarkRun
from pipeline.cost.measure import BARE, PLAIN, make_scorer, refuse_too_long, variants
from pipeline.cost.meta_step import META, Counted, MetaStep, count
from pipeline.cost.random_tokens import RandomTokens
from pipeline.cost.work import PHASES
from pipeline.influence.scorer import SketchScorer
from pipeline.influence.table import scores_apart
from pipeline.models.load import model_without_weights
from pipeline.models.second_moments import SecondMoments

ASSUMPTIONS = (
    "One rank's share; all ranks alike, none waits for another, collectives have no latency.",
    "Operations, activations and sketches: counted on the forward, backward and estimators of training. Attention by "
    "torch is a fused kernel; nothing else is fused.",
    "Weights, gradients, Adam's numbers and plain training's collectives (rings): ZeRO's formulas. Other work of "
    "DeepSpeed: only the update, which reads and writes each number once. Offloaded: neither transfers nor time.",
    "Plain training's collectives are hidden behind its compute where that is longer; scoring's are not hidden.",
    "Nothing is dropped, so `ghost` corrects nothing. The rows that units are gathered by are in plain steps too.",
)


LOW_TFLOPS = 989.0
"""Of an H100 in bf16 and fp16, dense."""


@dataclass(frozen=True)
class Cluster:
    """What a plan is for, out of the DeepSpeed JSON and `benchmark.ranks`."""

    ranks: int
    stage: int
    precision: str
    micro_batch: int
    accumulation: int
    host: frozenset[str]
    """`weights`, `optimizer`: what is offloaded to the host's memory."""
    bucket: int
    """Numbers in DeepSpeed's reduction buffers."""
    gathered: int
    """Most numbers of weights that ZeRO-3 has whole at a time."""
    reused: int
    """ZeRO-3 does not give a weight back that is used again before so many numbers of weights are."""

    @property
    def number(self) -> int:
        """Bytes of a weight, and of a gradient, in the precision of training."""
        return 4 if self.precision == "fp32" else 2


def cluster_of(config: BenchmarkRun) -> Cluster:
    """Raises ValueError where its optimizer is not one that it knows."""
    settings = read_deepspeed_config(config)
    optimizer = settings["optimizer"].get("type", "")
    if optimizer.lower() not in ("adam", "adamw"):
        raise ValueError(
            f"--plan knows what Adam and AdamW keep, not '{optimizer}': choose one of them in {config.deepspeed_config}"
        )
    zero = settings.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    low = [key for key in ("bf16", "fp16") if settings.get(key, {}).get("enabled")]
    offloaded = {"weights": "offload_param", "optimizer": "offload_optimizer"}
    buffers = 2 if zero.get("overlap_comm") and stage < 3 else 1
    return Cluster(
        ranks=config.benchmark.ranks,
        stage=stage,
        precision=low[0] if low else "fp32",
        micro_batch=settings["train_micro_batch_size_per_gpu"],
        accumulation=settings["gradient_accumulation_steps"],
        host=frozenset(what for what, key in offloaded.items() if zero.get(key, {}).get("device", "none") != "none"),
        bucket=buffers * int(zero.get("reduce_bucket_size", 5e8)) if stage else 0,
        gathered=int(zero.get("stage3_max_live_parameters", 1e9)) if stage == 3 else 0,
        reused=int(zero.get("stage3_max_reuse_distance", 1e9)),
    )


def states(parameters: int, cluster: Cluster) -> dict[str, float]:
    """Bytes of one rank's share of what lasts from step to step.

    Adam keeps two numbers of 4 bytes a parameter, and, but for float32 at ZeRO 0, its own copy of the weight beside
    them: 2 + 2 + 12 bytes a parameter in 16 bits, 4 + 4 + 12 in float32. Stage 1 divides the 12 by the ranks, 2 also
    the gradients, 3 also the weights.
    """
    kept = 8 if cluster.precision == "fp32" and cluster.stage == 0 else 12
    shares = [1 if cluster.stage < first else cluster.ranks for first in (3, 2, 1)]
    each = {"weights": cluster.number, "gradients": cluster.number, "optimizer": kept}
    return {name: parameters * size / share for (name, size), share in zip(each.items(), shares, strict=True)}


def buffers(parameters: int, cluster: Cluster) -> int:
    """Bytes of DeepSpeed's reduction buffers and, under ZeRO-3, of whole weights, at most."""
    return cluster.number * (cluster.bucket + min(parameters, cluster.gathered))


def update_bytes(parameters: int, cluster: Cluster) -> float:
    """Bytes that the optimizer reads and writes: each number of its own both ways, the gradient in, the weight out."""
    if "optimizer" in cluster.host:
        return 0.0
    mine = parameters / (cluster.ranks if cluster.stage else 1)
    return 2 * states(parameters, cluster)["optimizer"] + 2 * cluster.number * mine


def plain_wire(parameters: int, cluster: Cluster) -> dict[str, float]:
    """Bytes that a rank hands to each kind of collective in an optimizer step, of n for all weights or gradients.

    Stages 0 to 2 all-reduce the gradients (so DeepSpeed does it, where the paper has a reduce-scatter), 0 and 1 once a
    step, 2 once a micro-batch; 1 and 2 then gather the updated weights, n / ranks from each. Stage 3 reduce-scatters
    the gradients of every micro-batch and gathers the weights for its forward and, but for the last ones, which are
    used again soon, for its backward.
    """
    whole, times = parameters * cluster.number, cluster.accumulation
    if cluster.ranks == 1:
        return {}
    if cluster.stage == 3:
        gathered = 2 * parameters - min(parameters, cluster.reused // 2)
        return {"all_gather": times * cluster.number * gathered / cluster.ranks, "reduce_scatter": times * whole}
    reduced = {"all_reduce": whole * (times if cluster.stage == 2 else 1)}
    return reduced | ({"all_gather": whole / cluster.ranks} if cluster.stage else {})


def sent(wire: Mapping[str, float], ranks: int) -> float:
    """Bytes that a rank sends for what it hands over, by ring algorithms."""
    passed_on = {"all_reduce": 2 * (ranks - 1) / ranks, "all_gather": ranks - 1, "reduce_scatter": (ranks - 1) / ranks}
    return sum(passed_on[kind] * size for kind, size in wire.items())


@dataclass(frozen=True)
class Speeds:
    """What is reached, in operations and bytes a second."""

    low: float
    """Matrix products in 16 bits,"""
    full: float
    """and in float32."""
    memory: float
    network: float


def speeds_of(assumed: BenchmarkConfig, cluster: Cluster) -> Speeds:
    """From the config's peaks and utilization."""
    low, full = LOW_TFLOPS, assumed.fp32_tflops
    if assumed.peak_tflops:
        low, full = (low, assumed.peak_tflops) if cluster.precision == "fp32" else (assumed.peak_tflops, full)
    reached = assumed.utilization
    return Speeds(
        low * 1e12 * reached,
        full * 1e12 * reached,
        assumed.memory_gb_per_second * 1e9 * reached,
        assumed.network_gb_per_second * 1e9 * reached,
    )


def plan(config: BenchmarkRun) -> dict[str, Any]:
    """What a plain step and a scored one of each kind would cost on `benchmark.ranks` ranks: per rank and optimizer
    step, by the names that `cost.measure` has for what it measures.

    `adam_state`'s reading, which a measured step has whole, is shared out over the steps until the next, and of it only
    the bytes on the wire count. Raises ValueError where config and model do not go together, and for what is not
    reckoned with.
    """
    configs, cluster = variants(config), cluster_of(config)
    if BARE in configs:
        raise ValueError(f"benchmark.estimators: '{BARE}' steps are measured, not planned; leave them out with --plan")
    influence = config.influence
    if influence.reference == "validation" or influence.scope == "step" or scores_apart(influence, config.policy):
        raise ValueError(
            "--plan counts scoring that takes no forward of its own: set influence.reference to batch or "
            "running, influence.scope to micro_step, influence.passes to one and policy.rule to another than top"
        )
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(cluster.precision, torch.float32)
    model = model_without_weights(config.model, dtype)
    refuse_too_long(model, config.data.sequence_length)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    samples = RandomTokens(model.config.vocab_size, config.data.sequence_length, config.seed)
    batch = samples.batch_at(list(range(cluster.micro_batch)), META)

    counted, reduced, wires = {}, {}, {}
    for name, own in configs.items():
        summed: list[int] = []
        scorer = make_scorer(name, own, model, META, Stopwatch(torch.device("cpu")), partial(_count, summed))
        read = 0.0
        if own.influence.precondition == "adam_state":
            means = {weight: _means(shape) for weight, shape in _matrices(model).items()}
            assert isinstance(scorer, SketchScorer)
            with MetaStep(model):  # answers for values that are not there
                scorer.precondition(SecondMoments(means, 0.999, 1000))  # of any decay: what is counted is the same
            numbers = sum(sum(shape) + 1 for shape in _matrices(model).values())
            read = numbers / own.influence.adam_every_steps / cluster.accumulation
        # ZeRO-3's own linear function saves what it needs after its product: a block is recomputed to its end.
        with set_checkpoint_early_stop(cluster.stage < 3):
            if own.influence.precondition == "adam_ema":  # scales from the second micro-batch on
                count(model, batch, scorer)
            summed.clear()
            counted[name] = count(model, batch, scorer)
        reduced[name] = sum(summed)
        wires[name] = 4 * (reduced[name] + read) if cluster.ranks > 1 else 0.0

    lasting, buffer = states(parameters, cluster), buffers(parameters, cluster)
    resident = buffer + sum(size for name, size in lasting.items() if name not in cluster.host)
    speeds = speeds_of(config.benchmark, cluster)
    rows = {name: _figures(one, resident, cluster.accumulation, speeds) for name, one in counted.items()}
    plain, wire = rows.pop(PLAIN), plain_wire(parameters, cluster)
    plain["seconds"] |= {
        "update": update_bytes(parameters, cluster) / speeds.memory,
        "wire": sent(wire, cluster.ranks) / speeds.network,
    }
    compute = sum(plain["seconds"].values()) - plain["seconds"]["wire"]
    plain |= {"wire_bytes": wire, "step_seconds": max(compute, plain["seconds"]["wire"])}
    for name, row in rows.items():
        row |= _compared(row, plain, reduced[name], wires[name], cluster, speeds)
    return {
        "setting": _setting(config, cluster, parameters),
        "states_bytes": lasting,
        "on_host": sorted(cluster.host),
        "buffer_bytes": buffer,
        "plain": plain,
        "estimators": rows,
        "speeds": {key: getattr(speeds, key) for key in ("low", "full", "memory", "network")},
        "assumptions": list(ASSUMPTIONS),
    }


def _count(summed: list[int], tensor: Tensor) -> Tensor:
    """In place of the ranks' sum: only how much it would be of."""
    summed.append(tensor.numel())
    return tensor


def _matrices(model: PreTrainedModel) -> dict[str, torch.Size]:
    return {name: weight.shape for name, weight in model.named_parameters() if weight.ndim == 2}


def _means(shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Of one matrix, as `engine.second_moments` has them."""
    return torch.empty(shape[0], device=META), torch.empty(shape[1], device=META)


def _figures(counted: Counted, resident: float, accumulation: int, speeds: Speeds) -> dict[str, Any]:
    """Of one kind of step by itself."""
    work, products = counted.work, counted.work.flops.total()
    return {
        "gflop": {phase: accumulation * work.flops[phase] / 1e9 for phase in PHASES},
        "gflop_float32": accumulation * (products - work.low_flops) / 1e9,
        "other_giga_elements": {phase: accumulation * work.elements[phase] / 1e9 for phase in PHASES},
        "other_bytes": accumulation * work.traffic,
        "launches": {phase: accumulation * work.launches[phase] for phase in PHASES},
        "activation_bytes": counted.activations,
        "held_bytes": counted.held,
        "peak_memory_bytes": resident + counted.peak,
        "seconds": {
            "products": accumulation * (work.low_flops / speeds.low + (products - work.low_flops) / speeds.full),
            "other": accumulation * work.traffic / speeds.memory,
        },
    }


def _compared(
    row: dict[str, Any], plain: dict[str, Any], reduced: int, wire: float, cluster: Cluster, speeds: Speeds
) -> dict[str, Any]:
    """Beside plain steps. `reduced`: numbers of a sample's sketch; `wire`: bytes of scoring per micro-batch."""
    flops, base = sum(row["gflop"].values()), sum(plain["gflop"].values())
    elements, base_elements = (sum(one["other_giga_elements"].values()) for one in (row, plain))
    seconds = {part: row["seconds"][part] - plain["seconds"][part] for part in ("products", "other")}
    seconds["wire"] = sent({"all_reduce": wire * cluster.accumulation}, cluster.ranks) / speeds.network
    return {
        "bytes_per_micro_batch": wire,
        "sketch_bytes": 4 * reduced * cluster.micro_batch,
        "scoring_gflop": flops - base,
        "scoring_flop_ratio": flops / base,
        "scoring_other_giga_elements": elements - base_elements,
        "scoring_other_ratio": elements / base_elements,
        "scoring_launches": sum(row["launches"].values()) - sum(plain["launches"].values()),
        "peak_memory_ratio": row["peak_memory_bytes"] / plain["peak_memory_bytes"],
        "scoring_seconds": seconds,
        "step_time_ratio": 1 + sum(seconds.values()) / plain["step_seconds"],
    }


def _setting(config: BenchmarkRun, cluster: Cluster, parameters: int) -> dict[str, Any]:
    """What the figures are of."""
    influence = config.influence
    return {
        "model": config.model.name_or_path,
        "parameters": parameters,
        "sequence_length": config.data.sequence_length,
        "micro_batch": cluster.micro_batch,
        "gradient_accumulation_steps": cluster.accumulation,
        "ranks": cluster.ranks,
        "zero_stage": cluster.stage,
        "precision": cluster.precision,
        "activation_checkpointing": config.model.activation_checkpointing,
        "sketch": influence.sketch if influence.sketch == "none" else vars(influence.sketch),
    }
