"""Scores of classifiers against loops over single texts, each in a forward of its own, without padding."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pipeline.config.answers import Answers
from pipeline.config.schema import ModelConfig
from pipeline.config.schema_influence import InfluenceConfig
from pipeline.data.batch import IGNORE, Batch, Unit
from pipeline.data.samples import answer_positions
from pipeline.influence.check_model import gradient_errors
from pipeline.models.layers import head_of, layers_of
from pipeline.models.load import load_model
from pipeline.tasks.classification import losses_of
from tests.runs import forward_scores, ghost_scores, plain_scorer

PADDING = 0
CLASSES = 3
TEXTS = [[5, 9, 7, 200, 31], [8, 8], [17, 250, 3, 4, 99, 42, 1], [60, 61, 62]]
LABELS = [2, 0, 1, 2]
KINDS = ["bert", "gpt_neo", "gpt2", "llama"]


def classifier(directory: Any, dtype: torch.dtype = torch.float64) -> Any:
    answers = Answers([f"class {index}" for index in range(CLASSES)], PADDING)
    model = load_model(ModelConfig(name_or_path=str(directory), dropout=0.0), 0, answers=answers)
    with torch.no_grad():
        head_of(model).module.weight.mul_(20)  # type: ignore[operator,union-attr]
    return model.to(dtype)


def batch_of(texts: list[list[int]] = TEXTS, labels: list[int] = LABELS) -> Batch:
    length = max(map(len, texts))
    ids_BT = torch.tensor([text + [PADDING] * (length - len(text)) for text in texts])
    mask_BT = torch.tensor([[1] * len(text) + [0] * (length - len(text)) for text in texts])
    labels_BT = torch.full_like(ids_BT, IGNORE)
    for row, label in enumerate(labels):
        labels_BT[row, len(texts[row]) - 1] = label
    units = [Unit(row, row, (row * length, (row + 1) * length), [row], "-") for row in range(len(texts))]
    return Batch(ids_BT, labels_BT, units, {"attention_mask": mask_BT}, PADDING)


def inputs_and_gradient(
    model: Any,
    text: list[int],
    label: int,
    names: list[str],
    of_text: Callable[[Tensor], Tensor] = lambda rows: rows.sum(0),
) -> tuple[dict[str, Tensor], Tensor]:
    """Of one text alone: what `of_text` makes of every layer's inputs, by default their sum over positions (of the
    head's the one that answers), a row a call, and the logit gradient by autograd."""
    seen: dict[str, list[Tensor]] = {}
    modules = dict(model.named_modules())

    def keep(name: str):
        return lambda _, args: seen.setdefault(name, []).append(args[0].detach().flatten(0, -2))

    hooks = [modules[name].register_forward_pre_hook(keep(name)) for name in names]
    logits = model(input_ids=torch.tensor([text])).logits
    for hook in hooks:
        hook.remove()
    gradient = torch.autograd.grad(F.cross_entropy(logits, torch.tensor([label])), logits)[0][0]
    summed = {}
    for name, calls in seen.items():  # some models read a layer several times
        summed[name] = torch.stack([rows[-1] if name == head_of(model).name else of_text(rows) for rows in calls])
    return summed, gradient


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("estimator", ["lai", "lli"])
def test_layer_aware_scores_are_those_of_single_texts_without_padding(tiny_model, kind, estimator):
    """Catches padding that counts, a pooled layer that is lost or counts at every position, and a GPT-style head whose
    other positions count."""
    model = classifier(tiny_model(kind))
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    names = [head_of(model).name] if estimator == "lli" else names
    found = [inputs_and_gradient(model, *pair, names) for pair in zip(TEXTS, LABELS, strict=True)]
    expected = [
        sum(
            float(sum((own[name] * other[name]).sum() for name in names) * (own_gradient @ gradient))
            for other, gradient in found
        )
        for own, own_gradient in found
    ]
    influence = InfluenceConfig(estimator=estimator, sketch="none")
    [scores] = forward_scores(plain_scorer(influence, model, 0), model, batch_of())
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["bert", "gpt_neo"])
@pytest.mark.parametrize("positions", ["mean", "first"])
def test_other_weights_of_positions_are_those_of_single_texts_without_padding(tiny_model, kind, positions):
    """Catches a mean over padding too, and a pooled layer that is divided by its text's length."""
    model = classifier(tiny_model(kind))
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    of_text = {"mean": lambda rows: rows.mean(0), "first": lambda rows: rows[0]}[positions]
    found = [inputs_and_gradient(model, *pair, names, of_text) for pair in zip(TEXTS, LABELS, strict=True)]
    sketches = [torch.outer(torch.cat([rows[0] for rows in inputs.values()]), g).flatten() for inputs, g in found]
    whole = torch.stack(sketches)
    influence = InfluenceConfig(estimator="lai", sketch="none", positions=positions)
    [scores] = forward_scores(plain_scorer(influence, model, 0), model, batch_of())
    torch.testing.assert_close(scores, (whole @ whole.T).sum(1), rtol=1e-6, atol=1e-12)
    [summed] = forward_scores(plain_scorer(InfluenceConfig(sketch="none"), model, 0), model, batch_of())
    assert not torch.allclose(scores, summed, rtol=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_ghost_scores_are_inner_products_of_true_gradients_of_single_texts(tiny_model, kind):
    """By autograd of each text alone, over all linear layers and the word embedding."""
    model = classifier(tiny_model(kind))
    weights = layers_of(model).weights
    parameters = [parameter for name, parameter in model.named_parameters() if name in weights]
    gradients = []
    for text, label in zip(TEXTS, LABELS, strict=True):
        loss = F.cross_entropy(model(input_ids=torch.tensor([text])).logits, torch.tensor([label]))
        parts = torch.autograd.grad(loss, parameters)
        gradients.append(torch.cat([part.flatten() for part in parts]))
    whole = torch.stack(gradients)
    expected = (whole @ whole.T).sum(1)
    influence = InfluenceConfig(estimator="ghost", sketch="none")
    scores = ghost_scores(influence, model, batch_of(), 0, factor=3.0)
    torch.testing.assert_close(scores, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_sketched_scores_of_classifiers_are_unbiased(tiny_model, kind):
    model, exact = classifier(tiny_model(kind)), InfluenceConfig(estimator="lai", sketch="none")
    [expected] = forward_scores(plain_scorer(exact, model, 0), model, batch_of())
    sketched = InfluenceConfig(estimator="lai")
    found = torch.stack([forward_scores(plain_scorer(sketched, model, s), model, batch_of())[0] for s in range(20)])
    assert float((found.mean(0) - expected).abs().max()) < 0.05 * float(expected.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_their_gradients_are_pytorchs(tiny_model, kind):
    model, batch = classifier(tiny_model(kind)), batch_of()
    logits = model(input_ids=batch.input_ids_BT, **batch.others).logits
    losses_BT, _ = losses_of(logits, batch.labels_BT)
    expected_B = F.cross_entropy(logits, torch.tensor(LABELS), reduction="none")
    assert (losses_BT != 0).sum() == len(TEXTS)
    torch.testing.assert_close(losses_BT.sum(1), expected_B)
    weights = torch.tensor([1.0, 0.0, 2.0, 0.5], dtype=torch.float64)
    own = torch.autograd.grad((losses_BT.sum(1) * weights).sum(), logits, retain_graph=True)[0]
    torch.testing.assert_close(own, torch.autograd.grad((expected_B * weights).sum(), logits)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_ghost_sees_every_gradient_of_a_classifier(tiny_model, kind):
    errors = gradient_errors(classifier(tiny_model(kind), torch.float32))
    assert len(errors) > 8
    assert max(errors.values()) < 1e-3


def test_a_text_without_label_counts_for_nothing_and_spoils_nothing(tiny_model):
    """One that is left out."""
    model, batch = classifier(tiny_model("gpt_neo")), batch_of()
    batch.labels_BT[1] = IGNORE
    influence = InfluenceConfig(estimator="lai", sketch="none")
    [scores] = forward_scores(plain_scorer(influence, model, 0), model, batch)
    assert scores[1] == 0
    others = batch_of([text for row, text in enumerate(TEXTS) if row != 1], [2, 1, 2])
    [alone] = forward_scores(plain_scorer(influence, model, 0), model, others)
    torch.testing.assert_close(scores[[0, 2, 3]], alone)


@pytest.mark.parametrize("kind", ["gpt_neo", "llama"])
def test_labels_stand_where_gpt_style_models_answer(tiny_model, kind):
    """Also where a text holds the padding token itself, or is nothing else."""
    model = classifier(tiny_model(kind))
    ids_BT = torch.tensor([[5, PADDING, 7, 8, PADDING], [9, PADDING, PADDING, PADDING, PADDING], [0, 0, 0, 0, 0]])
    seen: list[Tensor] = []
    with head_of(model).module.register_forward_hook(lambda _m, _a, out: seen.append(out)):
        logits = model(input_ids=ids_BT).logits
    at_B = answer_positions(ids_BT, PADDING)
    assert at_B.tolist() == [3, 0, 0]
    torch.testing.assert_close(seen[0][torch.arange(3), at_B], logits)
