"""Import an object by its dotted path, with errors that name the key and the part that is wrong."""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
from types import ModuleType
from typing import Any

from distrain.checks import did_you_mean
from distrain.errors import ConfigError


def locate(path: str, key: str = "") -> Any:
    """Return the object at an import path such as `torch.optim.SGD`.

    Raises:
        ConfigError: no module or attribute of that name exists, or importing fails; names `key`.
    """
    label = f"{key}={path}" if key else path
    found, rest = _import_longest(path, label)
    for name in rest:
        if not hasattr(found, name):
            raise ConfigError(f"{label}: {_missing(found, name)}")
        found = getattr(found, name)
    return found


def name_of(target: object) -> str:
    """Return the qualified name of a callable."""
    return str(getattr(target, "__qualname__", target))


def _import_longest(path: str, label: str) -> tuple[Any, list[str]]:
    """Import as many leading parts of the path as are modules; return the last and the rest."""
    parts = path.split(".")
    if not all(part.isidentifier() for part in parts):
        raise ConfigError(f"{label}: expected an import path like package.module.Name")
    found = _import(parts[0], label)
    if found is None:
        hint = "install it, or start in the folder that holds it"
        raise ConfigError(f"{label}: no module {parts[0]}; {hint}")
    for index, name in enumerate(parts[1:], start=1):
        is_attribute = not isinstance(getattr(found, name, found), ModuleType)
        inner = None if is_attribute else _import(".".join(parts[: index + 1]), label)
        if inner is None:
            return found, parts[index:]
        found = inner
    return found, []


def _import(name: str, label: str) -> ModuleType | None:
    """Import a module; return None if no module has that name."""
    try:
        return importlib.import_module(name)
    except Exception as error:
        text = str(error)
        if not isinstance(error, ModuleNotFoundError):
            text = f"{type(error).__name__}: {error}"
        elif error.name == name or name.startswith(f"{error.name}."):
            return None
        raise ConfigError(f"{label}: importing {name} failed: {text}") from error


def _missing(owner: object, name: str) -> str:
    """Return the message that `owner` has no `name`, with the names spelled like it."""
    names = [n for n in dir(owner) if not n.startswith("_")]
    if isinstance(owner, ModuleType) and hasattr(owner, "__path__"):
        names += [module.name for module in pkgutil.iter_modules(owner.__path__)]
    label = getattr(owner, "__name__", None) or name_of(type(owner))
    return f"{label} has no {name}; {did_you_mean(name, sorted(names))}"


def import_from_here() -> None:
    """Make the modules of the current folder importable: `_target_` may name them."""
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
