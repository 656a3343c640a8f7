"""Paths as people write them."""

import importlib.util
import os
from pathlib import Path
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


def pretrained(name: str) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` of transformers takes for `name`, a hub id, a directory or a GGUF file. Raises ValueError
    where there is nothing to read such a file with."""
    if not name.endswith(".gguf"):
        return name, {}
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"{name} is a GGUF file, which the gguf package reads: pip install 'gguf>=0.19'")
    return str(Path(name).parent), {"gguf_file": Path(name).name}
