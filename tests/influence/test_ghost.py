"""Gradient sketches out of a backward against autograd, one sample at a time."""

import pytest
import torch
from torch import Tensor

from pipeline.config.schema_influence import InfluenceConfig, SketchConfig
from pipeline.config.timing import Stopwatch
from pipeline.data.batch import IGNORE, Batch, Unit
from pipeline.evidence.references import Adam
from pipeline.influence.adam import adam_factors, saturation
from pipeline.influence.micro_batch import MicroBatch
from pipeline.models.second_moments import SecondMoments
from pipeline.tasks.causal_lm import token_losses
from tests.runs import ghost_scores, plain_scorer
from tests.tiny_models import VOCABULARY, larger

CPU = torch.device("cpu")
SAMPLES, TOKENS = 4, 10


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def batch_of(seed: int = 0, samples: int = SAMPLES, words: int = VOCABULARY) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, words, (samples, TOKENS), generator=generator)
    ids[0, 3:6] = ids[0, 0]  # the same token again and again
    labels = torch.full_like(ids, IGNORE)
    labels[:, :-1] = ids[:, 1:]
    labels[1, 4:] = IGNORE
    return Batch(ids, labels, [Unit(i, i, (i * TOKENS, (i + 1) * TOKENS), [i], "-") for i in range(samples)])


def scores(model, batch: Batch, factor: float = 1.0, means=None, step_tokens=None, seed: int = 3, **options) -> Tensor:
    second = SecondMoments(means, 0.95, 3) if means else None
    return ghost_scores(InfluenceConfig(estimator="ghost", **options), model, batch, seed, second, step_tokens, factor)


def agree(got: Tensor, expected: Tensor) -> bool:
    """To what GPT-Neo's attention, in float32 whatever the model, allows."""
    return bool((got - expected).abs().max() < 1e-5 * expected.abs().max())


def matrices(model) -> dict[str, Tensor]:
    """The weights whose gradients ghost claims to have."""
    return {name: p for name, p in model.named_parameters() if p.dim() == 2 and not name.endswith("wpe.weight")}


def per_sample_gradients(model, batch: Batch) -> list[dict[str, Tensor]]:
    found = []
    for ids, labels in zip(batch.input_ids_BT, batch.labels_BT, strict=True):
        losses, _ = token_losses(model(input_ids=ids[None]).logits, labels[None])
        gradients = torch.autograd.grad(losses.sum(), list(matrices(model).values()))
        found.append(dict(zip(matrices(model), gradients, strict=True)))
    return found


def inner_products(gradients: list[dict[str, Tensor]], scales: dict[str, Tensor], include_self: bool) -> Tensor:
    flat = torch.stack([torch.cat([(g * scales.get(n, 1.0)).flatten() for n, g in each.items()]) for each in gradients])
    pairs = flat @ flat.T
    return (pairs if include_self else pairs - pairs.diag().diag()).sum(1)


@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("kind", ["gpt_neo", "gpt2", "llama", "llama_tied"])
def test_exact_ghost_is_the_inner_product_of_true_gradients(kind, include_self):
    """Catches a tied embedding without both its parts added first, a transposed Conv1D, and a missing layer."""
    model, batch = larger(kind).double(), batch_of()
    expected = inner_products(per_sample_gradients(model, batch), {}, include_self)
    assert agree(scores(model, batch, sketch="none", include_self=include_self), expected)


def test_what_multiplies_the_loss_does_not_change_a_score():
    """Catches scores that depend on world size, accumulation or a loss scale."""
    model, batch = larger("gpt_neo").double(), batch_of()
    assert agree(scores(model, batch, sketch="none"), scores(model, batch, 1 / 384, sketch="none"))


def test_activation_checkpointing_records_each_layer_once():
    model, batch = larger("llama").double(), batch_of()
    expected = scores(model, batch, sketch="none")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert torch.allclose(scores(model.train(), batch, sketch="none"), expected, rtol=1e-9)


