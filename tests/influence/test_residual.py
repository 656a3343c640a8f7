"""The residual estimator's moments against the same written out with whole matrices."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pipeline.config.schema import InfluenceConfig, SketchConfig
from pipeline.config.timing import Stopwatch
from pipeline.data.batch import IGNORE, Batch, Unit
from pipeline.influence.adam import adam_factors
from pipeline.influence.estimator import Estimator
from pipeline.models.heads import final_norm, head_layer
from pipeline.models.layers import linear_layers
from pipeline.models.second_moments import SecondMoments
from pipeline.tasks.causal_lm import token_losses
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
    estimator = Estimator(config, model, seed, CPU, Stopwatch(CPU))
    if means:
        estimator.precondition(SecondMoments(means, 0.999, 100))
    with torch.no_grad(), estimator.capture():
        losses, feedback = token_losses(model(input_ids=batch.input_ids_BT).logits, batch.labels_BT, estimator.visit)
    estimator.add(batch, losses, feedback)
    return estimator.scores()[0].scores_U


def written_out(model, batch: Batch, means=None, weights=None) -> Tensor:
    """In float64, with no sketch, no chunk, and every outer product of every token. `weights`: of the layers but the
    head, by name."""
    head, norm = head_layer(model)[1], final_norm(model)
    inputs: dict[nn.Module, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda module, args, _: inputs.update({module: args[0].double()}))
        for module in [norm, *linear_layers(model).values()]
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
    e = g @ head.weight.double() * norm.weight.double() / sigma * factors(words)[1]
    rows, columns = factors(head.weight)
    ends = torch.einsum("btd,btv->bdv", inputs[head] * columns, g * rows)
    embedding = torch.einsum("btd,btv->bdv", e, F.one_hot(batch.input_ids_BT, VOCABULARY).double() * factors(words)[0])
    parts = [ends + embedding] if head.weight is words else [ends, embedding]
    for layer, module in linear_layers(model).items():
        if module is head:
            continue
        weight = weights[layer] if weights else 1.0
        scale: Tensor | float = 1.0
        if means is not None:
            row_means, column_means = means[names[id(module.weight)]]
            ins = row_means if isinstance(module, Conv1D) else column_means
            scale = (ins / ins.mean()) ** -0.25 * ins.mean() ** -0.25
        parts.append(torch.einsum("bti,btd->bid", inputs[module] * scale * weight**0.5, e))
    moments = torch.cat([part.flatten(1) for part in parts], dim=1)
    pairs = moments @ moments.T
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


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_layers_are_weighed_by_the_inverse_norms_of_an_earlier_micro_batch(batch, kind):
    """Catches weights that put the body on another scale than head and embedding, which have none."""
    model = model_of(kind)
    earlier = Batch(batch.input_ids_BT.flip(0, 1), batch.labels_BT, batch.units)
    inputs: dict[str, Tensor] = {}
    body = {layer: module for layer, module in linear_layers(model).items() if module is not head_layer(model)[1]}
    hooks = [
        module.register_forward_hook(lambda _, args, __, layer=layer: inputs.update({layer: args[0].double()}))
        for layer, module in body.items()
    ]
    config = InfluenceConfig(estimator="residual", include_self=False, sketch="none", layer_weights="inverse_norm")
    estimator = Estimator(config, model, 3, CPU, Stopwatch(CPU))
    for part in (earlier, batch):
        with torch.no_grad(), estimator.capture():
            losses, feedback = token_losses(model(input_ids=part.input_ids_BT).logits, part.labels_BT, estimator.visit)
        estimator.add(part, losses, feedback)
        found = estimator.scores()[0].scores_U
        if part is earlier:
            assert (found - written_out(model, part)).abs().max() < 1e-4 * found.abs().max()
            inverse = {layer: 1 / float(x.square().sum(2).mean()) for layer, x in inputs.items()}
    for hook in hooks:
        hook.remove()
    weights = {layer: value * len(inverse) / sum(inverse.values()) for layer, value in inverse.items()}
    assert max(weights.values()) > 1.5 * min(weights.values())
    expected = written_out(model, batch, weights=weights)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("kind", ["gpt_neo", "llama"])
def test_sketched_scores_are_unbiased(batch, kind):
    model = model_of(kind)
    exact = scores(model, batch, sketch="none")
    sketch = SketchConfig(inputs=24, gradients=128, layers=12)
    drawn = torch.stack([scores(model, batch, seed=seed, sketch=sketch) for seed in range(40)])
    assert ((drawn.mean(0) - exact).abs() < 4 * drawn.std(0) / len(drawn) ** 0.5).all()
    assert (drawn.std(0) > 0).all()


def test_it_is_the_true_gradient_where_the_model_is_a_head_on_a_norm_on_an_embedding(batch):
    """One token a sample and no blocks: head and embedding gradients but for the rest of the norm's Jacobian."""
    model = model_of("llama")
    model.model.layers = nn.ModuleList()
    e = model.model.embed_tokens(batch.input_ids_BT)
    losses, _ = token_losses(model.lm_head(model.model.norm(e)), batch.labels_BT)
    gradient = torch.autograd.grad(losses.sum(), model.lm_head.weight)[0]
    config = InfluenceConfig(estimator="residual", sketch="none")
    estimator = Estimator(config, model, 3, CPU, Stopwatch(CPU))
    with torch.no_grad(), estimator.capture():
        logits = model.lm_head(model.model.norm(model.model.embed_tokens(batch.input_ids_BT)))
        _, feedback = token_losses(logits, batch.labels_BT, estimator.visit)
    assert feedback.shape[1] == VOCABULARY + model.config.hidden_size
    moment = torch.einsum("nd,nv->vd", estimator._residual._head_keys_NK, feedback[:, :VOCABULARY])
    assert torch.allclose(moment, gradient, atol=1e-4)
