"""Held-out loss by subset; perplexity and bits per byte of text, accuracy of answers."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor

from pipeline.config.schema import Config
from pipeline.data.batch import IGNORE, PADDING, next_token_labels, to_device
from pipeline.data.prepared import load_answers, load_report, load_split
from pipeline.data.samples import Samples
from pipeline.engine import collectives, deepspeed_engine, launch
from pipeline.influence.micro_batch import forward_logits
from pipeline.tasks.causal_lm import token_losses
from pipeline.tasks.classification import answer_losses


@torch.no_grad()
def evaluate(
    logits_of: Callable[[Tensor], Tensor],
    rows: datasets.Dataset,
    sizes: dict[str, dict[str, int]],
    batch_size: int,
    device: torch.device,
) -> dict[str, Any]:
    """Loss over all `rows`, shared among the ranks: {"all": figures, "subsets": {subset: figures}}, of the subsets that
    have tokens in them.

    `logits_of` maps input_ids_BT to logits_BTV. A token's loss counts for its own document's subset. Figures: `loss`
    in nats per token, `perplexity` = exp(loss), `bits_per_byte` = loss / ln 2 * tokens / bytes (The Pile,
    arXiv 2101.00027, section 3.1) with the `tokens` and UTF-8 `bytes` of the subset's documents from `sizes`, and
    `tokens`, how many were predicted. Collective: every rank runs as many forwards as every other, whatever its share.
    """
    names = sorted(sizes)
    number = {name: index for index, name in enumerate(names)}
    totals_S2 = torch.zeros(len(names), 2, dtype=torch.float64, device=device)
    world, rank = collectives.world_size(), collectives.rank()
    rows = rows.with_format("numpy")
    for start in range(0, len(rows), world * batch_size):
        mine = range(start + rank * batch_size, min(start + (rank + 1) * batch_size, len(rows)))
        # A rank that has run out still takes part in ZeRO-3's gathering; its row counts for nothing.
        batch = rows[list(mine) or [0]]
        ids_BT = torch.from_numpy(np.stack(batch["input_ids"]).astype(np.int64))
        documents_BT = np.stack(batch["document_ids"])
        subsets_BT = np.zeros_like(documents_BT)
        for subsets_T, documents_T, subsets in zip(subsets_BT, documents_BT, batch["subset"], strict=True):
            changes_T = np.cumsum(np.diff(documents_T, prepend=documents_T[0]) != 0)
            padded = [number[name] for name in subsets] + [0]
            subsets_T[:] = np.take(padded, changes_T)
        counted_BT = torch.from_numpy(documents_BT != PADDING) & bool(mine)
        labels_BT = next_token_labels(ids_BT.where(counted_BT, IGNORE))
        subset_BT = to_device(torch.from_numpy(np.roll(subsets_BT, -1, axis=1)), device)
        ids_BT, labels_BT = to_device(ids_BT, device), to_device(labels_BT, device)
        losses_BT, _ = token_losses(logits_of(ids_BT), labels_BT)
        labelled_BT = labels_BT != IGNORE
        pairs_N2 = torch.stack([losses_BT, labelled_BT.to(losses_BT.dtype)], dim=-1).flatten(0, 1).double()
        totals_S2.index_add_(0, subset_BT.flatten(), pairs_N2)
    totals_S2 = collectives.all_reduce_sum(totals_S2).cpu()
    loss, tokens = totals_S2.sum(0).tolist()
    return {
        "all": _figures(loss, tokens, list(sizes.values())),
        "subsets": {
            name: _figures(loss, tokens, [sizes[name]])
            for name, (loss, tokens) in zip(names, totals_S2.tolist(), strict=True)
            if tokens
        },
    }


@torch.no_grad()
def evaluate_answers(
    model: Callable[..., Any], samples: Samples, texts: int, subsets: Sequence[str], batch_size: int
) -> dict[str, Any]:
    """The same of a classifier, over all `texts` of `samples`: `loss` in nats per text, `accuracy`, the share of texts
    whose label has the largest logit, and `tokens`, how many texts there are."""
    number = {name: index for index, name in enumerate(subsets)}
    world, rank, device = collectives.world_size(), collectives.rank(), launch.device()
    totals_S3 = torch.zeros(len(number), 3, dtype=torch.float64, device=device)
    for start in range(0, texts, world * batch_size):
        mine = list(range(start + rank * batch_size, min(start + (rank + 1) * batch_size, texts)))
        batch = samples.batch_at(mine or [0], device)
        logits_BC = forward_logits(model, batch)
        losses_BT, _ = answer_losses(logits_BC, batch.labels_BT)
        right_B = logits_BC.argmax(1) == batch.labels_BT.amax(1)
        of_subset_B = torch.tensor([number[unit.subset] for unit in batch.units], device=device)
        found_B3 = torch.stack([losses_BT.sum(1), right_B, torch.ones_like(right_B)], dim=1).double()
        totals_S3.index_add_(0, of_subset_B, found_B3 * bool(mine))
    totals_S3 = collectives.all_reduce_sum(totals_S3).cpu()

    def figures(loss: float, right: float, texts: float) -> dict[str, float]:
        return {"loss": loss / texts, "accuracy": right / texts, "tokens": int(texts)}

    return {
        "all": figures(*totals_S3.sum(0).tolist()),
        "subsets": {name: figures(*row) for name, row in zip(subsets, totals_S3.tolist(), strict=True) if row[2]},
    }


def held_out(model: Callable[..., Any], config: Config, batch_size: int) -> dict[str, Any]:
    """Held-out figures of a model in evaluation mode, with what belongs to the task. Collective."""
    directory = config.data.prepared_dir
    rows, sizes = load_split(directory, "eval"), load_report(directory)["eval"]["subsets"]
    if answers := load_answers(directory):
        samples = Samples(rows, config.seed, "sequence", answers=answers)
        return evaluate_answers(model, samples, len(rows), sorted(sizes), batch_size)

    def logits_of(ids_BT: Tensor) -> Tensor:
        return model(input_ids=ids_BT, use_cache=False).logits

    return evaluate(logits_of, rows, sizes, batch_size, launch.device())


def evaluate_engine(ds_engine: deepspeed_engine.DeepSpeedEngine, config: Config) -> dict[str, Any] | None:
    """Held-out figures of the model in training, at any ZeRO stage; None where nothing is held out. Collective."""
    if not config.data.holds_out:
        return None
    ds_engine.eval()
    figures = held_out(ds_engine, config, ds_engine.train_micro_batch_size_per_gpu())
    ds_engine.train()
    return figures


def _figures(loss: float, tokens: float, sizes: list[dict[str, int]]) -> dict[str, float]:
    mean = loss / tokens
    tokens_per_byte = sum(size["tokens"] for size in sizes) / sum(size["bytes"] for size in sizes)
    return {
        "loss": mean,
        "perplexity": math.exp(min(mean, 700.0)),
        "bits_per_byte": mean / math.log(2) * tokens_per_byte,
        "tokens": int(tokens),
    }
