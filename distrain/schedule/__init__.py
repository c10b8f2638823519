"""Learning-rate schedules."""

from typing import TYPE_CHECKING

from distrain._lazy import attach

if TYPE_CHECKING:
    from distrain.schedule.schedules import (
        OneCycleLR,
        WarmupConstantLR,
        WarmupCosineLR,
        WarmupCosineRestartsLR,
        WarmupExponentialLR,
        WarmupLinearLR,
        WarmupMultiStepLR,
        WarmupPolynomialLR,
        WarmupStableDecayLR,
    )

__all__ = [
    "OneCycleLR",
    "WarmupConstantLR",
    "WarmupCosineLR",
    "WarmupCosineRestartsLR",
    "WarmupExponentialLR",
    "WarmupLinearLR",
    "WarmupMultiStepLR",
    "WarmupPolynomialLR",
    "WarmupStableDecayLR",
]
__getattr__, __dir__ = attach(__name__, dict.fromkeys(__all__, "schedules"))
