"""Every estimator's scores held against every reference at the checkpoints of a run."""

import copy
import itertools
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from pipeline.baselines.flattened import flattened_grams
from pipeline.baselines.last_blocks import partial_backward_gram
from pipeline.config.schema_influence import InfluenceConfig
from pipeline.config.timing import Stopwatch
from pipeline.data.batch import IGNORE, Batch
from pipeline.data.prepared import ensure_prepared
from pipeline.data.samples import training_samples
from pipeline.engine import checkpoint_files, launch
from pipeline.engine.checkpoint_files import load_weights
from pipeline.engine.checkpoints import checkpoints_of
from pipeline.evidence.config import EXACT, LOOKAHEAD, FidelityRun
from pipeline.evidence.correlation import Comparison, widths
from pipeline.evidence.fidelity_figure import draw
from pipeline.evidence.on_target import hold_target, lookahead_scores, target_of
from pipeline.evidence.references import (
    Adam,
    adam_step,
    inner_products,
    peak_learning_rate,
    reference_values,
    sample_gradients,
    target_at,
)
from pipeline.evidence.shapley import row_sums
from pipeline.influence.micro_batch import MicroBatch
from pipeline.influence.scorer import ControlScorer, SketchScorer
from pipeline.influence.table import scorer_of
from pipeline.models.load import load_model
from pipeline.models.second_moments import Moments, second_moments
from pipeline.record.mixture_log import pieces_of

START = "start"


_WARM_UP_BATCHES = 8  # that running means are made of before they are measured


_LAST_BLOCKS = {"residual_last_1": 1, "residual_last_2": 2}


_COMPARISON_ONLY = ("ip", "ghost_flattened", "lai_flattened", "logit_gradient_norm")


_FIRST_ORDER = ("ip_adam", "shapley_adam_limit")
"""References that are also held against the others: how far any gradient can come."""


def scores_of(scorer: ControlScorer | SketchScorer, model: nn.Module, batch: Batch) -> Tensor:
    """One micro-batch through the model and the scorer as training takes it; (B,) float64, on the CPU."""
    watched = MicroBatch(scorer, batch, Stopwatch(batch.input_ids_BT.device))
    with torch.set_grad_enabled(scorer.after_backward):
        watched.forward(model)
    watched.before_backward(float((batch.labels_BT != IGNORE).sum()))
    watched.backward_to_inputs()
    watched.add()
    return scorer.scores()[0].scores_U.double().cpu()


def measure(config: FidelityRun) -> dict[str, Any]:
    """Hold every estimator against every reference at every checkpoint; write the JSON and the figure.

    Raises ValueError where a checkpoint that the config names is not there or belongs to another model.
    """
    ensure_prepared(config)
    device = launch.device()
    found = checkpoints_of(config.run_dir)
    names = config.fidelity.checkpoints or list(found) or [START]
    if missing := [name for name in names if name not in {START, *found}]:
        raise ValueError(
            f"fidelity.checkpoints: no whole checkpoint {missing[0]} in {config.run_dir}/checkpoints; it has "
            f"{', '.join(found) or 'none'} ({START}: the model that the config names)"
        )
    pieces = pieces_of(Path(config.run_dir))
    samples = training_samples(config.data.prepared_dir, config.seed, "sequence", config.data.mixture, (), pieces)
    # The same unseen batches for all checkpoints: after what the newest has read.
    first = max((checkpoint_files.checkpoint_position(path) for path in found.values()), default=0)
    size = config.fidelity.batch_size
    batches = [
        samples.batch(first + index * size, size, device) for index in range(_WARM_UP_BATCHES + config.fidelity.batches)
    ]
    target = target_of(config, device)
    comparisons: dict[tuple[str, ...], Comparison] = {}
    shapley = []
    for checkpoint in tqdm(names, desc="checkpoints"):
        model = load_model(config.model, config.seed).eval()
        moments, learning_rate = None, peak_learning_rate(config)
        if checkpoint != START:
            load_weights(model, found[checkpoint])
            moments = checkpoint_files.checkpoint_adam(found[checkpoint])
            learning_rate = checkpoint_files.checkpoint_learning_rate(found[checkpoint])
        model.to(device)
        exact = copy.deepcopy(model).double()
        adam = adam_step(config, exact, moments, learning_rate)
        held_target = target_at(exact, target) if target else None
        values_of_batch = []
        for index, batch in enumerate(batches[_WARM_UP_BATCHES:]):
            values, details = reference_values(config, exact, batch, adam, learning_rate, index, held_target)
            values_of_batch.append(values)
            shapley += [
                {"checkpoint": checkpoint, "batch": index, "reference": name, **detail}
                for name, detail in details.items()
            ]
        exact_forms: dict[tuple[str, str, bool], list[Tensor]] = {}
        as_estimators = [
            ((reference, "none", "none"), own, [values[reference, own] for values in values_of_batch])
            for reference in _FIRST_ORDER
            for own in config.fidelity.own_terms
            if all((reference, own) in values for values in values_of_batch)
        ]
        scored = _all_scores(config, model, exact, batches, moments, adam, target)
        for key, own, scores in itertools.chain(scored, as_estimators):
            name, precondition, sketch = key
            whole = exact_forms.setdefault((name, precondition, own), scores)  # an exact form comes before its sketch
            for values, scores_B, whole_B in zip(values_of_batch, scores, whole, strict=True):
                held = {reference: values_B for (reference, side), values_B in values.items() if side == own}
                if EXACT in config.fidelity.references and sketch != "none":
                    held[EXACT] = whole_B
                for reference, values_B in held.items():
                    where = (checkpoint, *key, reference, "target" if target else "in" if own else "out")
                    pairs = comparisons.setdefault(where, Comparison(*where)).pairs
                    pairs.append((scores_B.numpy(), values_B.numpy()))
    report = {"rows": [comparison.row() for comparison in comparisons.values()], "shapley": shapley}
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "fidelity.json").write_text(json.dumps(report, indent=1))
    draw(config, list(comparisons.values()), run_dir / "fidelity.png")
    return report


