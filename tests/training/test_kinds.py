"""True gradients of models of every kind under ZeRO-3, on two real ranks against autograd in one process."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pipeline.data.batch import Batch
from pipeline.data.prepared import load_split
from pipeline.data.samples import Samples
from pipeline.models.layers import layers_of
from pipeline.record import ledger
from pipeline.tasks.causal_lm import token_losses
from tests.runs import config_of, deepspeed_json, run
from tests.tiny_models import VOCABULARY

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},  # the padding token is among the text's: its row has no gradient
    "llama, padded": {"vocab_size": VOCABULARY + 20},  # beyond the tokenizer: these words are only predicted
    "gemma2": {"head_dim": 8},  # a soft cap after the head, an embedding scaled inside its module
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 12.0},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


def model_of(kind: str) -> PreTrainedModel:
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind.partition(",")[0], **SIZES | KINDS[kind]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return model


def per_sample_gradients(model: PreTrainedModel, batch: Batch) -> Tensor:
    """(B, P), of the weights that ghost claims."""
    claimed = layers_of(model).weights
    weights = [parameter for name, parameter in model.named_parameters() if name in claimed]
    rows = []
    for ids, labels in zip(batch.input_ids_BT, batch.labels_BT, strict=True):
        losses, _ = token_losses(model(input_ids=ids[None]).logits, labels[None])
        gradients = torch.autograd.grad(losses.sum(), weights, materialize_grads=True, allow_unused=True)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]).double())
    return torch.stack(rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", [0, 3])
def test_ghost_scores_are_inner_products_of_true_gradients(ranks, corpus, tmp_path, kind, stage):
    """Catches experts' weights that are not whole in the backward, and a scale that one stage does not see."""
    model = model_of(kind)
    model.save_pretrained(tmp_path / kind)
    config = config_of(
        corpus,
        tmp_path / "run",
        tmp_path / kind,
        deepspeed_json(tmp_path / "ds.json", stage),
        max_steps=1,
        influence__estimator="ghost",
        influence__include_self=False,
        influence__sketch="none",
        policy__action="observe",
    )
    ranks(run, config)
    batch = Samples(load_split(config.data.prepared_dir, "train"), config.seed, "sequence").batch(0, 4, CPU)
    gradients = per_sample_gradients(model, batch)
    pairs = gradients @ gradients.T
    expected = (pairs - pairs.diag().diag()).sum(1)
    found = torch.tensor(ledger.read(tmp_path / "run")["score"].to_pylist(), dtype=torch.float64)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
