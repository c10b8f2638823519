"""The update of a step, and its gradients gone, at the cost of the work itself.

torch wraps `step` and `zero_grad` of every optimizer in a record for its profiler. On a CPU that
takes as long as updating a small model.
"""

from __future__ import annotations

import torch
from torch.optim import Optimizer
from torch.optim import optimizer as optimizer_module

_RECORDED = Optimizer.profile_hook_step(lambda: None).__code__  # of torch's wrapper


def update(optimizer: Optimizer) -> None:
    """Call `optimizer.step()`, without the record while nobody looks at it.

    With hooks of the optimizer, a torch scheduler that counts its steps, or a profiler at work, it
    is the wrapped step.
    """
    step = type(optimizer).step
    if (
        getattr(step, "__code__", None) is not _RECORDED
        or "step" in vars(optimizer)
        or optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or optimizer_module._global_optimizer_pre_hooks
        or optimizer_module._global_optimizer_post_hooks
        or torch.autograd.profiler._is_profiler_enabled
    ):
        optimizer.step()
    else:
        step.__wrapped__(optimizer)  # type: ignore[attr-defined]


def clear_gradients(optimizer: Optimizer) -> None:
    """Set all gradients to None, as `zero_grad` does, without the record."""
    is_plain = type(optimizer).zero_grad is Optimizer.zero_grad
    if not is_plain or "zero_grad" in vars(optimizer):  # it has a way of its own
        optimizer.zero_grad()
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None
