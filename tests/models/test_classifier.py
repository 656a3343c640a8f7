"""A classification head on the weights of another model."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, T5Config

from pipeline.config.answers import Answers
from pipeline.config.schema import ModelConfig
from pipeline.influence.check_model import refuse_unknown_answers
from pipeline.models.classifier import with_answers
from pipeline.models.layer import AnswerHead
from pipeline.models.layers import head_of, layers_of
from pipeline.models.load import load_model, small_twin
from tests.tiny_models import tiny

ANSWERS = Answers(["a", "b", "c"], 0)


@pytest.mark.parametrize("kind", ["bert", "gpt_neo", "gpt2", "llama"])
def test_the_body_is_the_checkpoints_and_the_head_is_new_and_the_seeds(tiny_model, kind, capsys):
    """Catches a body that is made anew with the head, in silence."""
    config = ModelConfig(name_or_path=str(tiny_model(kind)))
    model = load_model(config, 5, answers=ANSWERS)
    told = capsys.readouterr().out
    assert "as a classifier:" in told
    assert "made anew, at random" in told
    own = AutoModelForSequenceClassification.from_pretrained(tiny_model(kind)).base_model.state_dict()
    assert own.keys() == model.base_model.state_dict().keys()
    assert all(torch.equal(own[name], value) for name, value in model.base_model.state_dict().items())
    assert (model.config.num_labels, model.config.id2label) == (3, {0: "a", 1: "b", 2: "c"})
    head = head_of(model)
    assert isinstance(head, AnswerHead)
    assert (head.inputs, head.outputs) == (16, 3)
    assert head.name in layers_of(model).linear
    heads = [head_of(load_model(config, seed, answers=ANSWERS)).module.weight for seed in (5, 6)]
    assert torch.equal(heads[0], head.module.weight)  # type: ignore[arg-type]
    assert not torch.equal(heads[1], head.module.weight)  # type: ignore[arg-type]
    twin = small_twin(config, model, ANSWERS)
    assert head_of(twin).outputs == 3


def test_a_body_with_a_missing_weight_is_refused(tmp_path):
    model = tiny("bert")
    state = {name: value for name, value in model.state_dict().items() if "layer.1.output.dense.weight" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"missing, so random: .*layer\.1\.output\.dense\.weight"):
        load_model(ModelConfig(name_or_path=str(tmp_path)), 0, answers=ANSWERS)


def test_a_head_for_other_labels_is_refused_and_one_for_the_same_is_gone_on_with(tiny_model, tmp_path):
    """Catches answers whose order is another: the model would unlearn what it knows, in silence."""
    model = load_model(ModelConfig(name_or_path=str(tiny_model("gpt_neo"))), 0, answers=ANSWERS)
    model.save_pretrained(tmp_path)
    saved = ModelConfig(name_or_path=str(tmp_path))
    for classes in (["a", "c", "b"], ["a", "b"], ["x", "y", "z"]):
        with pytest.raises(ValueError, match="its classification head answers a, b, c, and the labels are"):
            load_model(saved, 0, answers=Answers(classes, 0))
    again = load_model(saved, 1, answers=ANSWERS)
    assert torch.equal(head_of(again).module.weight, head_of(model).module.weight)  # type: ignore[arg-type]


def test_an_encoder_with_a_decoder_is_refused():
    with pytest.raises(ValueError, match="it is an encoder with a decoder; give an encoder or a GPT-style model"):
        with_answers(T5Config(), ANSWERS)


def test_a_classifier_that_answers_elsewhere_or_mixes_texts_is_refused(tiny_model):
    """Catches scores of a head that reads another position, and of layers whose rows are not one text's."""
    model = load_model(ModelConfig(name_or_path=str(tiny_model("bert"))), 0, answers=ANSWERS)
    refuse_unknown_answers(model, layers_of(model).linear)
    encoder = model.base_model.encoder
    with (
        encoder.layer[1].register_forward_pre_hook(lambda _, args: (args[0].flip(0), *args[1:])),
        pytest.raises(ValueError, match="linear layers of BertForSequenceClassification mix texts of a batch"),
    ):
        refuse_unknown_answers(model, layers_of(model).linear)
    gpt = load_model(ModelConfig(name_or_path=str(tiny_model("gpt_neo"))), 0, answers=ANSWERS)
    refuse_unknown_answers(gpt, layers_of(gpt).linear)
    other = gpt.register_forward_hook(lambda _module, _args, out: setattr(out, "logits", out.logits.flip(0)))
    with other, pytest.raises(ValueError, match="GPTNeoForSequenceClassification does not answer with its last linear"):
        refuse_unknown_answers(gpt, layers_of(gpt).linear)
