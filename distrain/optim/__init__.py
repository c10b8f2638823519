"""Parameter groups and optimizers."""

from distrain.optim.groups import explain_groups, param_groups
from distrain.optim.large_batch import LAMB, LARS
from distrain.optim.optimizer import build_optimizer

__all__ = [
    "LAMB",
    "LARS",
    "build_optimizer",
    "explain_groups",
    "param_groups",
]
