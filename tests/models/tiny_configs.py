"""Tiny configs of whatever architecture transformers' AutoModelForCausalLM maps, by the names of their settings."""

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from tests.tiny_models import VOCABULARY

WIDTH, HEADS, HEAD, POSITIONS = 32, 4, 8, 64
PAD = 1
"""Padding and the end of a text both, as in most tokenizers. Its row of an embedding may get no gradient."""

NAMES: tuple[tuple[int, str], ...] = (
    (
        VOCABULARY,
        """vocab_size decoder_vocab_size vocab_size_per_layer_input unpadded_vocab_size ngram_vocab_size_base
        encoder_hash_byte_group_vocab pronunciation_vocab_size shape_vocab_size audio_vocab_size""",
    ),
    (
        WIDTH,
        """hidden_size n_embd d_model dim_model emb_dim embedding_dim embedding_size input_embedding_size
        output_embedding_size word_embed_proj_dim lru_width attention_hidden_size backbone_hidden_size embed_dim
        cross_attention_hidden_size pronunciation_embed_dim shape_embed_dim mamba_d_ssm ple_embed_dim projection_dim
        out_hidden_size hidden_size_global adapter_in_dim adapter_out_dim adapter_input_size text_hidden_size""",
    ),
    (
        48,
        """intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim d_inner dff dim_ff n_inner ffn_hidden_size
        expert_ffn_hidden_size dense_intermediate_size intermediate_size_mlp feed_forward_size
        prefix_dense_intermediate_size""",
    ),
    (
        24,
        """moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size
        shared_intermediate_size moe_shared_expert_intermediate_size""",
    ),
    (
        16,
        """q_lora_rank kv_lora_rank o_lora_rank mamba_d_head mamba_head_dim mamba_headdim adapter_rank laurel_rank
        hc_lowrank router_hidden_size gated_norm_rank mamba_d_state state_size ssm_state_size mamba_dt_rank
        time_step_rank attention_head_dim hidden_size_per_layer_input chunk_size mamba_chunk_size moe_latent_size""",
    ),
    (
        HEAD,
        """head_dim dim_head d_head kv_channels swa_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim
        v_head_dim qk_nope_head_dim index_head_dim global_head_dim attention_head_size query_pre_attn_scalar d_rel
        num_buckets sliding_window sliding_window_size attention_window_size window_size local_attention index_topk
        attention_chunk_size keep_window_size""",
    ),
    (
        HEADS,
        """num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads
        swa_num_attention_heads linear_num_heads linear_num_value_heads num_encoder_attention_heads
        num_decoder_attention_heads mamba_num_heads mamba_n_heads index_n_heads num_query_groups qk_rope_head_dim
        rotary_dim""",
    ),
    (4, "num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num"),
    (
        2,
        """num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads num_global_key_value_heads
        num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts n_group topk_group num_expert_group
        mamba_n_groups n_groups mamba_ngroups hc_mult hc_count encoder_layers num_encoder_layers depth n_mamba_heads""",
    ),
    (1, "first_k_dense_replace num_dense_layers moe_layer_start_index"),
    (
        POSITIONS,
        """max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions
        max_source_positions model_max_length original_max_position_embeddings rel_extent""",
    ),
)
SIZES = {name: size for size, names in NAMES for name in names.split()}
MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.5,
    "logits_scaling": 2.0,
    "lm_head_multiplier": 0.5,
    "logit_scale": 0.5,
    "final_logit_softcapping": 4.0,
    "logits_soft_cap": 4.0,
    "output_logit_soft_cap": 4.0,
    "scale_embedding": True,
    "rescale_embeddings": True,
    "mup_enabled": True,
}
"""Set so that leaving one out shows; many defaults are 1 or none."""
LAYERS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "num_decoder_layers",
    "num_blocks",
)
MOST_KINDS = 5
"""A list of more values, one a layer, says no kinds."""
DROPOUT = ("dropout", "pdrop", "layerdrop", "jitter_noise")
IDS = ("token_id", "token_index", "pad_index", "bos_index", "eos_index", "unk_index", "mask_index")


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """Two layers, or as many as there are kinds of them, sizes of some tens, no dropout, `VOCABULARY` words; what
    `OVERRIDES` has for the type, and `changes`, go before."""
    own = OVERRIDES.get(model_type, {})
    start = AutoConfig.for_model(model_type, **START.get(model_type, {}))
    return AutoConfig.for_model(model_type, **_merged(_shrunk(start.to_dict()), own, changes))


