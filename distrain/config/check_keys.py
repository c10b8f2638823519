"""Check a configuration against its keys."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Annotated, Any, Literal

from distrain.checks import did_you_mean, one_of, parsed_number, wrong
from distrain.config.keys import OPEN, AtLeast, Keys, Length, Target
from distrain.durations import epochs
from distrain.errors import ConfigError


def check(conf: dict[str, Any]) -> dict[str, Any]:
    """Return the plain configuration with each value in the type of its key, and with defaults.

    Raises:
        ConfigError: a key is unknown, missing, of another type or out of range.
    """
    return _node(conf, Keys, "")


def _node(value: Any, cls: type, key: str) -> dict[str, Any]:
    """Check the mapping at `key` against the dataclass `cls`."""
    _check_mapping(value, key)
    hints = typing.get_type_hints(cls, include_extras=True)
    prefix = key + "." if key else ""
    checked: dict[str, Any] = {}
    for name, item in value.items():
        if name in hints:
            checked[name] = _value(item, hints[name], prefix + str(name))
        elif cls in OPEN:
            checked[name] = item
        else:
            raise ConfigError(f"{prefix}{name}: no such key; {did_you_mean(str(name), hints)}")
    for entry in dataclasses.fields(cls):
        if entry.name in checked:
            continue
        if entry.default is not dataclasses.MISSING:
            checked[entry.name] = entry.default
        elif entry.default_factory is not dataclasses.MISSING:
            default = entry.default_factory()
            is_node = dataclasses.is_dataclass(default) and not isinstance(default, type)
            checked[entry.name] = dataclasses.asdict(default) if is_node else default
        else:
            raise ConfigError(f"{prefix}{entry.name}: expected a value")
    return checked


def _value(value: Any, hint: Any, key: str) -> Any:
    """Check one value against a type hint; return it in that type."""
    origin = typing.get_origin(hint)
    if origin is Annotated:
        inner, *ranges = typing.get_args(hint)
        checked = _value(value, inner, key)
        for limit in ranges:
            limit(key, checked)
        return checked
    if origin in (types.UnionType, typing.Union):
        return _union(value, typing.get_args(hint), key)
    if origin is Literal:
        return one_of(key, value, typing.get_args(hint))
    if dataclasses.is_dataclass(hint):
        return _node(value, typing.cast(type, hint), key)
    if hint is Target:
        return _target(value, key)
    if hint is Length:
        is_epochs = epochs(value) is not None
        return value if is_epochs else _value(value, Annotated[int, AtLeast(1)], key)
    if origin is dict:
        _check_mapping(value, key)
        of = typing.get_args(hint)[1]
        return {k: v if of is Any else _value(v, of, f"{key}.{k}") for k, v in value.items()}
    if origin is list:
        if not isinstance(value, list):
            raise wrong(key, value, "a list")
        return value
    return _plain(value, hint, key)


def _check_mapping(value: Any, key: str) -> None:
    if not isinstance(value, dict):
        raise wrong(key, value, "a mapping of keys, not one value")


def _union(value: Any, hints: tuple[Any, ...], key: str) -> Any:
    """Check a value against `X | None`, or against the member of a union with its type.

    `X | dict[str, X]` is one node, or several by name, see `_is_by_name`.
    """
    if value is None and type(None) in hints:
        return None
    nodes = [hint for hint in hints if hint is Target or dataclasses.is_dataclass(hint)]
    by_name = [hint for hint in hints if nodes and typing.get_origin(hint) is dict]
    if by_name and _is_by_name(value, nodes):
        return _value(value, by_name[0], key)
    if isinstance(value, dict) and Target in hints:
        return _target(value, key)
    rest = [hint for hint in hints if hint is not type(None) and hint not in by_name]
    by_type = [hint for hint in rest if typing.get_origin(hint) is type(value)]
    return _value(value, (by_type or rest)[0], key)


def _is_by_name(value: Any, nodes: list[Any]) -> bool:
    """Whether a value is nodes by name: mappings or null, and none under a key of a single node.

    `nodes` are the type hints of a single node.
    """
    if not isinstance(value, dict):
        return False
    if not all(node is None or isinstance(node, dict) for node in value.values()):
        return False
    keys = {"_target_"}
    for hint in filter(dataclasses.is_dataclass, nodes):
        keys |= {field.name for field in dataclasses.fields(hint)}
    return bool(value) and keys.isdisjoint(value)


def _target(value: Any, key: str) -> dict[str, Any]:
    """Check a node for `config.instantiate.build`."""
    if not isinstance(value, dict):
        raise wrong(key, value, f"a mapping, at least {key}._target_=package.module.Name")
    path = value.get("_target_")
    if not isinstance(path, str) or not path:
        raise ConfigError(f"{key}._target_: expected a value, as in package.module.Name")
    return value


def _plain(value: Any, hint: type, key: str) -> Any:
    """Check a bool, int, float or str."""
    if hint is str:
        if value is None:
            raise ConfigError(f"{key}: expected a value, {key}=...")
        if isinstance(value, bool | int | float | str):
            return str(value)
        raise wrong(key, value, "text")
    if hint is bool:
        if isinstance(value, bool):
            return value
        raise wrong(key, value, "true or false")
    found = parsed_number(value)
    is_number = isinstance(found, int | float) and not isinstance(found, bool)
    if not is_number or not abs(found) < math.inf:
        raise wrong(key, value, "a number")
    if (isinstance(found, int) or hint is int) and abs(found) >= 2**63:
        raise wrong(key, value, "a number of less than 64 bits")
    if hint is int and found != int(found):
        raise wrong(key, value, "an integer")
    return hint(found)
