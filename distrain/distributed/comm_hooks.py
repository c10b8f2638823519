"""DDP communication hooks: gradients in bf16, fp16 or by PowerSGD between ranks."""

# no `from __future__ import annotations`: DDP compares the annotations of a hook with the types
import inspect
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from distrain.checks import did_you_mean, one_of
from distrain.errors import ConfigError
from distrain.log import logger

CommHook = Literal["none", "bf16", "fp16", "powersgd"]


def compress_gradients(
    ddp: DistributedDataParallel, comm_hook: CommHook, options: Mapping[str, Any]
) -> None:
    """Register a comm hook, so that gradients travel in a smaller form.

    - "bf16", "fp16": half the bytes, each gradient rounded before and after the sum. fp16 ends at
      65504 and loses values below 6e-8; bf16 has the range of float32 and 8 bits of precision.
      They hold no state, so resuming stays bit-identical.
    - "powersgd": each matrix as a product of two thin ones (Vogels et al. 2019, "PowerSGD",
      arXiv:1905.13727), after `start_powerSGD_iter` exact steps. Each rank adds its error of a step
      to its gradients of the next one. The errors are as large as the gradients, differ between
      ranks and are not in checkpoints: a resumed run differs from a straight one. torch's
      implementation waits for the GPU once per bucket.

    Args:
        ddp: before its first step.
        comm_hook: one that `check_comm_hook` has checked, and its `options`.
        options: keywords of torch's `PowerSGDState`, such as `matrix_approximation_rank`.
    """
    if comm_hook == "powersgd":
        if dist.get_rank() == 0:
            logger.warning(
                "trainer.comm_hook=powersgd: its errors are not in checkpoints, so a resumed run "
                "will not be bit-identical to one without the interruption"
            )
        ddp.register_comm_hook(_power_state(options), powerSGD_hook.powerSGD_hook)
    elif comm_hook != "none":
        ddp.register_comm_hook(None, _bf16_hook if comm_hook == "bf16" else _fp16_hook)


def check_comm_hook(comm_hook: str, options: Mapping[str, Any]) -> None:
    """Raise ConfigError if a comm hook, or an option of it, does not exist or is out of range."""
    one_of("trainer.comm_hook", comm_hook, get_args(CommHook))
    if comm_hook != "powersgd":
        if options:
            raise ConfigError(
                f"trainer.comm_options={dict(options)}: expected none, as {comm_hook} has none; "
                "leave them out, or choose trainer.comm_hook=powersgd"
            )
        return
    known = [*inspect.signature(powerSGD_hook.PowerSGDState).parameters][1:]
    for key in options:
        if key not in known:
            raise ConfigError(
                f"trainer.comm_options.{key}: no such key; {did_you_mean(key, known)}"
            )
    _power_state(options)


# torch's own two hooks: DDP refuses them by name where there is no NCCL
def _bf16_hook(group: dist.ProcessGroup, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    return default_hooks.bf16_compress_hook(group, bucket)


def _fp16_hook(group: dist.ProcessGroup, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    return default_hooks.fp16_compress_hook(group, bucket)


def _power_state(options: Mapping[str, Any]) -> powerSGD_hook.PowerSGDState:
    try:
        return powerSGD_hook.PowerSGDState(None, **options)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"trainer.comm_options={dict(options)}: {error}") from error
