"""Paths as people write them."""

import os
from typing import Any


def expand(section: Any, *names: str) -> None:
    """Write the home directory in the place of a leading `~` in these fields of a config section, paths or lists of
    paths: no shell does it inside a YAML file."""
    for name in names:
        value = getattr(section, name)
        if isinstance(value, str):
            expanded: Any = os.path.expanduser(value)
        elif isinstance(value, list):
            expanded = [os.path.expanduser(entry) if isinstance(entry, str) else entry for entry in value]
        else:
            continue
        object.__setattr__(section, name, expanded)
