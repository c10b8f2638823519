"""Differences between two configurations, key by key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the dotted keys that differ, with both values; None for a missing key."""
    a, b = flat(old), flat(yaml.safe_load(yaml.safe_dump(dict(new))))
    keys = [*a, *(key for key in b if key not in a)]
    return {key: (a.get(key), b.get(key)) for key in keys if a.get(key) != b.get(key)}


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
