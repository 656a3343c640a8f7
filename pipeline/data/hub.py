"""Corpora on the Hugging Face hub: `owner/name`, with a configuration, a split and a revision where they are named."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

PART = r"[\w.+-]+(\[[\w:%+-]*\])?"  # in brackets, a slice of a split


FORM = re.compile(rf"(?P<name>[\w.-]+/[\w.-]+)(:(?P<first>{PART}))?(:(?P<second>{PART}))?(@(?P<revision>[\w./+-]+))?")


FORMS = "owner/name, owner/name:split or owner/name:config:split, with @revision behind where it is not the newest"


@dataclass(frozen=True)
class HubCorpus:
    name: str
    config: str | None
    split: str
    revision: str | None


def hub_corpus(source: str) -> HubCorpus | None:
    """What a source names on the hub; None where it has another form."""
    if not (found := FORM.fullmatch(source)):
        return None
    first, second = found["first"], found["second"]
    config, split = (first, second) if second else (None, first)
    return HubCorpus(found["name"], config, split or "train", found["revision"])


@cache
def commit_of(source: str) -> str | None:
    """The commit that a source means now, the same all through a process; None where the hub does not answer."""
    from huggingface_hub import HfApi  # slow to import, and seldom wanted

    corpus = hub_corpus(source)
    assert corpus
    try:
        return HfApi().dataset_info(corpus.name, revision=corpus.revision, timeout=30).sha
    except Exception:  # offline mode, no network, no such corpus: opening it says which
        return None


def records(source: str) -> Iterator[dict[str, Any]]:
    """The records of a hub corpus, streamed, of the commit that `commit_of` found. Raises ValueError where it cannot
    be opened, or breaks off."""
    from datasets import load_dataset  # slow to import, and seldom wanted

    corpus = hub_corpus(source)
    assert corpus
    arguments = [corpus.name] + ([corpus.config] if corpus.config else [])
    revision = commit_of(source) or corpus.revision
    count = 0
    try:
        found = load_dataset(
            *arguments, split=corpus.split, streaming=True, **({"revision": revision} if revision else {})
        )
        for record in found:
            count += 1
            yield record
    except (OSError, ValueError) as error:
        if count:
            raise ValueError(
                f"data files: the hub dataset `{source}` broke off after {count} records ({error}); check the network "
                "and start again"
            ) from error
        raise ValueError(
            f"data files: `{source}` is no file here, and as a hub dataset it cannot be opened ({error}); "
            f"check the spelling ({FORMS}) and the network"
        ) from error
