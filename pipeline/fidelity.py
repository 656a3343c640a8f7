"""Do the scores mean what they say? Every estimator against what samples really do, at the checkpoints of a run.

python -m pipeline.fidelity --config RUN_DIR/config.yaml [--fidelity.key value ...]

One process, no launcher. Scores come from the code that training runs; the references, in float64, from shapley.py.
Writes RUN_DIR/fidelity.json and RUN_DIR/fidelity.png.
"""

import copy
import itertools
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from pipeline import engine
from pipeline.checkpoint import checkpoints_of
from pipeline.checks import EXACT, LAYER_WEIGHTS, read_deepspeed_config
from pipeline.comparison import Comparison, widths
from pipeline.config import Config, InfluenceConfig, exit_on_user_error, parse
from pipeline.data import Batch, Samples
from pipeline.estimator import Estimator
from pipeline.evaluate import load_weights
from pipeline.fidelity_figure import draw
from pipeline.grams import flattened_grams, partial_backward_gram
from pipeline.influence import SecondMoments
from pipeline.loss import IGNORE, token_losses
from pipeline.model import load_model
from pipeline.prepare import ensure_prepared, load_split
from pipeline.shapley import (
    SGD,
    Adam,
    FirstOrderEffect,
    StepEffect,
    inner_products,
    permutation_shapley,
    row_sums,
    sample_gradients,
    trainable,
)
from pipeline.timing import Stopwatch

START = "start"
_WARM_UP_BATCHES = 8  # that running means are made of before they are measured
_WARMED_UP = ("adam_ema", *LAYER_WEIGHTS)
_LAST_BLOCKS = {"residual_last_1": 1, "residual_last_2": 2}
_COMPARISON_ONLY = ("ip", "ghost_flattened", "lai_flattened", "logit_gradient_norm")
_FIRST_ORDER = ("ip_adam", "shapley_adam_limit")
"""References that are also held against the others: how far any gradient can come."""
_OWN_TERMS = (True, False)

Moments = dict[str, dict[str, Tensor]]
Values = dict[tuple[str, bool], Tensor]
"""By reference and whether the own term is in; (B,) each."""


# Scores


def scores_of(estimator: Estimator, model: nn.Module, batch: Batch) -> Tensor:
    """One micro-batch through the estimator as training takes it; (B,) float64, on the CPU."""
    with torch.set_grad_enabled(estimator.needs_backward):
        with estimator.capture():
            logits_BTV = model(input_ids=batch.input_ids_BT, use_cache=False).logits
            losses_BT, feedback = token_losses(logits_BTV, batch.labels_BT, estimator.visit)
        if estimator.needs_backward:
            estimator.watch(batch, losses_BT, float((batch.labels_BT != IGNORE).sum()))
            estimator.backward_to_inputs(losses_BT)
    estimator.add(batch, losses_BT.detach(), feedback)
    return estimator.scores()[0].scores_U.double().cpu()


def second_moments(moments: Moments, beta: float, device: torch.device) -> SecondMoments:
    """As `engine.second_moments` has them: the mean of every row (over its columns) and of every column."""
    updates = int(next(iter(moments.values()))["step"])
    means = {}
    for name, state in moments.items():
        if state["exp_avg_sq"].dim() == 2:
            square = state["exp_avg_sq"].to(device).float() / (1 - beta**updates)
            means[name] = (square.mean(1), square.mean(0))
    return SecondMoments(means, beta, updates)


# References


def reference_values(
    config: Config, model: PreTrainedModel, batch: Batch, adam: Adam | None, learning_rate: float, index: int
) -> tuple[Values, dict[str, Any]]:
    """What each sample of the `index`-th batch does, by every reference that applies, and how Shapley's went."""
    values: Values = {}
    details: dict[str, Any] = {}
    gradients_BP = sample_gradients(model, batch)
    games = {
        "shapley_sgd": (StepEffect, SGD(learning_rate)),
        "shapley_adam": (StepEffect, adam),
        "shapley_adam_limit": (FirstOrderEffect, adam),
    }
    for name in config.fidelity.references:
        if name == EXACT:
            continue  # not of the samples, but of the other form of an estimator
        if name == "ip":
            effects = inner_products(gradients_BP).cpu()
        elif name == "ip_adam":
            if adam is None or adam.step == 0:
                continue  # Adam has no geometry before its first update
            effects = inner_products(gradients_BP, adam.denominator_P).cpu()
        else:
            game, rule = games[name]
            if rule is None or (game is StepEffect and index >= config.fidelity.shapley_batches):
                continue
            started = time.perf_counter()
            estimate = permutation_shapley(
                game(model, batch, gradients_BP, rule),
                len(gradients_BP),
                config.seed,
                config.fidelity.permutations,
                config.fidelity.standard_error,
                lambda effects: torch.stack([row_sums(effects, own) for own in _OWN_TERMS]),
            )
            effects = estimate.effects_nZ
            spreads = [float(row_sums(effects, own).std()) for own in _OWN_TERMS]
            details[name] = {
                "permutations": estimate.permutations,
                "learning_rate": learning_rate,
                "standard_error": {
                    "in" if own else "out": float(errors.max()) / spread if spread else None
                    for own, errors, spread in zip(_OWN_TERMS, estimate.errors_Rn, spreads, strict=True)
                },
                "seconds": round(time.perf_counter() - started, 1),
            }
        values |= {(name, own): row_sums(effects, own) for own in _OWN_TERMS}
    return values, details


