"""launch=slurm: jobs, attempts and nodes of SLURM."""

from typing import TYPE_CHECKING

from distrain._lazy import attach

if TYPE_CHECKING:
    from distrain.launch.slurm.launcher import SlurmLauncher

_MODULE_OF = {
    "SlurmLauncher": "launcher",
}
__getattr__, __dir__ = attach(__name__, _MODULE_OF)

__all__ = [
    "SlurmLauncher",
]