def _all_scores(
    config: FidelityRun,
    model: PreTrainedModel,
    exact: PreTrainedModel,
    batches: list[Batch],
    moments: Moments | None,
    adam: Adam | None,
    target: list[Batch] | None,
) -> Iterator[tuple[tuple[str, str, str], bool, list[Tensor]]]:
    """(estimator, precondition, sketch), whether the self-influence is in, and the scores of every measured batch."""
    measured = batches[_WARM_UP_BATCHES:]
    second = second_moments(moments, adam.betas[1], model.device) if moments and adam else None
    matrices: dict[str, list[Tensor]] = defaultdict(list)
    if set(config.fidelity.measured) & set(_COMPARISON_ONLY):
        for batch in measured:
            found = flattened_grams(model, batch) | {"ip": inner_products(sample_gradients(exact, batch))}
            for name, matrix_BB in found.items():
                matrices[name].append(matrix_BB.double().cpu())
    for entry in config.fidelity.measured:
        name, _, form = entry.partition("/")
        precondition = form or "none"
        if form == "adam_state" and second is None:
            continue  # no optimizer state to go by
        if name == LOOKAHEAD:
            if adam and target:
                yield (name, "none", "none"), True, list(lookahead_scores(config, model, adam, target, measured))
            continue
        if name in _LAST_BLOCKS:
            means = second.means if second and form else None
            grams = [partial_backward_gram(model, batch, _LAST_BLOCKS[name], means) for batch in measured]
            for own in config.fidelity.own_terms:
                yield (name, precondition, "none"), own, [row_sums(gram.double().cpu(), own) for gram in grams]
            continue
        for own in config.fidelity.own_terms:
            if name in _COMPARISON_ONLY:
                alone = name == "logit_gradient_norm"
                yield (name, "none", "none"), own, [row_sums(matrix, own or alone) for matrix in matrices[name]]
                continue
            for influence in _forms(config, name, precondition, own):
                device = model.device
                scorer = scorer_of(influence, model, config.seed, device, Stopwatch(device), lambda tensor: tensor)
                if isinstance(scorer, SketchScorer) and scorer.reads_second_moments and second:
                    scorer.precondition(second)
                warm_up = batches[:_WARM_UP_BATCHES] if form == "adam_ema" else []
                hold_target(scorer, model, target)
                for batch in warm_up:
                    scores_of(scorer, model, batch)
                if warm_up:
                    hold_target(scorer, model, target)  # anew, in the geometry that is known by now
                scores = [scores_of(scorer, model, batch) for batch in measured]
                yield (name, precondition, widths(influence)), own, scores


def _forms(config: FidelityRun, name: str, precondition: str, own: bool) -> list[InfluenceConfig]:
    """The estimator as the config sketches it and, where asked for, exact; controls have one form."""
    base = InfluenceConfig(
        name,
        reference="validation" if config.fidelity.target_sequences else "batch",
        include_self=own,
        sketch=config.influence.sketch,
        precondition=precondition,  # type: ignore[arg-type]
        adam_power=config.influence.adam_power,
        adam_decay=config.influence.adam_decay,
    )
    exact = replace(base, sketch="none")
    if name in ("loss", "random") or base.sketch == "none":
        return [exact]
    return [exact, base] if config.fidelity.exact else [base]
