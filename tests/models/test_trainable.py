"""What is frozen takes no part in any score; what is trained beside it is scored as ever."""

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pipeline.config.schema import ModelConfig
from pipeline.config.schema_influence import InfluenceConfig
from pipeline.config.timing import Stopwatch
from pipeline.data.batch import Batch
from pipeline.influence.check_model import check_model
from pipeline.influence.micro_batch import MicroBatch
from pipeline.models.layers import layers_of
from pipeline.models.load import load_model, small_twin
from pipeline.models.trainable import freeze_all_but
from tests.models.architectures import (
    SAMPLES,
    batch_of,
    error_of,
    gradients_of,
    inner_products,
    random_second_moments,
    scores,
    tiny_model,
    token_pair_scores,
)
from tests.runs import CPU, plain_scorer
from tests.tiny_models import save_tiny

TRAINED = {
    "one block": ("llama", ["*.layers.1.*"]),
    "one matrix": ("llama", ["*.layers.0.self_attn.q_proj.weight"]),
    "all but the head": ("llama", ["model.*"]),
    "all but the words": ("llama", ["*.layers.*", "lm_head.*"]),
    "the head": ("llama", ["lm_head.*"]),
    "a tied head by its other name": ("llama, tied", ["lm_head.*"]),
    "all but a tied head": ("llama, tied", ["*.layers.*", "*norm*"]),
    "Conv1D": ("gpt2", ["*.c_attn.*"]),
    "experts": ("mixtral", ["*.layers.1.*experts*"]),
    "all but experts": ("mixtral", ["*norm*", "*self_attn*", "*.gate.*", "lm_head*", "*embed*"]),
}


def partly_trained(case: str) -> nn.Module:
    name, patterns = TRAINED[case]
    model = tiny_model(name)
    freeze_all_but(model, patterns)
    return model


@pytest.mark.parametrize("adam", [False, True])
@pytest.mark.parametrize("case", TRAINED)
def test_ghost_scores_are_inner_products_of_the_trained_weights_gradients(case, adam):
    """Catches frozen weights in the score, and hooks that hang on a word embedding's or a head's gradient."""
    model, batch = partly_trained(case), batch_of()
    second = random_second_moments(model) if adam else None
    if second:  # of what is trained: others have none
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        second = second.__class__(
            {name: pair for name, pair in second.means.items() if name.partition("[")[0] in trained}, 0.95, 3
        )
    claimed = layers_of(model).weights
    assert claimed <= {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    expected = inner_products(gradients_of(model, batch), claimed, False, second)
    assert error_of(scores(model, batch, second, estimator="ghost", include_self=False), expected) < 1e-6
    if second:  # saturation looks for the rows of words and head
        assert scores(model, batch, second, estimator="ghost").isfinite().all()


@pytest.mark.parametrize("case", TRAINED)
def test_the_check_of_a_model_looks_at_what_is_trained(case):
    check_model(partly_trained(case))


@pytest.mark.parametrize("case", TRAINED)
def test_a_reference_needs_no_gradient_of_the_words(case):
    """A validation set's backward goes as far as what is scored. Catches one that ends at the first layer it meets."""
    model, batch, sketches = partly_trained(case), batch_of(), []
    config = InfluenceConfig(estimator="ghost", sketch="none")
    for inputs in (True, False):
        watched = MicroBatch(plain_scorer(config, model, 3), batch, Stopwatch(CPU))
        losses_BT = watched.forward(model)
        watched.before_backward(None)
        watched.backward_to_inputs() if inputs else losses_BT.sum().backward()
        assert not inputs or all(parameter.grad is None for parameter in model.parameters())
        sketches.append(watched.gradients().sketch_UM)
    assert sketches[0].abs().max() > 0
    torch.testing.assert_close(*sketches)


@pytest.mark.parametrize("case", TRAINED)
def test_lai_reads_the_inputs_of_trained_layers_with_the_logit_gradient(case):
    model, batch = partly_trained(case), batch_of()
    matrices = [module for module in model.modules() if isinstance(module, nn.Linear | Conv1D) or _is_block(module)]
    trained = [module for module in matrices if next(module.parameters()).requires_grad]
    expected = token_pair_scores(model, batch, trained, include_self=False)
    assert error_of(scores(model, batch, estimator="lai", include_self=False), expected) < 1e-6


def _is_block(module: nn.Module) -> bool:
    return type(module).__name__ in ("MixtralExperts", "MixtralTopKRouter")


@pytest.mark.parametrize("case", TRAINED)
def test_lli_is_for_a_trained_head(case):
    model, batch = partly_trained(case), batch_of()
    head = model.get_output_embeddings()
    if head.weight.requires_grad:
        expected = token_pair_scores(model, batch, [head], include_self=False)
        assert error_of(scores(model, batch, estimator="lli", include_self=False), expected) < 1e-6
    else:
        with pytest.raises(ValueError, match=r"'lli' scores by the LM head's input, and .* is frozen; choose lai or"):
            scores(model, batch, estimator="lli")


def per_sample(model: nn.Module, batch: Batch, name: str) -> Tensor:
    """(B,), without a sketch; each sample in its batch."""
    return scores(model, batch, estimator=name, include_self=False)


def test_only_the_words_is_for_ghost():
    model = tiny_model("llama")
    freeze_all_but(model, ["*embed_tokens*"])
    with pytest.raises(ValueError, match=r"'lai' scores by the inputs of trained linear layers, and there are none"):
        per_sample(model, batch_of(), "lai")
    expected = inner_products(gradients_of(model, batch_of()), {"model.embed_tokens.weight"}, False)
    assert error_of(per_sample(model, batch_of(), "ghost"), expected) < 1e-6


def test_only_norms_is_for_controls():
    model = tiny_model("llama")
    freeze_all_but(model, ["*norm*"])
    for name in ("lai", "residual", "ghost"):
        with pytest.raises(ValueError, match="nothing that is trained could be scored"):
            per_sample(model, batch_of(), name)
    assert len(per_sample(model, batch_of(), "loss")) == SAMPLES


def test_half_of_an_expert_is_refused():
    model = tiny_model("mixtral")
    freeze_all_but(model, ["*down_proj"])
    with pytest.raises(ValueError, match=r"train both or none \(model\.trainable\)"):
        per_sample(model, batch_of(), "lai")


def trained_in(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_the_key_freezes_all_else_and_a_twin_is_frozen_alike(tmp_path):
    """Catches patterns that hold for blocks which a twin of fewer blocks lacks."""
    directory = str(save_tiny("llama", tmp_path / "llama"))
    config = ModelConfig(directory, trainable="*.layers.1.mlp.*")
    model = load_model(config, 0)
    assert trained_in(model) == {f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    twin = small_twin(config, model)
    assert trained_in(twin) == {
        f"model.layers.{block}.mlp.{part}_proj.weight" for block in (0, 1) for part in ("gate", "up", "down")
    }
    several = load_model(ModelConfig(directory, trainable=["*norm*", "lm_head.weight"]), 0)
    assert {name for name in trained_in(several) if "norm" not in name} == {"lm_head.weight"}


def test_a_pattern_that_matches_nothing_is_named_with_near_ones(tmp_path):
    directory = str(save_tiny("llama", tmp_path / "llama"))
    with pytest.raises(ValueError, match=r"matches 'model\.layers\.1\.mlp\.gate'.* model\.layers\.\*\.mlp\.gate_proj"):
        load_model(ModelConfig(directory, trainable=["*norm*", "model.layers.1.mlp.gate"]), 0)