def _shrunk(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What is to be other than in `settings`, sub-configs likewise."""
    small: dict[str, Any] = {}
    depths = [name for name in LAYERS if isinstance(settings.get(name), int)]
    if depths:
        depth = settings[depths[0]]
        lists = {name: value for name, value in settings.items() if isinstance(value, list) and len(value) == depth > 2}
        kinds = [value for value in map(_texts, lists.values()) if len(set(value)) <= MOST_KINDS]
        kept = _kinds(list(zip(*kinds, strict=True)), depth)
        small |= {name: [value[layer] for layer in kept] for name, value in lists.items()}
        small |= dict.fromkeys(depths, len(kept))
    free = VOCABULARY
    for name, value in settings.items():
        if name in small or name == "id2label":
            continue
        if name.endswith(IDS) and isinstance(value, int | list | None):
            if name.startswith(("pad", "eos")):
                small[name] = PAD
            elif value is not None:
                free -= 1
                small[name] = 0 if name.startswith(("bos", "decoder_start")) else free
        elif isinstance(value, dict) and "model_type" in value:
            small[name] = _shrunk(value) | {"model_type": value["model_type"]}
        elif isinstance(value, float) and any(part in name for part in DROPOUT):
            small[name] = 0.0
        elif name in MULTIPLIERS:
            small[name] = MULTIPLIERS[name]
        elif name in SIZES and type(value) is int and value > 0:
            small[name] = min(value, SIZES[name])
        elif value is None and name in ("head_dim", "num_key_value_heads"):
            small[name] = SIZES[name]
        elif name == "is_decoder":
            small[name] = True
    if "qk_rope_head_dim" in small:  # all heads have their own keys, out of a common low rank
        small |= {name: HEADS for name in ("num_key_value_heads", "head_dim") if name in settings}
    return small


def _texts(values: list[Any]) -> list[str]:
    return [repr(value) for value in values]


def _kinds(layers: list[tuple[str, ...]], depth: int) -> list[int]:
    """Two layers at least, with every value that one of the lists has."""
    seen: set[tuple[int, str]] = set()
    kept = []
    for index, values in enumerate(layers):
        if not seen.issuperset(enumerate(values)):
            seen.update(enumerate(values))
            kept.append(index)
    rest = [index for index in range(depth) if index not in kept]
    return sorted(kept + rest[: max(0, 2 - len(kept))])


def _merged(*several: Mapping[str, Any]) -> dict[str, Any]:
    """Later ones go before; sub-configs setting by setting."""
    whole: dict[str, Any] = {}
    for settings in several:
        for name, value in settings.items():
            old = whole.get(name)
            whole[name] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return whole


START: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
}
"""What a type's default config needs to be made at all."""

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_GEMMA_3N = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "intermediate_size": 48,
    "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
}
_DOTS_3 = {"per_layer_config": {2: {"head_dim": 12}}}
_LLAMA_4 = {"moe_layers": [1]}
_GEMMA_4 = {"global_head_dim": HEAD}
_QWEN_4 = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": HEAD,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "ple_layer_ids": [1],
    "ngram_vocab_size_base": 50,
    "heads_per_ngram": 2,
}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_d_head": 16, "attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_size": [3, 4], "patch_in_forward": False},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE}},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots3_note": {"text_config": _DOTS_3},
    "dots3_note_text": _DOTS_3,
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "max_window_layers": 1,
    },
    "gemma3n_text": _GEMMA_3N,
    "gemma4_text": _GEMMA_4,
    "gemma4_unified_text": _GEMMA_4,
    "gemma4": {"text_config": _GEMMA_4},
    "gemma4_unified": {"text_config": _GEMMA_4},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4": {"text_config": _LLAMA_4},
    "llama4_text": _LLAMA_4,
    "mamba2": {"head_dim": 16},
    "qwen4_exp": {"text_config": _QWEN_4},
    "qwen4_exp_text": _QWEN_4,
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_embds": False,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "hash_seed": 1,
        "num_buckets": 4,
    },
    "inkling2_text": {"unpadded_vocab_size": VOCABULARY - 10},
    "inkling_text": {"unpadded_vocab_size": VOCABULARY - 10},
    "xlm": {"causal": True},
    "xlnet": {"attn_type": "uni"},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 2 * WIDTH,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        "attention_hidden_size": 2 * WIDTH,
        "mamba_headdim": 32,
    },
}
"""Where the names do not do."""
