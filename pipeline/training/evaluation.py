"""Held-out loss, perplexity and bits per byte, by subset."""

import math
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor

from pipeline.config.schema import Config
from pipeline.data.batch import IGNORE, PADDING, next_token_labels, to_device
from pipeline.data.prepared import load_report, load_split
from pipeline.engine import collectives, deepspeed_engine
from pipeline.tasks.causal_lm import token_losses


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


def evaluate_engine(ds_engine: deepspeed_engine.DeepSpeedEngine, config: Config) -> dict[str, Any] | None:
    """Held-out figures of the model in training, at any ZeRO stage; None where nothing is held out. Collective."""
    if not config.data.holds_out:
        return None
    ds_engine.eval()
    figures = evaluate(
        lambda ids_BT: ds_engine(input_ids=ids_BT, use_cache=False).logits,
        load_split(config.data.prepared_dir, "eval"),
        load_report(config.data.prepared_dir)["eval"]["subsets"],
        ds_engine.train_micro_batch_size_per_gpu(),
        ds_engine.device,
    )
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
