"""Which weights of a model are scored, how they lie in memory, and what is left out."""

import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM, OlmoeConfig, OlmoeForCausalLM
from transformers.pytorch_utils import Conv1D

from pipeline.config.schema_influence import InfluenceConfig, SketchConfig
from pipeline.data.batch import Batch, Unit, next_token_labels
from pipeline.models.experts import Experts
from pipeline.models.layers import POSITIONS, VECTOR, Layer, head_of, layers_of
from tests.runs import forward_scores, plain_scorer
from tests.tiny_models import VOCABULARY, tiny

KINDS = ["gpt_neo", "gpt2", "llama", "llama_tied"]


def mixture_of_experts(kind: str) -> nn.Module:
    """Its experts and routers are bare parameters, of three dimensions and of two."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    torch.manual_seed(7)
    if kind == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=1, num_local_experts=4))
    return OlmoeForCausalLM(OlmoeConfig(**sizes, num_key_value_heads=2, num_experts=4))


@pytest.mark.parametrize("kind", KINDS)
def test_every_trained_parameter_is_scored_or_left_out_by_a_stated_rule(kind):
    """Catches a tied weight that counts as two, and one that nobody claims."""
    model = tiny(kind)
    found, parameters = layers_of(model), dict(model.named_parameters())
    scored = {layer.weight for layer in (*found.linear.values(), found.words)}
    assert scored.isdisjoint(found.left_out)
    assert scored | found.left_out.keys() == parameters.keys()
    for name, rule in found.left_out.items():
        assert rule == (POSITIONS if name.endswith("wpe.weight") else VECTOR)
        assert (parameters[name].dim() == 1) == (rule == VECTOR)
    assert (found.head.weight == found.words.weight) == (kind != "llama")
    assert found.linear.keys() - found.body.keys() == {"lm_head"}
    modules = dict(model.named_modules())
    for name, layer in {**found.linear, found.words.name: found.words}.items():
        assert layer.name == name
        assert layer.module is modules[name]
        assert parameters[layer.weight] is modules[name].weight


def gradient_of_one_token(layer: Layer, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the weight gets of an output gradient that is handed to the module, and that."""
    output = layer.module(x)
    given = torch.rand(output.shape, generator=torch.Generator().manual_seed(2)) + 0.1
    (gradient,) = torch.autograd.grad((output * given).sum(), layer.module.weight)
    return gradient, given


@pytest.mark.parametrize("kind", KINDS)
def test_layers_know_their_inputs_from_their_outputs_however_they_are_stored(kind):
    """Catches Conv1D, and an embedding, taken for stored as nn.Linear is. The gradient of one token is the product of
    its input and output gradient, so the means of its square over either side are known up to a number."""
    found = layers_of(tiny(kind))
    kinds = {type(layer.module) for layer in found.linear.values()}
    assert kinds == ({nn.Linear, Conv1D} if kind == "gpt2" else {nn.Linear})
    for layer in found.linear.values():
        x = torch.rand(1, 1, layer.inputs, generator=torch.Generator().manual_seed(1)) + 0.1
        gradient, given = gradient_of_one_token(layer, x)
        assert given.shape == (1, 1, layer.outputs)
        assert layer.input_rows((x,)).shape == (1, layer.inputs)
        assert layer.output_rows(given).shape == (1, layer.outputs)
        square = gradient.square()
        outputs, inputs = layer.means({layer.weight: (square.mean(1), square.mean(0))})
        torch.testing.assert_close(outputs, given.flatten().square() * x.square().mean())
        torch.testing.assert_close(inputs, x.flatten().square() * given.square().mean())


@pytest.mark.parametrize("kind", KINDS)
def test_the_means_of_a_layer_are_over_its_inputs_and_over_its_outputs(kind):
    model = tiny(kind)
    found = layers_of(model)
    for layer in (*found.linear.values(), found.words):
        v = torch.rand(dict(model.named_parameters())[layer.weight].shape)
        # Inputs first.
        v_DO = v if isinstance(layer.module, Conv1D) else v.T
        assert v_DO.shape == (layer.inputs, layer.outputs)
        outputs, inputs = layer.means({layer.weight: (v.mean(1), v.mean(0))})
        torch.testing.assert_close(outputs, v_DO.mean(0))
        torch.testing.assert_close(inputs, v_DO.mean(1))


