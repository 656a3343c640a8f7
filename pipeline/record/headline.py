"""Which held-out figure people look at: bits per byte of text, accuracy of answers."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Headline(NamedTuple):
    key: str
    """In an evaluation's figures."""
    short: str
    words: str
    beside: str
    """Key of the figure beside it."""
    better: str
    """On which side of 0 a difference is good."""


TEXT = Headline("bits_per_byte", "bits/byte", "bits per byte", "perplexity", "below")
ANSWERS = Headline("accuracy", "accuracy", "accuracy", "loss", "above")


def headline(figures: Mapping[str, Any] | None) -> Headline:
    """Of the figures of one subset, or of all text."""
    return ANSWERS if figures and "accuracy" in figures else TEXT
