"""A step with two forwards: sharpness-aware minimisation.

Foret et al. 2021, "Sharpness-Aware Minimization for Efficiently Improving Generalization",
arXiv:2010.01412::

    step: {_target_: examples.sam.SAM, rho: 0.05}
"""

from typing import Any

import torch

import distrain


class SAM(distrain.Step):
    """The gradient at weights + rho * g / |g|, where g is the gradient at the weights.

    Args:
        rho: distance of the second forward.
    """

    accumulates = True

    def __init__(self, rho: float = 0.05) -> None:
        self.rho = rho

    def __call__(self, batch: Any) -> None:
        """Train with batches (images, labels) for a model that returns the loss."""
        with self.update() as update:
            for part in batch:
                update.backward(self.model(*part))
            update.reduce()  # over ranks: all climb the same way
            with torch.no_grad():
                trained = [p for p in self.model.parameters() if p.grad is not None]
                norm = torch.nn.utils.get_total_norm([p.grad for p in trained])
                climbs = [p.grad * (self.rho / (norm + 1e-12)) for p in trained]
                torch._foreach_add_(trained, climbs)
            update.clear()
            for part in batch:
                update.backward(self.model(*part))
            with torch.no_grad():
                torch._foreach_sub_(trained, climbs)