@pytest.mark.parametrize("kind", KINDS)
def test_the_word_embedding_has_the_vocabulary_as_its_outputs_as_the_head_has(kind):
    found = layers_of(tiny(kind))
    words, head = found.words, found.head
    assert (words.inputs, words.outputs) == (head.inputs, head.outputs) == (16, VOCABULARY)
    ids = torch.tensor([[5]])
    gradient, given = gradient_of_one_token(words, ids)
    assert words.input_rows((ids,)).tolist() == [5]
    square = gradient.square()
    rows, columns = words.means({words.weight: (square.mean(1), square.mean(0))})
    assert rows.nonzero().flatten().tolist() == [5]
    torch.testing.assert_close(rows[5], given.square().mean())
    torch.testing.assert_close(columns, given.flatten().square() / VOCABULARY)


def test_logical_sizes_are_the_whole_weights_where_zero_3_holds_a_part():
    model = tiny("gpt2")
    whole = layers_of(model)
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    parts = layers_of(model)
    for name, layer in whole.linear.items():
        assert (parts.linear[name].inputs, parts.linear[name].outputs) == (layer.inputs, layer.outputs)
    assert (parts.words.inputs, parts.words.outputs) == (16, VOCABULARY)
    assert parts.left_out == whole.left_out


def test_fused_layers_count_once_and_conv1d_is_a_layer():
    layers = layers_of(tiny("gpt2")).linear
    assert sum(isinstance(layer.module, Conv1D) for layer in layers.values()) == 8
    assert "lm_head" in layers


def test_the_head_is_the_lm_head_alone():
    model = tiny("gpt_neo")
    head = head_of(model)
    assert (head.name, head.module) == ("lm_head", model.lm_head)
    headless = nn.Module()
    headless.get_output_embeddings = lambda: None  # type: ignore[assignment]
    with pytest.raises(ValueError, match="no linear LM head"):
        head_of(headless)


@pytest.mark.parametrize("kind", ["mixtral", "olmoe"])
def test_experts_and_routers_are_layers(kind):
    """Catches a score that leaves half of the model out: every expert's two matrices, and the router's one."""
    model = mixture_of_experts(kind)
    found = layers_of(model)
    inside = {name for name, _ in model.named_parameters() if ".mlp." in name}
    assert inside <= found.weights
    experts = [layer for layer in found.linear.values() if isinstance(layer, Experts)]
    assert [len(layer.matrices) for layer in experts] == [2 * 4, 2 * 4]
    assert {(m.inputs, m.outputs) for m in experts[0].matrices.values()} == {(16, 48), (24, 16)}


@pytest.mark.parametrize("estimator", ["lai", "residual", "ghost"])
def test_weights_that_no_layer_covers_are_refused_by_name_with_their_share(estimator):
    """Catches a score that leaves weights out in silence."""
    model = mixture_of_experts("mixtral")
    model.model.layers[0].extra = nn.Parameter(torch.ones(40, 16))
    share = 640 / sum(p.numel() for p in model.parameters())
    with pytest.raises(ValueError, match=f"trains 1 weights, {share:.0%} of its parameters") as refused:
        plain_scorer(InfluenceConfig(estimator=estimator), model, 0)
    assert type(model).__name__ in str(refused.value)
    assert "model.layers.0.extra 40x16" in str(refused.value)
    assert "lli" in str(refused.value)


@pytest.mark.parametrize("estimator", ["lli", "loss", "random", "none"])
@pytest.mark.parametrize("kind", ["mixtral", "olmoe"])
def test_estimators_that_claim_the_head_only_or_nothing_take_a_model_with_experts(kind, estimator):
    model, ids = mixture_of_experts(kind), torch.randint(0, VOCABULARY, (3, 8))
    batch = Batch(ids, next_token_labels(ids), [Unit(i, i, (8 * i, 8 * i + 8), [i], "-") for i in range(3)])
    influence = InfluenceConfig(estimator=estimator, sketch=SketchConfig(8, 32, 8))
    [scores] = forward_scores(plain_scorer(influence, model, 0), model, batch)
    assert scores.isfinite().tolist() == [estimator != "none"] * 3


def test_what_is_not_trained_needs_no_score():
    model = mixture_of_experts("mixtral")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".mlp." not in name)
    assert not any(".mlp." in name for name in layers_of(model).left_out)