def _peak_learning_rate(config: Config) -> float:
    """Of the optimizer and its schedule: what `start`, where no step has set another, is measured with."""
    settings = read_deepspeed_config(config)
    schedule = settings.get("scheduler", {}).get("params", {})
    return schedule.get("warmup_max_lr", settings["optimizer"].get("params", {}).get("lr", 1e-3))


def adam_step(config: Config, model: nn.Module, moments: Moments | None, learning_rate: float) -> Adam | None:
    """The run's Adam with these moments (none: before the first update); None where the run has another optimizer."""
    optimizer = read_deepspeed_config(config)["optimizer"]
    kind, settings = optimizer["type"].lower(), optimizer.get("params", {})
    if kind not in ("adam", "adamw"):
        return None
    parameters = trainable(model)
    zero = {name: {key: torch.zeros_like(p) for key in engine.MOMENTS} for name, p in parameters.items()}
    states = moments or zero
    device = next(iter(parameters.values())).device
    mean_P, square_P = (
        torch.cat([states[name][key].detach().to(device).double().flatten() for name in parameters])
        for key in engine.MOMENTS
    )
    first, second = settings.get("betas", (0.9, 0.999))
    decoupled = kind == "adamw" or settings.get("adam_w_mode", True)
    decay = settings.get("weight_decay", 0.01 if settings.get("torch_adam") and decoupled else 0.0)
    step = int(next(iter(moments.values()))["step"]) if moments else 0
    eps = settings.get("eps", 1e-8)
    return Adam(learning_rate, (first, second), eps, decay, decoupled, mean_P, square_P, step)


# The measurement


def measure(config: Config) -> dict[str, Any]:
    """Hold every estimator against every reference at every checkpoint; write the JSON and the figure.

    Raises ValueError where a checkpoint that the config names is not there or belongs to another model.
    """
    ensure_prepared(config)
    device = engine.device()
    found = checkpoints_of(config.run_dir)
    names = config.fidelity.checkpoints or list(found) or [START]
    if missing := [name for name in names if name not in {START, *found}]:
        raise ValueError(
            f"fidelity.checkpoints: no whole checkpoint {missing[0]} in {config.run_dir}/checkpoints; it has "
            f"{', '.join(found) or 'none'} ({START}: the model that the config names)"
        )
    samples = Samples(load_split(config.data.prepared_dir, "train"), config.seed, "sequence")
    # The same unseen batches for all checkpoints: after what the newest has read.
    first = max((engine.checkpoint_position(path) for path in found.values()), default=0)
    size = config.fidelity.batch_size
    batches = [
        samples.batch(first + index * size, size, device) for index in range(_WARM_UP_BATCHES + config.fidelity.batches)
    ]
    comparisons: dict[tuple[str, ...], Comparison] = {}
    shapley = []
    for checkpoint in tqdm(names, desc="checkpoints"):
        model = load_model(config.model, config.seed).eval()
        moments, learning_rate = None, _peak_learning_rate(config)
        if checkpoint != START:
            load_weights(model, found[checkpoint])
            moments = engine.checkpoint_adam(found[checkpoint])
            learning_rate = engine.checkpoint_learning_rate(found[checkpoint])
        model.to(device)
        exact = copy.deepcopy(model).double()
        adam = adam_step(config, exact, moments, learning_rate)
        values_of_batch = []
        for index, batch in enumerate(batches[_WARM_UP_BATCHES:]):
            values, details = reference_values(config, exact, batch, adam, learning_rate, index)
            values_of_batch.append(values)
            shapley += [
                {"checkpoint": checkpoint, "batch": index, "reference": name, **detail}
                for name, detail in details.items()
            ]
        exact_forms: dict[tuple[str, str, bool], list[Tensor]] = {}
        as_estimators = [
            ((reference, "none", "none"), own, [values[reference, own] for values in values_of_batch])
            for reference in _FIRST_ORDER
            for own in _OWN_TERMS
            if all((reference, own) in values for values in values_of_batch)
        ]
        scored = _all_scores(config, model, exact, batches, moments, adam, device)
        for key, own, scores in itertools.chain(scored, as_estimators):
            name, precondition, sketch = key
            whole = exact_forms.setdefault((name, precondition, own), scores)  # an exact form comes before its sketch
            for values, scores_B, whole_B in zip(values_of_batch, scores, whole, strict=True):
                held = {reference: values_B for (reference, side), values_B in values.items() if side == own}
                if EXACT in config.fidelity.references and sketch != "none":
                    held[EXACT] = whole_B
                for reference, values_B in held.items():
                    where = (checkpoint, *key, reference, "in" if own else "out")
                    pairs = comparisons.setdefault(where, Comparison(*where)).pairs
                    pairs.append((scores_B.numpy(), values_B.numpy()))
    report = {"rows": [comparison.row() for comparison in comparisons.values()], "shapley": shapley}
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "fidelity.json").write_text(json.dumps(report, indent=1))
    draw(config, list(comparisons.values()), run_dir / "fidelity.png")
    return report


