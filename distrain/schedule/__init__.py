"""Learning-rate schedules."""

from typing import TYPE_CHECKING

from distrain._lazy import attach

if TYPE_CHECKING:
    from distrain.schedule.schedules import (
        OneCycleLR,
        WarmupConstantLR,
        WarmupCosineLR,
        WarmupExponentialLR,
        WarmupLinearLR,
        WarmupMultiStepLR,
        WarmupPolynomialLR,
        WarmupStableDecayLR,
    )

_MODULE_OF = {
    "OneCycleLR": "schedules",
    "WarmupConstantLR": "schedules",
    "WarmupCosineLR": "schedules",
    "WarmupExponentialLR": "schedules",
    "WarmupLinearLR": "schedules",
    "WarmupMultiStepLR": "schedules",
    "WarmupPolynomialLR": "schedules",
    "WarmupStableDecayLR": "schedules",
}
__getattr__, __dir__ = attach(__name__, _MODULE_OF)

__all__ = [
    "OneCycleLR",
    "WarmupConstantLR",
    "WarmupCosineLR",
    "WarmupExponentialLR",
    "WarmupLinearLR",
    "WarmupMultiStepLR",
    "WarmupPolynomialLR",
    "WarmupStableDecayLR",
]
