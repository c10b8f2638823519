"""optimizer.step(), zero_grad() and DDP.forward() without torch's profiler range.

torch opens a range for its profiler in each of them, which on a CPU takes as long as updating a
small model. This is the only file that uses the private names which avoid it: where a version of
torch lacks one, and under a profiler, torch's public path is taken.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim import optimizer as optimizer_module

_DDP_FORWARD = ("_pre_forward", "_run_ddp_forward", "_post_forward")


def _step_wrapper() -> Any:
    """Return the code of torch's wrapper of `step`; None if this torch has no such wrapper."""
    wrap = getattr(Optimizer, "profile_hook_step", None)
    return None if wrap is None else wrap(lambda: None).__code__


_STEP_WRAPPER = _step_wrapper()
_HAS_DDP_FORWARD = all(hasattr(DistributedDataParallel, name) for name in _DDP_FORWARD)


def _is_profiling() -> bool:
    return getattr(torch.autograd.profiler, "_is_profiler_enabled", True)


def update(optimizer: Optimizer) -> None:
    """Call `optimizer.step()`; unwrapped if no hook, torch scheduler or profiler observes it."""
    step = type(optimizer).step
    if (
        _STEP_WRAPPER is None
        or getattr(step, "__code__", None) is not _STEP_WRAPPER
        or "step" in vars(optimizer)  # a torch scheduler counts the steps
        or getattr(optimizer, "_optimizer_step_pre_hooks", True)
        or getattr(optimizer, "_optimizer_step_post_hooks", True)
        or getattr(optimizer_module, "_global_optimizer_pre_hooks", True)
        or getattr(optimizer_module, "_global_optimizer_post_hooks", True)
        or _is_profiling()
    ):
        optimizer.step()
    else:
        step.__wrapped__(optimizer)  # type: ignore[attr-defined]


def clear_gradients(optimizer: Optimizer) -> None:
    """Set all gradients to None, unless the optimizer overrides `zero_grad`."""
    if type(optimizer).zero_grad is not Optimizer.zero_grad or "zero_grad" in vars(optimizer):
        optimizer.zero_grad()
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


class UnprofiledDDP(DistributedDataParallel):
    """DistributedDataParallel whose forward opens a profiler range under a profiler only."""

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Call the module and prepare the reduction of its gradients."""
        ddp: Any = super()  # it has no types
        if (
            not _HAS_DDP_FORWARD
            or _is_profiling()
            or getattr(self, "_delay_all_reduce_all_params", True)
        ):
            return ddp.forward(*inputs, **kwargs)
        inputs, kwargs = ddp._pre_forward(*inputs, **kwargs)
        return ddp._post_forward(ddp._run_ddp_forward(*inputs, **kwargs))
