"""Differences between two configurations, key by key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the dotted keys that differ, with both values; None for a missing key."""
    a, b = flat(old), flat(yaml.safe_load(yaml.safe_dump(dict(new))))
    keys = [*a, *(key for key in b if key not in a)]
    pairs = {key: (a.get(key), b.get(key)) for key in keys}
    return {key: (old, new) for key, (old, new) in pairs.items() if not _is_same(old, new)}


def _is_same(old: Any, new: Any) -> bool:
    """Return whether two values are equal; NaN is equal to itself here, also in lists."""
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(map(_is_same, old, new))
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return old.keys() == new.keys() and all(_is_same(old[key], new[key]) for key in old)
    return bool(old == new or (old != old and new != new))


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings by dotted key; an empty mapping is a leaf."""
    if not isinstance(node, Mapping) or not node:
        return {prefix: node} if prefix else {}
    leaves: dict[str, Any] = {}
    for key, value in node.items():
        leaves |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return leaves


def covers(keys: Sequence[str], key: str) -> bool:
    """Return whether `key` is one of the dotted keys, or below one."""
    return any(key == each or key.startswith(each + ".") for each in keys)
