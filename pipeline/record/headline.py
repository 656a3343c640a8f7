"""Which held-out figure people look at: bits per byte of text, accuracy of answers."""

from collections.abc import Mapping
from typing import Any


def headline(evaluation: Mapping[str, Any] | None) -> str:
    """Its key in an evaluation's figures."""
    return "accuracy" if evaluation and "accuracy" in evaluation["all"] else "bits_per_byte"


WORDS = {"accuracy": "accuracy", "bits_per_byte": "bits/byte"}
