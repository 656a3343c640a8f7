"""What DeepSpeed, transformers and datasets say and nobody can do anything about: silenced here, by name."""

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator

import datasets
from transformers.utils import logging as of_transformers

ON_IMPORT = "Setting accelerator to CPU"
"""A warning of every process without an accelerator. The opening of a run says on which device it is."""

ON_MEETING = "built successfully"
"""Printed by every rank of its shared-memory collective, at every start."""


def silence_import() -> None:
    """Before deepspeed is imported."""
    logging.getLogger("DeepSpeed").addFilter(lambda record: not record.getMessage().startswith(ON_IMPORT))


@contextlib.contextmanager
def silent_meeting() -> Iterator[None]:
    """Inside, while ranks meet, what is printed goes on without the lines with `ON_MEETING`."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls collectives by names that newer torch deprecates.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
    with contextlib.redirect_stdout(_Without()):
        yield


class _Without:
    """Standard output, without those lines. A line comes in one piece, and its end perhaps in another."""

    def __init__(self) -> None:
        self._out, self._left_out = sys.stdout, False

    def write(self, text: str) -> int:
        left_out = ON_MEETING in text or (self._left_out and text == "\n")
        self._left_out = left_out and not text.endswith("\n")
        return len(text) if left_out else self._out.write(text)

    def flush(self) -> None:
        self._out.flush()


def silence_bars() -> None:
    """On all ranks but the first, which shows them: bars for weights that are loaded and data sets that are saved."""
    datasets.disable_progress_bars()
    of_transformers.disable_progress_bar()


def silence_load_report() -> None:
    """The table of weights that a model has and its files have not, or the other way round: `models.weights` says it
    in a line, or refuses. One of shapes that differ is shown."""
    logging.getLogger("transformers.modeling_utils").addFilter(
        lambda record: "LOAD REPORT" not in record.getMessage() or "MISMATCH" in record.getMessage()
    )
