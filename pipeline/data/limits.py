"""Whether a model can take the data: its vocabulary and its positions, looked up before anything takes long."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from pipeline.config.paths import pretrained
from pipeline.config.schema import Config
from pipeline.data.frame import frame_of

POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length")


def check_model(config: Config, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Raises ValueError where there is no such model, a token id is beyond its vocabulary, or a sequence is longer
    than its table of positions. `tokenizer` is None where it is trained, to the model's size."""
    settings = _settings(config.model.name_or_path)
    text = settings.get_text_config(decoder=True)
    vocabulary = getattr(text, "vocab_size", None)
    if tokenizer is not None and isinstance(vocabulary, int):
        highest, what = _highest(config, tokenizer)
        if highest >= vocabulary:
            raise ValueError(
                f"model.tokenizer: {what} has id {highest}, and the vocabulary of `{config.model.name_or_path}` ends "
                f"at {vocabulary - 1}. Name the tokenizer that belongs to the model, or enlarge the model "
                "(resize_token_embeddings, save_pretrained)"
            )
    limit = _positions(settings)
    length = config.data.sequence_length
    if limit is None or limit <= 0 or length <= limit:
        return
    if table := _position_table(settings, limit):
        raise ValueError(
            f"data.sequence_length is {length}, and `{config.model.name_or_path}` has positions for {limit} tokens "
            f"({table}). Set data.sequence_length to {limit} at most"
        )
    print(
        f"data.sequence_length is {length}: more than the {limit} tokens that `{config.model.name_or_path}` is made "
        "for (its positions are computed, so it can run; it has never seen such distances)",
        flush=True,
    )


def positions_of(name: str) -> int | None:
    """The tokens that a model is made for; None where its config does not say so, or there is no such model."""
    try:
        return _positions(_settings(name))
    except ValueError:
        return None


def _positions(settings: Any) -> int | None:
    text = settings.get_text_config(decoder=True)
    numbers = (getattr(text, name, None) for name in POSITIONS)
    return next((number for number in numbers if isinstance(number, int)), None)


def _settings(name: str) -> Any:
    try:
        if not name.endswith(".json"):
            where, options = pretrained(name)
            return AutoConfig.from_pretrained(where, **options)
        read = json.loads(Path(name).read_text())
        if not isinstance(read, dict) or "model_type" not in read:
            raise ValueError("it has no model_type")
        return AutoConfig.for_model(**read)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"model.name_or_path: no model could be loaded from '{name}' ({error}); give a hub id, a directory with "
            "weights, or a model config (*.json) to start from scratch"
        ) from error


def _highest(config: Config, tokenizer: PreTrainedTokenizerBase) -> tuple[int, str]:
    """The highest token id that can be in a row, and what it is. Special tokens are in no text, only in the frame."""
    if config.task.classifies:  # the tokenizer's own special tokens may stand around a text
        ids = {number: token for token, number in tokenizer.get_vocab().items()}
        return max(ids), f"the token `{ids[max(ids)]}`"
    frame = frame_of(tokenizer, config.data)
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    if config.data.planted_noise:
        special = set()  # noise is drawn from all there are
    framing = {*frame.before, *frame.behind, frame.padding}
    ids = {number: token for token, number in tokenizer.get_vocab().items() if number not in special - framing}
    highest = max([*ids, *framing])
    which = "eos" if highest in frame.behind else "bos" if highest in frame.before else "token"
    return highest, f"the {which} `{ids.get(highest, '')}`" if which == "token" else f"its {which}"


def _position_table(settings: Any, limit: int) -> str | None:
    """Name and size of the model's embedding of positions; None where it has none."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings)
    words = model.get_input_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding) and module is not words and 0 <= module.num_embeddings - limit <= 8:
            return f"{name}: {module.num_embeddings} rows"
    return None
