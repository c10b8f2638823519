"""The global stream of samples and its loaders."""

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