def test_layers_that_run_without_a_graph_are_refused_and_not_missed():
    """Reentrant activation checkpointing runs the forward without one. Catches scores of what is left."""
    model, batch = larger("llama").double(), batch_of()
    model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match=r'q_proj ran without a graph.* Give it \{"use_reentrant": False\}, or choose'):
        scores(model.train(), batch, sketch="none")


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_scores_in_the_forward_sees_the_same_under_both_kinds_of_checkpointing(reentrant):
    """Catches inputs that are recorded again in the backward."""
    model, batch = larger("llama").double().train(), batch_of()
    for name in ("lai", "lli", "residual"):
        config = InfluenceConfig(estimator=name, sketch="none")
        found = []
        for checkpointing in (False, True):
            if checkpointing:
                model.activation_checkpointing_enable({"use_reentrant": reentrant})
            scorer = plain_scorer(config, model, 3)
            watched = MicroBatch(scorer, batch, Stopwatch(CPU))
            watched.forward(model).sum().backward()
            watched.add()
            found.append(scorer.scores()[0].scores_U)
            model.activation_checkpointing_disable()
        assert agree(*found)


@pytest.mark.parametrize("kind", ["gpt_neo", "gpt2", "llama"])
def test_adam_state_scales_rows_and_columns_of_the_gradient(kind):
    """Catches swapped rows and columns, and the wrong power."""
    model, batch = larger(kind).double(), batch_of()
    second = {name: torch.rand_like(p) ** 4 for name, p in model.named_parameters() if p.dim() == 2}
    means = {name: (v.mean(1), v.mean(0)) for name, v in second.items()}
    outer = {name: (rows[:, None] * columns[None, :] / rows.mean()) ** -0.25 for name, (rows, columns) in means.items()}
    expected = inner_products(per_sample_gradients(model, batch), outer, include_self=False)
    got = scores(model, batch, means=means, sketch="none", include_self=False, precondition="adam_state")
    assert agree(got, expected)
    assert not torch.allclose(got, scores(model, batch, sketch="none", include_self=False), rtol=0.1)


def test_a_saturated_row_is_the_self_influence_of_adams_coming_step():
    """Where a row's second moments are all alike and one sample alone has a gradient: against Adam's own update."""
    generator = torch.Generator().manual_seed(0)
    gradient_PD = torch.randn(6, 8, generator=generator)
    v_P = torch.rand(6, generator=generator) ** 4 * 1e-3
    gradient_PD[:, :] = gradient_PD[:, :1].abs() * gradient_PD.sign()  # of one size along a row
    tokens, decay, updates = 50.0, 0.95, 3
    raw = (v_P[:, None] * (1 - decay**updates)).expand_as(gradient_PD)
    adam = Adam(1.0, (0.0, decay), 0.0, 0.0, True, torch.zeros_like(raw), raw, updates)
    update_PD = -adam(torch.zeros_like(gradient_PD), gradient_PD / tokens)
    expected = (update_PD * gradient_PD).sum(1) * tokens  # g / sqrt(v'), g of summed losses
    squares_P = gradient_PD.square().sum(1) * v_P**-0.5
    newest = SecondMoments({}, decay, updates).newest
    taken_P = saturation(squares_P, v_P**-0.25, 8, tokens, newest)
    assert torch.allclose(squares_P - taken_P, expected, rtol=1e-10)
    assert (taken_P > 0.5 * squares_P).any()


