"""What people train is scored exactly or refused, never wrong in silence. All types: tests.models.architectures."""

import pytest
import torch

from tests.models.architectures import Row, batch_of, examine, sees_the_future, tiny_model

COMMON = [
    "bert",
    "bloom",
    "cohere",
    "falcon",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neo",
    "gpt_neox",
    "gptj",
    "granite",
    "llama",
    "llama, tied",
    "mamba",
    "mistral",
    "mixtral",
    "mpt",
    "nemotron",
    "olmo",
    "olmo2",
    "olmoe",
    "opt",
    "opt, word_embed_proj_dim",
    "phi",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "stablelm",
    "starcoder2",
]
ODD = ["llama4_text", "gemma3n_text", "minicpm3", "nanochat", "roc_bert", "big_bird", "prophetnet", "zamba2"]
"""A module that returns a tuple, a weight used without its module, a scaled head input, a soft cap, an output changed
in place, a layer whose rows are no tokens, two streams, a shared block."""


@pytest.mark.parametrize("name", [*COMMON, *ODD])
def test_scores_are_exact_or_refused(name):
    """Against Eq. 4 over token pairs and autograd, one sample at a time. Catches whatever lies between ids and the
    embedding's output or the head's output and the logits, rows without a gradient, weights that two modules share or
    that none calls, and a traceback where a sentence should be."""
    row = examine(name)
    assert row.causal == "yes", row.refusal
    assert name == "prophetnet" or row.loss.state == "exact", row.loss  # its own is of all its streams
    unlike = {what: cell for what, cell in what_came(row).items() if cell.state not in ("exact", "refused", "-")}
    assert not unlike, {what: (cell.state, cell.error, cell.said) for what, cell in unlike.items()}
    assert all(cell.said for cell in what_came(row).values() if cell.state == "refused")


def what_came(row: Row):
    return {**row.compared, "residual": row.residual}


def test_a_model_that_sees_the_future_is_found():
    ids = batch_of().input_ids_BT
    assert sees_the_future(tiny_model("bert, is_decoder false", torch.float32), ids)
    assert not sees_the_future(tiny_model("bert", torch.float32), ids)
