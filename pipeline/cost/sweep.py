"""How the cost of scoring grows: the benchmark again with one size of model or sketch changed at a time."""

import gc
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.config.schema import Config, SketchConfig
from pipeline.cost.measure import measure
from pipeline.engine import collectives, launch

# What architectures call the same thing, in their config.json.
_LAYERS = ("num_layers", "n_layer", "num_hidden_layers")


_WIDTHS = ("hidden_size", "n_embd", "intermediate_size", "n_inner")


_HEADS = ("num_heads", "n_head", "num_attention_heads")


def sweep(config: Config) -> list[dict[str, Any]]:
    """A row for each size with `benchmark.sweep`'s factors: `tokens` (of a sequence), `layers`, `width`, `vocabulary`,
    `sketch` (its width G, all widths being scaled alike); and one for the number of `ranks`, beside those that earlier
    sweeps into this RUN_DIR left of other numbers. Rank 0's; rows at factor 1 are measured once. Collective.

    Raises ValueError where the model is no config to start from scratch, whose sizes can be changed.
    """
    assert config.benchmark.sweep
    launch.join_process_group()
    first = config.benchmark.estimators[:1] if config.benchmark.estimators else None
    base = replace(config, benchmark=replace(config.benchmark, estimators=first, sweep=None))
    rows, known = [], {}
    for dimension, size, settings, point in _points(base, config.benchmark.sweep):
        key = json.dumps([settings, point.data.sequence_length, str(point.influence.sketch)], sort_keys=True)
        if key not in known:
            # All ranks read what rank 0 writes.
            file = Path(config.run_dir, "sweep", f"{dimension}-{size}.json")
            if collectives.rank() == 0:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(settings, indent=2) + "\n")
            collectives.barrier()
            known[key] = measure(replace(point, model=replace(point.model, name_or_path=str(file))))
            gc.collect()  # engines hold themselves in cycles
        rows.append(_row(dimension, size, known[key]))
    return rows + _of_other_ranks(config, rows[-1])


def _of_other_ranks(config: Config, own: dict[str, Any]) -> list[dict[str, Any]]:
    """What is in sweep.json of the same model, estimator and sketch on other numbers of ranks."""
    file, alike = Path(config.run_dir, "sweep.json"), ("dimension", "estimator", "parameters", "scoring_gflop")
    earlier = json.loads(file.read_text()) if file.exists() else []
    return [row for row in earlier if row["size"] != own["size"] and all(row[key] == own[key] for key in alike)]


def _points(config: Config, factors: list[float]) -> Iterator[tuple[str, int, dict[str, Any], Config]]:
    """Dimension, size, settings of the model and the config otherwise."""
    if not config.model.name_or_path.endswith(".json"):
        raise ValueError("benchmark.sweep needs a model config (*.json) as model.name_or_path, to change its sizes")
    settings = json.loads(Path(config.model.name_or_path).read_text())
    if "attention_types" in settings:
        settings.pop("attention_layers", None)  # the same, written out
    influence, sketch = config.influence, config.influence.sketch
    for factor in factors:
        tokens = _scaled(config.data.sequence_length, factor)
        yield "tokens", tokens, settings, replace(config, data=replace(config.data, sequence_length=tokens))
    for factor in factors:
        other = dict(settings)
        if "attention_types" in settings:  # GPT-Neo: patterns, and how often each comes
            other["attention_types"] = [[kinds, _scaled(times, factor)] for kinds, times in settings["attention_types"]]
            layers = sum(len(kinds) * times for kinds, times in other["attention_types"])
        else:
            layers = _scaled(_first(settings, _LAYERS), factor)
        other |= dict.fromkeys([name for name in _LAYERS if name in settings], layers)
        yield "layers", layers, other, config
    for factor in factors:
        heads = _first(settings, _HEADS)
        # Each head keeps an even number of columns, which rotary positions want.
        widths = {
            name: 2 * heads * _scaled(settings[name], factor / (2 * heads)) for name in _WIDTHS if settings.get(name)
        }
        yield "width", _first(widths, _WIDTHS), settings | widths, config
    for factor in factors:
        vocabulary = _scaled(settings["vocab_size"], factor)
        yield "vocabulary", vocabulary, settings | {"vocab_size": vocabulary}, config
    for factor in factors if sketch != "none" else []:
        scaled = SketchConfig(**{name: _scaled(width, factor) for name, width in vars(sketch).items()})
        yield "sketch", scaled.gradients, settings, replace(config, influence=replace(influence, sketch=scaled))
    yield "ranks", collectives.world_size(), settings, config


def _scaled(size: int, factor: float) -> int:
    return max(1, round(size * factor))


def _first(settings: dict[str, Any], names: tuple[str, ...]) -> int:
    for name in names:
        if name in settings:
            return settings[name]
    raise ValueError(f"benchmark.sweep: the model config has none of {', '.join(names)}")


def _row(dimension: str, size: int, found: dict[str, Any]) -> dict[str, Any]:
    plain, scored = found["plain"], found["estimators"][found["estimator"]]
    keys = (
        "step_time_ratio_median",
        "step_time_ratio_quartiles",
        "cpu_time_ratio_median",
        "peak_memory_ratio",
        "bytes_per_micro_batch",
        "scoring_gflop",
        "scoring_flop_ratio",
        "scoring_other_giga_elements",
        "scoring_other_ratio",
    )
    return {
        "dimension": dimension,
        "size": size,
        "estimator": found["estimator"],
        "parameters": found["setting"]["parameters"],
        "plain_step_seconds_median": plain["step_seconds_median"],
        "scored_step_seconds_median": scored["step_seconds_median"],
        **{key: scored[key] for key in keys},
    }
