"""The global stream of samples and its loaders."""

from typing import TYPE_CHECKING

from distrain._lazy import attach

if TYPE_CHECKING:
    from distrain.data.iterable import IterableLoader
    from distrain.data.loader import EvalLoader, Loader, TrainLoader
    from distrain.data.samplers import (
        ByLength,
        ClassBalanced,
        Mixture,
        MixtureOrder,
        SampleOrder,
        Weighted,
    )
    from distrain.data.token_budget import TokenBudget

_MODULE_OF = {
    "ByLength": "samplers",
    "ClassBalanced": "samplers",
    "EvalLoader": "loader",
    "IterableLoader": "iterable",
    "Loader": "loader",
    "Mixture": "samplers",
    "MixtureOrder": "samplers",
    "SampleOrder": "samplers",
    "TokenBudget": "token_budget",
    "TrainLoader": "loader",
    "Weighted": "samplers",
}
__getattr__, __dir__ = attach(__name__, _MODULE_OF)

__all__ = [
    "ByLength",
    "ClassBalanced",
    "EvalLoader",
    "IterableLoader",
    "Loader",
    "Mixture",
    "MixtureOrder",
    "SampleOrder",
    "TokenBudget",
    "TrainLoader",
    "Weighted",
]
