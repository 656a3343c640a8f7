"""What differs between two nested settings, and nested settings as flat ones."""

from collections.abc import Mapping
from typing import Any


def changes(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The keys that differ, one a line, with both values; empty where none does. When a file was written is none."""
    before, after = _flat(old), _flat(new)
    lines = [
        f"  {key}: {before.get(key, 'absent')!r} -> {after.get(key, 'absent')!r}"
        for key in {**before, **after}
        if (key not in before or key not in after or before[key] != after[key]) and not key.endswith(".modified")
    ]
    return "\n".join(lines[:20] + [f"  ... and {len(lines) - 20} more"] * (len(lines) > 20))


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict | list):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {key: leaf for part, inner in items for key, leaf in _flat(inner, f"{name}.{part}".strip(".")).items()}


def flat(prefix: str, value: Any) -> dict[str, Any]:
    """Nested dicts as one, with dotted keys."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    return {
        key: leaf for name, inner in value.items() for key, leaf in flat(f"{prefix}.{name}".strip("."), inner).items()
    }
