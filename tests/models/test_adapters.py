"""Adapters of the peft library: their gradients are scored, and what is no plain LoRA is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from pipeline.config.schema import ModelConfig
from pipeline.influence.check_model import check_model
from pipeline.models.adapters import add_adapter
from pipeline.models.layers import layers_of
from pipeline.models.load import load_model, model_without_weights, small_twin
from tests.models.architectures import (
    batch_of,
    error_of,
    gradients_of,
    inner_products,
    scores,
    tiny_model,
    token_pair_scores,
)
from tests.tiny_models import save_tiny

LORA: dict[str, Any] = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8}


def config_file(directory: Path, **settings: Any) -> str:
    directory.mkdir(exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(LORA | settings))
    return str(directory)


def adapted(name: str, directory: Path, **settings: Any) -> nn.Module:
    """With adapters that do something: peft's own begin at zero."""
    model = tiny_model(name)
    add_adapter(model, config_file(directory, **settings), 0)
    return drawn(model.double())


def drawn(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return model


PLAIN = {
    "attention": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "all linear layers": ("llama", {"target_modules": "all-linear"}),
    "the head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "a tied head": ("llama, tied", {"target_modules": ["lm_head"]}),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "a bias, another scale": ("gpt2", {"target_modules": ["c_attn"], "lora_bias": True, "use_rslora": True}),
    "the whole head too": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "the whole words too": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "both": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
}


@pytest.mark.parametrize("case", PLAIN)
def test_what_an_adapter_trains_is_scored_exactly(tmp_path, case):
    """`ghost` against autograd, `lai` against token pairs of the adapters' inputs. Catches a frozen base in the score,
    a head or words that are looked for at the wrapper, and an adapter's scale that is taken twice."""
    name, settings = PLAIN[case]
    model, batch = adapted(name, tmp_path / "peft", **settings), batch_of()
    layers = layers_of(model)
    assert layers.weights
    assert layers.weights | layers.left_out.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    expected = inner_products(gradients_of(model, batch), layers.weights, False)
    assert error_of(scores(model, batch, estimator="ghost", include_self=False), expected) < 1e-6
    read = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear) and next(module.parameters()).requires_grad
    ]
    expected = token_pair_scores(model, batch, read, include_self=False)
    assert error_of(scores(model, batch, estimator="lai", include_self=False), expected) < 1e-6
    check_model(model)


def test_a_model_that_people_wrapped_themselves_is_scored_as_well():
    model = drawn(get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj", "lm_head"])).double())
    batch, claimed = batch_of(), layers_of(model).weights
    assert len(claimed) == 6
    expected = inner_products(gradients_of(model, batch), claimed, False)
    assert error_of(scores(model, batch, estimator="ghost", include_self=False), expected) < 1e-6


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"use_dora": True}, r"adapter at model\.layers\.0\.self_attn\.q_proj \(.*Dora.* is no plain LoRA"),
        ({"target_modules": ["embed_tokens"]}, r"model\.embed_tokens \(.*lora\.layer\.Embedding\) is no plain LoRA"),
        ({"peft_type": "IA3", "feedforward_modules": []}, r"q_proj \(.*ia3\.layer\.Linear\) is no plain LoRA"),
        ({"peft_type": "LOHA"}, r"q_proj \(.*loha\.layer\.Linear\) is no plain LoRA"),
        (
            {"trainable_token_indices": [1, 2]},
            r"embed_tokens\.token_adapter \(.*TrainableTokensLayer\) is no plain LoRA",
        ),
    ],
)
def test_other_adapters_are_refused_by_name_for_what_reads_weights(tmp_path, settings, said):
    model, batch = adapted("llama", tmp_path / "peft", **{"target_modules": ["q_proj"]} | settings), batch_of()
    for name in ("lai", "residual", "ghost"):
        with pytest.raises(ValueError, match=said):
            scores(model, batch, estimator=name)
    assert scores(model, batch, estimator="loss").isfinite().all()


def test_lora_on_bare_expert_weights_is_refused(tmp_path):
    model = adapted("mixtral", tmp_path / "peft", target_parameters=["mlp.experts.gate_up_proj"], target_modules=[])
    with pytest.raises(ValueError, match=r"mlp\.experts \(.*ParamWrapper\) is no plain LoRA"):
        scores(model, batch_of(), estimator="lai")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"target_modules": ["nope"]}, r"the adapter cannot be added to LlamaForCausalLM: .*nope"),
        ({"peft_type": "PROMPT_TUNING"}, r"cannot be added|does not take"),
        ({"peft_type": "LARO"}, r"does not take the config"),
        ({"init_lora_weights": "pissa"}, r"'pissa' changes the weights that the adapter is for"),
    ],
)
def test_what_cannot_be_added_is_one_sentence(tmp_path, settings, said):
    with pytest.raises(ValueError, match=rf"model\.peft: .*{said}"):
        adapted("llama", tmp_path / "peft", **settings)


def test_no_config_is_one_sentence(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(ValueError, match=r"is no PEFT config .*adapter_config\.json or a directory with one"):
            add_adapter(tiny_model("llama"), str(path), 0)
    with pytest.raises(ValueError, match=r"leave out model\.trainable"):
        ModelConfig("gpt2", peft=str(tmp_path), trainable="*")


def test_a_twin_and_a_model_without_weights_have_the_same_adapters(tmp_path):
    """Catches blocks by number, which a twin of fewer does not have."""
    path = config_file(tmp_path / "peft", target_modules=["q_proj"], layers_to_transform=[1])
    config = ModelConfig(str(save_tiny("llama", tmp_path / "llama")), peft=path)
    model = load_model(config, 0)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"model.layers.1.self_attn.q_proj.lora_{part}.default.weight" for part in "AB"}
    twin = small_twin(config, model)
    assert sum(parameter.requires_grad for parameter in twin.parameters()) == 4
    bare = model_without_weights(config, torch.float32)
    assert {name for name, parameter in bare.named_parameters() if parameter.requires_grad} == trained
    assert all(parameter.is_meta for parameter in bare.parameters())
