"""Import of a tracker's library, which only the runs that use it need."""

from __future__ import annotations

import importlib
from typing import Any

from distrain.errors import ConfigError


def optional_library(name: str, *, extra: str) -> Any:
    """Import a library that is an extra of distrain.

    Args:
        name: of the module.
        extra: of pyproject.toml.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f'{error.name} is not installed: expected it for this writer; pip install "distrain'
            f'[{extra}]"'
        ) from None
