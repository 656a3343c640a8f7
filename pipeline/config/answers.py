"""What a classification task asks for, settled while its data are prepared."""

from typing import NamedTuple


class Answers(NamedTuple):
    """What there is to answer of a labelled text."""

    classes: list[str]
    """The labels, in the order of the logits."""
    padding: int
    """The token behind the end of a text."""
