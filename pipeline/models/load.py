"""The model from transformers, with or without ZeRO-3."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

from pipeline.config.answers import Answers
from pipeline.config.paths import pretrained
from pipeline.config.schema import ModelConfig
from pipeline.models.adapters import add_adapter, add_alike
from pipeline.models.classifier import classifying, kind_of, with_answers
from pipeline.models.dropout import set_dropout
from pipeline.models.trainable import freeze_alike, freeze_all_but
from pipeline.models.weights import check_weights, dequantized


def load_model(
    config: ModelConfig, seed: int, deepspeed_config: dict[str, Any] | None = None, answers: Answers | None = None
) -> PreTrainedModel:
    """The causal LM, or with `answers` the classifier of texts, in float32 (DeepSpeed casts it), in training mode, with
    an adapter and frozen as `config` says; partitioned from the start under ZeRO-3.

    `name_or_path` is a hub id, a directory or GGUF file with weights, or a `*.json` model config: then the weights are
    random, from `seed`. Raises ValueError where there is no such model, or its weights are not all there.
    """
    if not config.name_or_path.endswith(".json"):
        try:
            check_weights(config, answers)  # before partitions are made: there, transformers names less
        except OSError as error:
            raise _no_model(config, error) from error
    # Alive while the model is made, this makes transformers load and initialise ZeRO-3 partitions correctly, tied
    # weights included; a bare deepspeed.zero.Init initialises GPT-Neo wrongly.
    zero3 = HfDeepSpeedConfig(deepspeed_config) if deepspeed_config else None
    torch.manual_seed(seed)
    try:
        if config.name_or_path.endswith(".json"):
            model = _from_scratch(config, answers, zero3=is_deepspeed_zero3_enabled())
        else:
            name, options = pretrained(config.name_or_path)
            options = dequantized(options) | _attention(config) | classifying(config, answers)
            model = kind_of(answers).from_pretrained(name, dtype=torch.float32, **options)
    except (OSError, ValueError) as error:
        raise _no_model(config, error) from error
    del zero3
    return _for_training(model, config, seed)


def _for_training(model: PreTrainedModel, config: ModelConfig, seed: int = 0) -> PreTrainedModel:
    """What `config` has done to a model that is loaded."""
    if config.trainable is not None:
        freeze_all_but(model, [config.trainable] if isinstance(config.trainable, str) else config.trainable)
    if config.activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if config.peft is not None:
        add_adapter(model, config.peft, seed)
    if config.dropout is not None:
        set_dropout(model, config.dropout)
    return model.train()


def model_without_weights(config: ModelConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The same model on torch's meta device: shapes only, whatever its size. Raises ValueError where there is none."""
    try:
        with torch.device("meta"), no_init_weights():
            model = AutoModelForCausalLM.from_config(_settings(config), dtype=dtype, **_attention(config))
    except (OSError, ValueError) as error:
        raise _no_model(config, error) from error
    model.tie_weights()
    return _for_training(model, config)


def small_twin(config: ModelConfig, model: PreTrainedModel, answers: Answers | None = None) -> PreTrainedModel:
    """A model of `model`'s architecture with random weights, whole in float32 on the CPU, of two blocks where its
    config can be cut so far, with adapters and frozen where `model` is; for what depends on the architecture only. Not
    while ZeRO-3 partitions what is made."""
    twin = _small(config, answers)
    if config.peft is not None:
        add_alike(twin, model, config.peft)
    freeze_alike(twin, model)
    return twin.train()


def _small(config: ModelConfig, answers: Answers | None) -> PreTrainedModel:
    settings = _settings(config, answers)
    whole = copy.deepcopy(settings)
    blocks = settings.num_hidden_layers
    try:
        for key, value in list(vars(settings).items()):
            if isinstance(value, list) and len(value) == blocks:
                setattr(settings, key, value[:_TWIN_BLOCKS])
        settings.num_hidden_layers = min(blocks, _TWIN_BLOCKS)
        return kind_of(answers).from_config(settings, dtype=torch.float32, **_attention(config))
    except (AttributeError, ValueError, TypeError, IndexError, AssertionError):
        return kind_of(answers).from_config(whole, dtype=torch.float32, **_attention(config))


_TWIN_BLOCKS = 2


def _no_model(config: ModelConfig, error: Exception) -> ValueError:
    return ValueError(
        f"model.name_or_path: no model could be loaded from '{config.name_or_path}' ({error}); give a hub id, a "
        "directory with weights, or a model config (*.json) to start from scratch"
    )


def check_attention(config: ModelConfig) -> None:
    """Raises ValueError, in one sentence, where `attn_implementation` is not for this model or not on this machine."""
    if config.attn_implementation is None:
        return
    try:
        settings = _settings(config)
    except (OSError, ValueError) as error:
        raise _no_model(config, error) from error
    try:
        with torch.device("meta"), no_init_weights():
            AutoModelForCausalLM.from_config(settings, **_attention(config))
    except (ImportError, ValueError) as error:
        reason = str(error).splitlines()[0].split(". ")[0].removesuffix(".")
        raise ValueError(
            f"model.attn_implementation: '{config.attn_implementation}' is not to be had for {config.name_or_path} "
            f"here ({reason}); choose eager or sdpa, or leave it out"
        ) from error


def _attention(config: ModelConfig) -> dict[str, str]:
    return {"attn_implementation": config.attn_implementation} if config.attn_implementation else {}


def _settings(config: ModelConfig, answers: Answers | None = None) -> PreTrainedConfig:
    """transformers' config of the model."""
    name, options = pretrained(config.name_or_path)
    if name.endswith(".json"):
        settings = AutoConfig.for_model(**json.loads(Path(name).read_text()))
    else:
        settings = AutoConfig.from_pretrained(name, **options)
    return with_answers(settings, answers) if answers else settings


def _from_scratch(config: ModelConfig, answers: Answers | None, zero3: bool) -> PreTrainedModel:
    """Random weights that are a function of the seed, not of the ZeRO stage, nor of the device.

    Under ZeRO-3 transformers initialises every module once, when all are there, on the accelerator; elsewhere torch has
    drawn weights for each as it was made, before. Those draws are left out, so both begin at the same one.
    """
    with DrawnOnCpu() if zero3 else no_init_weights():
        model = kind_of(answers).from_config(_settings(config, answers), dtype=torch.float32, **_attention(config))
    if not zero3:
        model.initialize_weights()
        model.tie_weights()
    return model


class DrawnOnCpu(TorchDispatchMode):
    """Random numbers for tensors of any device come from the CPU's generator: other devices have sequences of their
    own."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # torch.Tag.inplace would say it in words, but torch 2.11 has no such tag.
        if torch.Tag.nondeterministic_seeded in func.tags and func._schema.name.endswith("_"):
            filled, *options = args
            return filled.copy_(func(torch.empty_like(filled, device="cpu"), *options, **(kwargs or {})))
        return func(*args, **(kwargs or {}))
