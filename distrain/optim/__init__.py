"""Parameter groups and optimizers."""

from typing import TYPE_CHECKING

from distrain._lazy import attach

if TYPE_CHECKING:
    from distrain.optim.groups import explain_groups, param_groups
    from distrain.optim.large_batch import LAMB, LARS
    from distrain.optim.optimizer import build_optimizer

_MODULE_OF = {
    "LAMB": "large_batch",
    "LARS": "large_batch",
    "build_optimizer": "optimizer",
    "explain_groups": "groups",
    "param_groups": "groups",
}
__getattr__, __dir__ = attach(__name__, _MODULE_OF)

__all__ = [
    "LAMB",
    "LARS",
    "build_optimizer",
    "explain_groups",
    "param_groups",
]
