"""What differs between two nested settings, and nested settings as flat ones."""

from collections.abc import Mapping
from typing import Any


def changes(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The keys that differ, one a line, with both values; empty where none does. When a file was written is none."""
    before, after = flat("", old, lists=True), flat("", new, lists=True)
    lines = [
        f"  {key}: {before.get(key, 'absent')!r} -> {after.get(key, 'absent')!r}"
        for key in {**before, **after}
        if (key not in before or key not in after or before[key] != after[key]) and not key.endswith(".modified")
    ]
    return "\n".join(lines[:20] + [f"  ... and {len(lines) - 20} more"] * (len(lines) > 20))


def flat(prefix: str, value: Any, lists: bool = False) -> dict[str, Any]:
    """Nested dicts (and `lists`) as one, with dotted keys."""
    if isinstance(value, Mapping):
        items = list(value.items())
    elif lists and isinstance(value, list):
        items = [(str(index), inner) for index, inner in enumerate(value)]
    else:
        return {prefix: value}
    return {
        key: leaf for name, inner in items for key, leaf in flat(f"{prefix}.{name}".strip("."), inner, lists).items()
    }
