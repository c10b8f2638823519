"""Hydra's configuration -> a checked plain dict -> objects."""

from typing import TYPE_CHECKING

from distrain._lazy import attach

if TYPE_CHECKING:
    from distrain.config.compose import resolve
    from distrain.config.instantiate import build

_MODULE_OF = {
    "build": "instantiate",
    "resolve": "compose",
}
__getattr__, __dir__ = attach(__name__, _MODULE_OF)

__all__ = [
    "build",
    "resolve",
]
