"""The tokenizer: the one that the config names, or one trained on the corpus."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pipeline.config.paths import pretrained
from pipeline.config.schema import TRAIN_TOKENIZER, Config
from pipeline.data.corpus import read_documents
from pipeline.data.document import Document
from pipeline.data.frame import Frame, frame_of, padding_of
from pipeline.data.held_out import part_of

TOKENIZER_CHARACTERS = 8_000_000  # what a tokenizer is trained on


LONGEST_WORD = 1_000
"""Characters of one kind in a row, for training: a million letters unbroken take for ever."""


UNBROKEN = re.compile(
    "|".join(rf"{kind}{{{LONGEST_WORD + 1},}}" for kind in (r"[^\W\d_]", r"\d", r"\s", r"[^\w\s]", r"\w", r"\S"))
)


EOS = "<|endoftext|>"


def load_tokenizer(config: Config) -> PreTrainedTokenizerBase | None:
    """The tokenizer that the config names; None where it is to be trained.

    Raises ValueError where none can be loaded, or it lacks a token that documents are to begin or end with.
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
        where, options = pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
    except (OSError, ValueError) as error:
        raise ValueError(f"model.tokenizer: no tokenizer can be loaded from `{name}`: {error}") from error
    if config.task.classifies:
        padding_of(tokenizer)  # refuses one that cannot fill rows
    else:
        frame_of(tokenizer, config.data)  # refuses one that cannot frame documents as they are to be
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
        raise ValueError(f"{path}: vocab_size is {size}; raise it to 257 at least, for 256 bytes and eos")
    return size


def train_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """A byte-level BPE, trained on the first `TOKENIZER_CHARACTERS` of the training documents; of a mixture, on as
    many of each source.

    Raises ValueError where documents are to begin with a bos token, which it has not.
    """
    if config.data.bos:
        raise ValueError(
            f"data.bos: a tokenizer that is trained here (`{TRAIN_TOKENIZER}`) has no bos token; leave it out"
        )

    def sample() -> Iterator[str]:
        with tqdm(desc="training the tokenizer on", unit=" characters", unit_scale=True, mininterval=1.0) as bar:
            for files in config.data.train_sources.values():
                room = TOKENIZER_CHARACTERS
                found = read_documents(files, config.data, "train")
                documents = (document for document in found if isinstance(document, Document))
                for document in part_of("train", documents, config.data):
                    yield from _broken(document.text[:room])
                    room -= len(document.text)
                    bar.update(len(document.text))
                    if room <= 0:
                        break

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size(config),
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # every byte: no text is ever unknown
        show_progress=sys.stderr.isatty(),
    )
    bpe.train_from_iterator(sample(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, clean_up_tokenization_spaces=False)


def _broken(text: str) -> Iterator[str]:
    """The text, in pieces where a run of one kind of characters is longer than `LONGEST_WORD`."""
    start = 0
    for run in UNBROKEN.finditer(text):
        for cut in range(run.start() + LONGEST_WORD, run.end(), LONGEST_WORD):
            yield text[start:cut]
            start = cut
    yield text[start:]


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], frame: Frame | None = None) -> list[np.ndarray]:
    """The tokens of every text in its frame (default: the tokenizer's own). A text that spells a special token gets no
    special token: nothing in a document may look like its end."""
    frame = frame or frame_of(tokenizer)
    batch = tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # documents longer than the model's context are meant to be
    )
    return [np.array([*frame.before, *ids, *frame.behind], np.int32) for ids in batch["input_ids"]]
