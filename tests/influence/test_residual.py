"""The residual estimator's gradient sketches against the same written out with whole matrices."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pipeline.config.schema_influence import InfluenceConfig, SketchConfig
from pipeline.config.timing import Stopwatch
from pipeline.data.batch import IGNORE, Batch, Unit
from pipeline.influence.adam import adam_factors
from pipeline.influence.micro_batch import MicroBatch
from pipeline.models.heads import final_norm
from pipeline.models.second_moments import SecondMoments
from pipeline.models.trainable import freeze_all_but
from tests.runs import forward_scores, plain_scorer
from tests.tiny_models import VOCABULARY, tiny

CPU = torch.device("cpu")
SAMPLES, TOKENS = 4, 12


@pytest.fixture
def batch() -> Batch:
    ids = torch.randint(0, VOCABULARY, (SAMPLES, TOKENS), generator=torch.Generator().manual_seed(1))
    ids[0, 3:6] = ids[1, 0]
    labels = F.pad(ids[:, 1:], (0, 1), value=IGNORE)
    return Batch(ids, labels, [Unit(i, i, (i * TOKENS, (i + 1) * TOKENS), [i], "-") for i in range(SAMPLES)])


def model_of(kind: str):
    model = tiny(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() > 1 else 1).add_(0.3 * torch.rand_like(parameter))
    return model


def scores(model, batch: Batch, means=None, seed: int = 3, **options) -> Tensor:
    config = InfluenceConfig(estimator="residual", include_self=False, **options)
    scorer = plain_scorer(config, model, seed, SecondMoments(means, 0.999, 100) if means else None)
    return forward_scores(scorer, model, batch)[0]


def written_out(model, batch: Batch, means=None) -> Tensor:
    """In float64, with no sketch, no chunk, and every outer product of every token."""
    head, norm = model.get_output_embeddings(), final_norm(model)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | Conv1D)]
    inputs: dict[nn.Module, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda module, args, _: inputs.update({module: args[0].double()}))
        for module in [norm, *layers]
    ]
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids_BT).logits.double()
    for hook in hooks:
        hook.remove()
    names = {id(p): name for name, p in model.named_parameters()}

    def factors(weight: Tensor) -> tuple[Tensor, Tensor]:
        if means is None:
            return torch.ones(weight.shape[0]).double(), torch.ones(weight.shape[1]).double()
        return adam_factors(*means[names[id(weight)]])

    onehot = F.one_hot(batch.labels_BT.clamp(min=0), logits.shape[2])
    g = (logits.softmax(2) - onehot) * (batch.labels_BT != IGNORE)[:, :, None]
    x = inputs[norm]
    centred = x - x.mean(2, keepdim=True) if isinstance(norm, nn.LayerNorm) else x
    sigma = (
        centred.square().mean(2, keepdim=True) + getattr(norm, "eps", 0) + getattr(norm, "variance_epsilon", 0)
    ).sqrt()
    words = model.get_input_embeddings().weight
    e = g @ head.weight.double() * norm.weight.double() / sigma
    if words.requires_grad:
        e = e * factors(words)[1]
    rows, columns = factors(head.weight)
    ends = torch.einsum("btd,btv->bdv", inputs[head] * columns, g * rows)
    embedding = torch.einsum("btd,btv->bdv", e, F.one_hot(batch.input_ids_BT, VOCABULARY).double() * factors(words)[0])
    if head.weight is words:
        parts = [ends + embedding] if words.requires_grad else []
    else:
        parts = [part for part, weight in ((ends, head.weight), (embedding, words)) if weight.requires_grad]
    for module in layers:
        if module is head or not module.weight.requires_grad:
            continue
        scale: Tensor | float = 1.0
        if means is not None:
            row_means, column_means = means[names[id(module.weight)]]
            ins = row_means if isinstance(module, Conv1D) else column_means
            scale = (ins / ins.mean()) ** -0.25 * ins.mean() ** -0.25
        parts.append(torch.einsum("bti,btd->bid", inputs[module] * scale, e))
    sketches = torch.cat([part.flatten(1) for part in parts], dim=1)
    pairs = sketches @ sketches.T
    return (pairs - pairs.diag().diag()).sum(1)


@pytest.mark.parametrize("adam", [False, True])
@pytest.mark.parametrize("kind", ["gpt_neo", "gpt2", "llama", "llama_tied"])
def test_exact_scores_are_those_written_out(batch, kind, adam):
    """Catches a norm that is centred or not, a tied weight counted twice, and chunks that lose their place."""
    model, means = model_of(kind), None
    if adam:
        second = {name: torch.rand_like(p) ** 4 for name, p in model.named_parameters() if p.dim() == 2}
        means = {name: (v.mean(1), v.mean(0)) for name, v in second.items()}
    expected = written_out(model, batch, means)
    assert (scores(model, batch, means, sketch="none") - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("adam", [False, True])
@pytest.mark.parametrize("trained", ["*.layers.1.*", "model.*", "lm_head.*", "*embed_tokens*"])
@pytest.mark.parametrize("kind", ["llama", "llama_tied"])
def test_what_is_frozen_is_in_no_score(batch, kind, trained, adam):
    """Catches the head's or the embedding's part where that is frozen, and second moments that are not there."""
    model, means = model_of(kind), None
    freeze_all_but(model, [trained])
    if adam:
        second = {name: torch.rand_like(p) ** 4 for name, p in model.named_parameters() if p.dim() == 2}
        means = {name: (v.mean(1), v.mean(0)) for name, v in second.items()}
    expected = written_out(model, batch, means)
    means = means and {name: means[name] for name, p in model.named_parameters() if name in means and p.requires_grad}
    assert (scores(model, batch, means, sketch="none") - expected).abs().max() < 1e-4 * expected.abs().max()
    assert scores(model, batch, means).isfinite().all()


@pytest.mark.parametrize("kind", ["gpt_neo", "llama"])
def test_sketched_scores_are_unbiased(batch, kind):
    model = model_of(kind)
    exact = scores(model, batch, sketch="none")
    sketch = SketchConfig(input_width=24, logit_width=128, hidden_width=12)
    drawn = torch.stack([scores(model, batch, seed=seed, sketch=sketch) for seed in range(40)])
    assert ((drawn.mean(0) - exact).abs() < 4 * drawn.std(0) / len(drawn) ** 0.5).all()
    assert (drawn.std(0) > 0).all()


@pytest.mark.parametrize("kind", ["gpt_neo", "gpt2", "llama", "llama_tied"])
def test_it_is_the_true_gradient_where_the_model_is_a_head_on_a_norm_on_an_embedding(batch, kind):
    """Of head and embedding, but for the rest of the norm's Jacobian: the blocks are there and add nothing."""
    model = model_of(kind)
    embed, head, norm = model.get_input_embeddings(), model.get_output_embeddings(), final_norm(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "wpe.weight")) or "c_proj" in name:
                parameter.zero_()
            if name.endswith("out_proj.weight") or name.endswith("out_proj.bias"):
                parameter.zero_()

    # Two leaves for a weight that may be one.
    words, rows = (module.weight.detach().clone().requires_grad_() for module in (embed, head))
    x = F.embedding(batch.input_ids_BT, words)
    centred = x - x.mean(2, keepdim=True).detach() if isinstance(norm, nn.LayerNorm) else x
    epsilon = getattr(norm, "eps", getattr(norm, "variance_epsilon", 0))
    sigma = (centred.square().mean(2, keepdim=True) + epsilon).sqrt().detach()
    hidden = centred / sigma * norm.weight.detach() + (norm.bias.detach() if isinstance(norm, nn.LayerNorm) else 0)
    logits = hidden @ rows.T
    losses = F.cross_entropy(logits.transpose(1, 2), batch.labels_BT, ignore_index=IGNORE, reduction="none")
    of_words, of_head = torch.autograd.grad(losses.sum(), [words, rows])

    scorer = plain_scorer(InfluenceConfig(estimator="residual", sketch="none"), model, 3)
    watched = MicroBatch(scorer, batch, Stopwatch(CPU))
    with torch.no_grad():
        found = watched.forward(model)
    assert torch.allclose(found, losses, atol=1e-4)
    sketch = watched.gradients().sketch_UM.sum(0)
    size = rows.numel()
    tied = embed.weight is head.weight
    parts = [of_head + of_words] if tied else [of_head, of_words]
    for part, got in zip(parts, sketch.split(size), strict=False):
        assert torch.allclose(got.view(rows.shape[1], rows.shape[0]).T, part, atol=1e-4)
        assert part.abs().max() > 0.1
