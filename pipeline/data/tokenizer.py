"""The tokenizer: the one that the config names, or one trained on the corpus."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pipeline.config.schema import TRAIN_TOKENIZER, Config
from pipeline.data.corpus import read_documents
from pipeline.data.document import Document

TOKENIZER_CHARACTERS = 8_000_000  # what a tokenizer is trained on


EOS = "<|endoftext|>"


def load_tokenizer(config: Config) -> PreTrainedTokenizerBase | None:
    """The tokenizer that the config names; None where it is to be trained.

    Raises ValueError where none can be loaded, or it has no eos token.
    """
    name = config.model.tokenizer or config.model.name_or_path
    if name == TRAIN_TOKENIZER:
        return None
    if name.endswith(".json"):
        raise ValueError(
            f"model.tokenizer: {name} is a model config, which has no tokenizer; set model.tokenizer to a hub id or a "
            f"local directory, or to `{TRAIN_TOKENIZER}`"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"model.tokenizer: no tokenizer can be loaded from `{name}`: {error}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"model.tokenizer: `{name}` has no eos token, which has to close every document; give it one "
            "(tokenizer.eos_token = ..., save_pretrained) and name the saved directory"
        )
    return tokenizer


def vocabulary_size(config: Config) -> int:
    """Of the tokenizer to be trained: that of the model config. Raises ValueError where it says none that can be."""
    path = Path(config.model.name_or_path)
    if path.suffix != ".json" or not path.is_file():
        raise ValueError(
            f"model.tokenizer: `{TRAIN_TOKENIZER}` takes its vocabulary size from a model config (*.json), and "
            f"model.name_or_path is `{path}`; name such a file, or a tokenizer"
        )
    size = json.loads(path.read_text()).get("vocab_size")
    if not isinstance(size, int) or size < 257:
        raise ValueError(f"{path}: vocab_size is {size}; a byte-level tokenizer needs at least 257 (256 bytes and eos)")
    return size


def train_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """A byte-level BPE, trained on the first `TOKENIZER_CHARACTERS` of the training documents."""

    def sample() -> Iterator[str]:
        room = TOKENIZER_CHARACTERS
        for document in read_documents(config.data.train_files, config.data, "train"):
            if isinstance(document, Document):
                yield document.text[:room]
                room -= len(document.text)
            if room <= 0:
                return

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size(config),
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # every byte: no text is ever unknown
        show_progress=False,
    )
    bpe.train_from_iterator(sample(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, clean_up_tokenization_spaces=False)


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[np.ndarray]:
    """The tokens of every text, closed by eos. A text that spells a special token gets no special token: nothing in
    a document may look like its end."""
    batch = tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # documents longer than the model's context are meant to be
    )
    return [np.array([*ids, tokenizer.eos_token_id], np.int32) for ids in batch["input_ids"]]
