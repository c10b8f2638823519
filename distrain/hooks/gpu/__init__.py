"""GPU telemetry by NVML."""

from typing import TYPE_CHECKING

from distrain._lazy import attach

if TYPE_CHECKING:
    from distrain.hooks.gpu.hook import GpuStats

_MODULE_OF = {
    "GpuStats": "hook",
}
__getattr__, __dir__ = attach(__name__, _MODULE_OF)

__all__ = [
    "GpuStats",
]
