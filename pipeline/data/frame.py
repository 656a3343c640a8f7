"""What stands before and behind every document: the tokenizer's own begin and end, or what the config says."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipeline.config.schema_data import DataConfig


@dataclass(frozen=True)
class Frame:
    """Token ids around each document's own, and the one that fills the last row."""

    before: list[int]
    behind: list[int]
    padding: int

    @property
    def tokens(self) -> int:
        """Of a document, beside its own."""
        return len(self.before) + len(self.behind)


def frame_of(tokenizer: PreTrainedTokenizerBase, data: DataConfig | None = None) -> Frame:
    """The frame that `data.bos` and `data.eos` ask for. By default the tokenizer's own: bos where it adds one; eos
    where it adds one too, or adds neither, for something has to divide documents.

    Raises ValueError where it has no token for what is asked.
    """
    wanted_bos, wanted_eos = (data.bos, data.eos) if data else (None, None)
    own_bos, own_eos = _own(tokenizer)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    name = tokenizer.name_or_path
    if wanted_bos and bos is None:
        raise ValueError(f"data.bos: the tokenizer `{name}` has no bos token; leave data.bos out, or give it one")
    before = [] if wanted_bos is False else own_bos or ([bos] if wanted_bos else [])
    if wanted_eos if wanted_eos is not None else own_eos or not own_bos:
        if eos is None:
            raise ValueError(
                f"model.tokenizer: `{name}` has no eos token, which has to close every document; give it one "
                "(add_special_tokens, save_pretrained) and name the saved directory, or set data.eos to false"
            )
        return Frame(before, [eos], eos)
    return Frame(before, [], next((token for token in (eos, bos) if token is not None), 0))


def padding_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills a row: pad, or eos where there is none. Raises ValueError where there is neither."""
    found = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    padding = next((token for token in found if token is not None), None)
    if padding is None:
        raise ValueError(
            f"model.tokenizer: `{tokenizer.name_or_path}` has neither a pad nor an eos token to fill rows with; give "
            "it one (add_special_tokens, save_pretrained) and name the saved directory"
        )
    return padding


def frame_identity(tokenizer: PreTrainedTokenizerBase | None, data: DataConfig) -> dict[str, Any]:
    """What the frame adds to a fingerprint; nothing where it is no more than an eos behind every document."""
    if tokenizer is None:  # trained here: it has an eos and no bos
        return {"frame": "TEXT"} if data.eos is False else {}
    frame = frame_of(tokenizer, data)
    if frame.behind and not frame.before:
        return {}
    return {"frame": " ".join(map(str, [*frame.before, "TEXT", *frame.behind]))}


def in_words(tokenizer: PreTrainedTokenizerBase, frame: Frame) -> str:
    """The frame as a person reads it, with a hint where the tokenizer has a bos that is not used."""
    before, behind = (" ".join(map(str, tokenizer.convert_ids_to_tokens(ids))) for ids in (frame.before, frame.behind))
    words = f"every document is framed as {before + ' ' if before else ''}TEXT{' ' + behind if behind else ''}"
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos not in (None, eos) and not frame.before:
        words += (
            f". The tokenizer has a bos token {tokenizer.bos_token} that it does not add: set data.bos to true where "
            "the model was trained with it (and data.eos to false where it was trained without an end)"
        )
    return words


def _own(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], bool]:
    """What the tokenizer puts before a text, if there is a bos in it, and whether it puts eos behind."""
    whole = tokenizer("a")["input_ids"]
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    places = [place for place in range(len(whole) - len(bare) + 1) if whole[place : place + len(bare)] == bare]
    place = places[-1] if bare and places else len(whole)
    before, behind = whole[:place], whole[place + len(bare) :]
    return (before if tokenizer.bos_token_id in before else []), tokenizer.eos_token_id in behind
