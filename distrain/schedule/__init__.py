"""Learning-rate schedules."""

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
