"""Import of libraries that only some runs need: the extras of pyproject.toml."""

from __future__ import annotations

import importlib
from typing import Any

from distrain.errors import ConfigError


def optional_library(name: str, *, extra: str) -> Any:
    """Import a library that is an extra of distrain; ConfigError if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f'{error}: expected {name}; pip install "distrain[{extra}]"') from error