def _all_scores(
    config: Config,
    model: PreTrainedModel,
    exact: PreTrainedModel,
    batches: list[Batch],
    moments: Moments | None,
    adam: Adam | None,
    device: torch.device,
) -> Iterator[tuple[tuple[str, str, str], bool, list[Tensor]]]:
    """(estimator, precondition, sketch), whether the own term is in, and the scores of every measured batch."""
    measured = batches[_WARM_UP_BATCHES:]
    second = second_moments(moments, adam.betas[1], device) if moments and adam else None
    matrices: dict[str, list[Tensor]] = defaultdict(list)
    if set(config.fidelity.estimators) & set(_COMPARISON_ONLY):
        for batch in measured:
            found = flattened_grams(model, batch) | {"ip": inner_products(sample_gradients(exact, batch))}
            for name, matrix_BB in found.items():
                matrices[name].append(matrix_BB.double().cpu())
    for entry in config.fidelity.estimators:
        name, _, form = entry.partition("/")
        weights, precondition = (form, "none") if form in LAYER_WEIGHTS else ("none", form or "none")
        if form in ("adam_state", "gains") and second is None:
            continue  # no optimizer state to go by
        if name in _LAST_BLOCKS:
            means = second.means if second and form else None
            grams = [partial_backward_gram(model, batch, _LAST_BLOCKS[name], means) for batch in measured]
            for own in _OWN_TERMS:
                yield (name, precondition, "none"), own, [row_sums(gram.double().cpu(), own) for gram in grams]
            continue
        for own in _OWN_TERMS:
            if name in _COMPARISON_ONLY:
                alone = name == "logit_gradient_norm"
                yield (name, "none", "none"), own, [row_sums(matrix, own or alone) for matrix in matrices[name]]
                continue
            for influence in _forms(config, name, precondition, weights, own):
                estimator = Estimator(influence, model, config.seed, device, Stopwatch(device))
                if estimator.needs_second_moments and second:
                    estimator.precondition(second)
                for batch in batches[:_WARM_UP_BATCHES] if form in _WARMED_UP else []:
                    scores_of(estimator, model, batch)
                scores = [scores_of(estimator, model, batch) for batch in measured]
                label = name if weights == "none" else entry
                yield (label, precondition, widths(influence)), own, scores


def _forms(config: Config, name: str, precondition: str, weights: str, own: bool) -> list[InfluenceConfig]:
    """The estimator as the config sketches it and, where asked for, exact; controls have one form."""
    chosen: dict[str, Any] = {"estimator": name, "precondition": precondition, "layer_weights": weights}
    chosen["include_self"] = own
    base = replace(config.influence, reference="batch", unit="sequence", scope="micro_step", **chosen)
    exact = replace(base, sketch="none")
    if name in ("loss", "random") or base.sketch == "none":
        return [exact]
    return [exact, base] if config.fidelity.exact else [base]


def print_table(rows: list[dict[str, Any]]) -> None:
    """Pearson's correlation, the mean over checkpoints and batches."""
    columns = list(dict.fromkeys((row["reference"], row["own_term"]) for row in rows))
    table = Table(title="correlation with the references (own term in, out)", title_justify="left")
    for name in ("estimator", "sketch"):
        table.add_column(name, no_wrap=True)
    for reference, own_term in columns:
        table.add_column(f"{reference} {own_term}".replace("_", " ").replace(" ", "\n"), justify="right", min_width=5)
    for key in dict.fromkeys((row["estimator"], row["precondition"], row["sketch"]) for row in rows):
        cells = []
        for column in columns:
            numbers = [
                row["pearson_mean"]
                for row in rows
                if (row["estimator"], row["precondition"], row["sketch"]) == key
                and (row["reference"], row["own_term"]) == column
                and row["pearson_mean"] is not None
            ]
            cells.append(f"{np.mean(numbers):.2f}" if numbers else "-")
        estimator, precondition, sketch = key
        name = estimator if precondition == "none" else f"{estimator}/{precondition}"
        table.add_row(name, sketch, *cells)
    Console().print(table)


def main(argv: list[str] | None = None) -> None:
    config = parse("pipeline.fidelity", argv)
    with exit_on_user_error("pipeline.fidelity"):
        report = measure(config)
    print_table(report["rows"])
    print(f"{config.run_dir}/fidelity.json and fidelity.png hold the rest")


if __name__ == "__main__":
    main()
