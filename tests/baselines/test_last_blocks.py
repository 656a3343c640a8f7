"""Exact gradients through some blocks, against autograd on one sample at a time."""

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pipeline.baselines.flattened import flattened_grams
from pipeline.baselines.last_blocks import partial_backward_gram
from pipeline.data.batch import IGNORE, Batch, Unit
from pipeline.influence.adam import adam_factors
from pipeline.models.heads import blocks
from pipeline.tasks.causal_lm import token_losses
from tests.tiny_models import VOCABULARY, larger

SAMPLES, TOKENS = 3, 9
KINDS = ["gpt_neo", "gpt2", "llama", "llama_tied"]


@pytest.fixture
def batch() -> Batch:
    ids = torch.randint(0, VOCABULARY, (SAMPLES, TOKENS), generator=torch.Generator().manual_seed(1))
    ids[0, 3:6] = ids[1, 0]
    labels = torch.full_like(ids, IGNORE)
    labels[:, :-1] = ids[:, 1:]
    return Batch(ids, labels, [Unit(i, i, (i * TOKENS, (i + 1) * TOKENS), [i], "-") for i in range(SAMPLES)])


def sample_losses(model, batch: Batch):
    """Of one sample after the other, with its ids."""
    for ids, labels in zip(batch.input_ids_BT, batch.labels_BT, strict=True):
        losses, _ = token_losses(model(input_ids=ids[None], use_cache=False).logits, labels[None])
        yield ids, losses.sum()


def gram(parts: list[list[Tensor]]) -> Tensor:
    """Of samples with a list of matrices each."""
    rows = torch.stack([torch.cat([part.flatten() for part in each]) for each in parts])
    return rows @ rows.T


def close(got: Tensor, expected: Tensor) -> bool:
    """To what GPT-Neo's attention, in float32 whatever the model, allows."""
    return bool((got - expected).abs().max() < 1e-5 * expected.abs().max())


@pytest.mark.parametrize("adam", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_through_all_blocks_it_is_the_inner_product_of_true_gradients(batch, kind, adam):
    """Catches a tied weight counted twice and Conv1D's transposed factors."""
    model = larger(kind).double()
    matrices = {name: p for name, p in model.named_parameters() if p.dim() == 2 and not name.endswith("wpe.weight")}
    means, scales = None, dict.fromkeys(matrices, 1.0)
    if adam:
        second = {name: torch.rand_like(p) ** 4 for name, p in matrices.items()}
        means = {name: (v.mean(1), v.mean(0)) for name, v in second.items()}
        for name, (rows, columns) in means.items():
            # Which side the mean is divided out of makes no difference to the product.
            left, right = adam_factors(rows, columns)
            scales[name] = left[:, None] * right
    expected = gram(
        [
            [g * scale for g, scale in zip(torch.autograd.grad(loss, matrices.values()), scales.values(), strict=True)]
            for _, loss in sample_losses(model, batch)
        ]
    )
    assert close(partial_backward_gram(model, batch, 2, means), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_through_the_last_block_alone_the_others_get_what_leaves_it(batch, kind):
    """Of two blocks: exact in the last, the head and the word embedding; the first's layers with the gradient between.
    Catches the gradient at the last block's output, and one at the embedding that skips the first block."""
    model = larger(kind).double()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    head, words = model.get_output_embeddings(), model.get_input_embeddings()
    first = {name for name, layer in layers.items() if any(layer is m for m in blocks(model)[0].modules())}
    exact = [layers[name].weight for name in layers if name not in first]
    exact += [] if head.weight is words.weight else [words.weight]
    seen: dict[str, Tensor] = {}
    for name in first:
        layers[name].register_forward_hook(lambda _, args, __, name=name: seen.update({name: args[0][0].detach()}))
    blocks(model)[1].register_forward_pre_hook(lambda _, args: seen.update({"between": args[0]}))
    parts = []
    for _, loss in sample_losses(model, batch):
        *gradients, between = torch.autograd.grad(loss, [*exact, seen["between"]])
        parts.append([*gradients, *(torch.einsum("ti,td->id", seen[name], between[0]) for name in sorted(first))])
    assert close(partial_backward_gram(model, batch, 1, None), gram(parts))


def test_forms_of_the_heads_own_gradient_want_it_trained(batch):
    """Catches a traceback where the head is frozen; trained, they are to be had."""
    model = larger("llama")
    model.lm_head.weight.requires_grad_(False)
    for form in (lambda: partial_backward_gram(model, batch, 1, None), lambda: flattened_grams(model, batch)):
        with pytest.raises(ValueError, match=r"lm_head\.weight is frozen: leave it out of fidelity\.estimators, or"):
            form()
        model.lm_head.weight.requires_grad_(True)
        form()
        model.lm_head.weight.requires_grad_(False)
