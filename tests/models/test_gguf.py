"""A model in a GGUF file is loaded, partitioned and saved as any other."""

from pathlib import Path

import deepspeed
import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.config.paths import pretrained
from pipeline.config.schema import ModelConfig
from pipeline.models.load import load_model, small_twin
from tests.tiny_models import tiny

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
QUANTIZED = "down_proj"


def write_gguf(model: torch.nn.Module, path: Path) -> dict[str, np.ndarray]:
    """A tiny Llama, its linear maps of one kind in 8 bits; returns what their weights then are."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"w{index}" for index in range(config.vocab_size)])
    rounded = {}
    for name, parameter in model.named_parameters():
        module = name.removesuffix(".weight")
        weight = parameter.detach().numpy()
        if module in ENDS:
            writer.add_tensor(f"{ENDS[module]}.weight", weight)
            continue
        _, _, block, inside = module.split(".", 3)
        if heads := {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(inside[-6:]):
            # Halves of each head are interleaved in such files.
            weight = weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        if inside.endswith(QUANTIZED):
            kind = gguf.GGMLQuantizationType.Q8_0
            packed = gguf.quants.quantize(weight, kind)
            rounded[name] = gguf.quants.dequantize(packed, kind)
            writer.add_tensor(f"blk.{block}.{NAMES[inside]}.weight", packed, raw_dtype=kind)
        else:
            writer.add_tensor(f"blk.{block}.{NAMES[inside]}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return rounded


def _wide() -> torch.nn.Module:
    """Wide enough for blocks of 32 in 8 bits."""
    config = tiny("llama").config
    config.intermediate_size = 32
    torch.manual_seed(7)
    return AutoModelForCausalLM.from_config(config)


@pytest.fixture
def model(tmp_path) -> tuple[Path, dict[str, torch.Tensor]]:
    """The file, and what is in it."""
    wide = _wide()
    rounded = write_gguf(wide, tmp_path / "tiny.gguf")
    exact = {name: parameter.detach() for name, parameter in wide.named_parameters()}
    return tmp_path / "tiny.gguf", exact | {name: torch.from_numpy(weight) for name, weight in rounded.items()}


def on_a_rank(path: Path) -> dict[str, torch.Tensor]:
    """Its weights once DeepSpeed has partitioned it."""
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3},
    }
    ds_engine, *_ = deepspeed.initialize(model=load_model(ModelConfig(str(path)), 0, settings), config=settings)
    found = {}
    for name, parameter in ds_engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            found[name] = parameter.detach().clone()
    return found


def test_its_weights_are_whole_in_float32_and_are_saved(model, tmp_path):
    """Catches weights that stay packed, and a model that will not be saved because it once was."""
    path, exact = model
    loaded = load_model(ModelConfig(str(path)), 0)
    loaded.save_pretrained(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for found in (loaded, saved):
        weights = dict(found.named_parameters())
        assert weights.keys() == exact.keys()
        for name, weight in weights.items():
            assert weight.dtype == torch.float32
            assert torch.equal(weight, exact[name]), name
    assert small_twin(ModelConfig(str(path)), loaded).config.hidden_size == 16


def test_it_is_the_same_under_zero_3(model, ranks):
    path, exact = model
    for found in ranks(on_a_rank, path):
        assert all(torch.equal(found[name], weight) for name, weight in exact.items())


def test_without_the_package_that_reads_it_the_message_says_so(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"tiny\.gguf is a GGUF file, which the gguf package reads: pip install 'gguf>=0\.19'"
    ):
        pretrained("tiny.gguf")