@pytest.mark.parametrize("kind", ["gpt_neo", "llama", "llama_tied"])
def test_self_influence_saturates_row_by_row(kind):
    """Against loops over a unit's words. Catches one row for each position, rows that units share, a tied weight
    without both its parts, an untied one with both, and another denominator."""
    model, batch = larger(kind).double(), batch_of(words=15)
    second = {name: torch.rand_like(p) ** 8 for name, p in model.named_parameters() if p.dim() == 2}
    means = {name: (v.mean(1), v.mean(0)) for name, v in second.items()}
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    names = {id(p): name for name, p in model.named_parameters()}
    inputs, outputs = (f().weight for f in (model.get_input_embeddings, model.get_output_embeddings))
    newest, step_tokens = 0.05 / (1 - 0.95**4), 3.0
    expected = []
    for ids, labels in zip(batch.input_ids_BT, batch.labels_BT, strict=True):
        seen = {}
        hooks = [
            model.get_input_embeddings().register_forward_hook(lambda _, args, out, seen=seen: seen.update(x=out)),
            model.get_output_embeddings().register_forward_hook(lambda _, args, out, seen=seen: seen.update(h=args[0])),
        ]
        losses, _ = token_losses(model(input_ids=ids[None]).logits, labels[None])
        for hook in hooks:
            hook.remove()
        (b,) = torch.autograd.grad(losses.sum(), seen["x"])
        taken = 0.0
        for weight in {id(inputs): inputs, id(outputs): outputs}.values():
            rows, columns = means[names[id(weight)]]
            for word in set(ids.tolist()):
                row = torch.zeros(weight.shape[1])
                for t in range(TOKENS):
                    if weight is inputs and ids[t] == word:
                        row += b[0, t]
                    if weight is outputs and labels[t] == word:
                        row += (torch.exp(-losses[0, t]) - 1) * seen["h"][0, t]
                q = (row.square() * (rows[word] * columns / rows.mean()) ** -0.5).sum()
                grown = 1 - newest + newest * q / rows[word] ** 0.5 / (weight.shape[1] * step_tokens**2)
                taken += float((q * (1 - grown**-0.5)).detach())
        expected.append(taken)
    assert len(expected) == SAMPLES
    assert tied == (kind != "llama")
    common = {"means": means, "sketch": "none", "precondition": "adam_state"}
    plain = scores(model, batch, **common)
    got = plain - scores(model, batch, step_tokens=step_tokens, **common)
    assert agree(got, torch.tensor(expected))
    assert (got > 0.01 * plain.abs()).any()
    # What is not there cannot saturate.
    out = {**common, "include_self": False}
    assert torch.equal(scores(model, batch, **out), scores(model, batch, step_tokens=step_tokens, **out))


@pytest.mark.parametrize("kind", ["gpt_neo", "llama"])
def test_sketched_ghost_is_unbiased(kind):
    """Over seeds, the mean comes close to the exact score. Catches places or signs that head and body share."""
    model, batch = larger(kind).double(), batch_of()
    exact = scores(model, batch, sketch="none", include_self=False)
    sketch = SketchConfig(input_width=1, logit_width=128, hidden_width=12)
    drawn = [scores(model, batch, seed=seed, sketch=sketch, include_self=False) for seed in range(40)]
    drawn = torch.stack(drawn)
    error = (drawn.mean(0) - exact).abs()
    assert (error < 4 * drawn.std(0) / len(drawn) ** 0.5).all()
    assert (drawn.std(0) > 0).all()


def test_nothing_is_left_on_the_model():
    model, batch = larger("llama").double(), batch_of()
    before = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    scores(model, batch)
    assert before == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


def test_adam_factors_of_a_separable_second_moment_make_adams_own_geometry():
    rows, columns = torch.rand(5) + 0.1, torch.rand(7) + 0.1
    v = rows[:, None] * columns[None, :]
    outputs, inputs = adam_factors(v.mean(1), v.mean(0))
    assert torch.allclose(outputs[:, None] * inputs[None, :], v**-0.25)


def test_rows_that_were_never_used_have_finite_factors_and_no_state_scales_nothing():
    outputs, inputs = adam_factors(torch.tensor([0.0, 1.0, 1.0]), torch.tensor([0.5, 0.0]))
    assert outputs.isfinite().all()
    assert inputs.isfinite().all()
    assert outputs[0] > 10 * outputs[1]
    assert [factor.tolist() for factor in adam_factors(torch.zeros(2), torch.zeros(3))] == [[1.0] * 2, [1.0] * 3]


def test_backward_to_inputs_gives_the_same_sketches_and_no_weight_a_gradient():
    """What a validation set's gradient sketch is made of."""
    model, batch = larger("llama_tied").double(), batch_of()
    config = InfluenceConfig(estimator="ghost", sketch="none")
    found = []
    for to_inputs in (False, True):
        scorer = plain_scorer(config, model, 3)
        watched = MicroBatch(scorer, batch, Stopwatch(CPU))
        losses = watched.forward(model)
        watched.before_backward(None)
        model.zero_grad()
        watched.backward_to_inputs() if to_inputs else losses.sum().backward()
        assert all(p.grad is None for p in model.parameters()) == to_inputs
        watched.add()
        found.append(scorer.scores()[0].scores_U)
    assert torch.allclose(*found, rtol=1e-12)
