"""Small models of the architectures that the pipeline promises, with random weights, in Hugging Face form."""

from pathlib import Path

import torch
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

VOCABULARY = 300
"""Just above the 257 of a byte-level tokenizer."""


def tiny(kind: str) -> torch.nn.Module:
    """`gpt_neo` and `gpt2` tie their heads, `llama` does not, `llama_tied` does; `bert` is an encoder without one."""
    torch.manual_seed(7)
    if kind == "bert":
        return BertModel(
            BertConfig(
                vocab_size=VOCABULARY,
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=24,
                max_position_embeddings=64,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                pad_token_id=0,
            )
        )
    if kind in ("gpt_neo", "gpt_neo_with_dropout"):
        return GPTNeoForCausalLM(
            GPTNeoConfig(
                vocab_size=VOCABULARY,
                hidden_size=16,
                num_layers=2,
                num_heads=2,
                attention_types=[[["global", "local"], 1]],
                window_size=8,
                resid_dropout=0.1 if kind == "gpt_neo_with_dropout" else 0.0,
                max_position_embeddings=64,
                bos_token_id=0,
                eos_token_id=0,
            )
        )
    if kind == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY,
                n_embd=16,
                n_layer=2,
                n_head=2,
                n_positions=64,
                attn_pdrop=0,
                embd_pdrop=0,
                resid_pdrop=0,
                bos_token_id=0,
                eos_token_id=0,
            )
        )
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            tie_word_embeddings=kind == "llama_tied",
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def larger(kind: str) -> torch.nn.Module:
    """The model with larger weights than an initialisation's, so that scores differ."""
    model = tiny(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return model


def save_tiny(kind: str, directory: Path) -> Path:
    """That model as a directory to continue from."""
    larger(kind).save_pretrained(directory)
    return directory
