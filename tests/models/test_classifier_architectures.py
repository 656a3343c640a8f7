"""Every architecture that transformers maps to a classifier of texts, tiny and random: are its scores right?

`pytest tests/models/test_classifier_architectures.py -rs` names those of which there is no tiny model.
"""

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as NAMES

from pipeline.config.answers import Answers
from pipeline.config.schema_influence import InfluenceConfig
from pipeline.influence.check_model import reads_padding, refuse_unknown_answers
from pipeline.models.classifier import with_answers
from pipeline.models.layers import head_of, layers_of
from tests.influence.test_classification import CLASSES, LABELS, PADDING, TEXTS, batch_of, inputs_and_gradient
from tests.models.tiny_configs import tiny_config
from tests.runs import forward_scores, ghost_scores, plain_scorer

COMMON = ["albert", "bert", "deberta-v2", "distilbert", "gpt2", "modernbert", "qwen3", "roberta", "xlm-roberta"]


def tiny_classifier(kind: str) -> Any:
    """In float64 where it can be; skips where there is no tiny model, none that takes plain texts, or its own answers
    depend on padding."""
    try:
        config = tiny_config(kind)
        with_answers(config, Answers([str(index) for index in range(CLASSES)], PADDING))
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(3)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        whole_BC, alone_BC = _answers(model.eval())
    except Exception as error:
        if kind in COMMON:
            raise
        pytest.skip(f"no tiny {kind}: {type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}")
    try:
        _answers(model.double())
    except RuntimeError:  # experts' products want 32 bits
        model.float()
    if float((whole_BC - alone_BC).abs().max() / alone_BC.abs().max()) > 1e-4:
        assert kind not in COMMON
        pytest.skip(f"{kind} reads padding")
    return model


@torch.no_grad()
def _answers(model: Any) -> tuple[Tensor, Tensor]:
    """Of all texts together, and of each alone."""
    batch = batch_of()
    whole_BC = model(input_ids=batch.input_ids_BT, **batch.others).logits
    return whole_BC, torch.cat([model(input_ids=torch.tensor([text])).logits for text in TEXTS])


def token_pairs(model: Any, head_only: bool) -> Tensor:
    names = [head_of(model).name] if head_only else list(layers_of(model).linear)
    found = [inputs_and_gradient(model, *pair, names) for pair in zip(TEXTS, LABELS, strict=True)]
    return torch.stack(
        [
            sum(  # type: ignore[misc]
                (own[name] * other[name]).sum() * (own_gradient @ gradient)
                for other, gradient in found
                for name in own.keys() & other.keys()
            )
            for own, own_gradient in found
        ]
    )


def true_products(model: Any) -> Tensor:
    weights = layers_of(model).weights
    parameters = [parameter for name, parameter in model.named_parameters() if name in weights]
    rows = []
    for text, label in zip(TEXTS, LABELS, strict=True):
        loss = F.cross_entropy(model(input_ids=torch.tensor([text])).logits, torch.tensor([label]))
        parts = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([part.flatten() for part in parts]))
    whole = torch.stack(rows)
    return (whole @ whole.T).sum(1)


def slowly(kinds: list[str]) -> list[Any]:
    return [kind if kind in COMMON else pytest.param(kind, marks=pytest.mark.slow) for kind in kinds]


@pytest.mark.parametrize("kind", slowly(list(NAMES)))
def test_scores_are_right_or_refused_by_name(kind):
    """Catches an architecture that answers elsewhere than at the end of a text, or mixes texts, in silence."""
    warnings.filterwarnings("ignore")
    model = tiny_classifier(kind)
    exact = 1e-6 if model.dtype == torch.float64 else 1e-3
    for estimator in ("lai", "lli", "ghost"):
        influence = InfluenceConfig(estimator=estimator, sketch="none")
        told = ""
        try:
            head = head_of(model)
            refuse_unknown_answers(model, {head.name: head} if estimator == "lli" else layers_of(model).linear)
            if estimator == "ghost":
                scores, expected = ghost_scores(influence, model, batch_of(), 0), true_products(model)
            else:
                [scores] = forward_scores(plain_scorer(influence, model, 0), model, batch_of())
                expected = token_pairs(model, estimator == "lli")
        except ValueError as refusal:
            told = str(refusal)
        if told:
            assert kind not in COMMON, told
            assert "choose" in told
        else:
            assert float((scores - expected).abs().max() / expected.abs().max()) < exact, estimator


def test_a_padding_token_at_the_end_of_the_vocabulary_is_no_trouble():
    """Where people append one. Catches a check that reads a word beyond the table."""
    config = tiny_config("gpt2", vocab_size=4)
    with_answers(config, Answers(["a", "b"], 3))
    model = AutoModelForSequenceClassification.from_config(config)
    refuse_unknown_answers(model, layers_of(model).linear)
    assert reads_padding(model) == ""


def test_a_model_that_reads_padding_is_said_to():
    config = tiny_config("fnet")
    with_answers(config, Answers(["a", "b"], PADDING))
    assert "FNetForSequenceClassification reads padding" in reads_padding(
        AutoModelForSequenceClassification.from_config(config)
    )
    assert reads_padding(tiny_classifier("bert")) == ""
