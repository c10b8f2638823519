"""Gradients made smaller on their way between ranks: torch's communication hooks of DDP."""

# no `from __future__ import annotations`: DDP compares the annotations of a hook with the types
import inspect
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from distrain.checks import did_you_mean
from distrain.errors import ConfigError
from distrain.log import logger

CommHook = Literal["none", "bf16", "fp16", "powersgd"]


def compress_gradients(model: nn.Module, how: CommHook, options: Mapping[str, Any]) -> None:
    """Let DDP average gradients in a smaller form; a model that is not in DDP stays as it is.

    - "bf16", "fp16": half the bytes, each gradient rounded before and after the sum. fp16 ends at
      65504 and loses what is below 6e-8; bf16 has the range of float32 and 8 bits of precision.
      They hold no state, so resuming stays bit-identical.
    - "powersgd": each matrix as a product of two thin ones (Vogels et al. 2019, "PowerSGD",
      arXiv:1905.13727), after `start_powerSGD_iter` exact steps. What it left out of a step each
      rank adds to its next one; that is as large as the gradients, another on each rank, and not
      part of checkpoints: a resumed run starts it anew and differs from a straight one. torch's
      implementation waits for the GPU once a bucket.

    Args:
        model: a DDP, before its first step.
        how: the form.
        options: keywords of torch's `PowerSGDState`, such as `matrix_approximation_rank`.

    Raises:
        ConfigError: the form or an option does not exist or is out of range.
    """
    if how not in get_args(CommHook):
        raise ConfigError(f"trainer.comm_hook={how!r}; choose {', '.join(get_args(CommHook))}")
    if how != "powersgd" and options:
        raise ConfigError(
            f"trainer.comm_options={dict(options)}: {how} has none; only powersgd takes options"
        )
    if how == "powersgd":
        _check_options(options)
    if how == "none" or not isinstance(model, DistributedDataParallel):
        return
    if how == "powersgd":
        if dist.get_rank() == 0:
            logger.warning(
                "trainer.comm_hook=powersgd: what it leaves out of a step is not in checkpoints, "
                "so a resumed run will not be bit-identical to one without the interruption"
            )
        model.register_comm_hook(_power_state(options), powerSGD_hook.powerSGD_hook)
    else:
        model.register_comm_hook(None, _as_bf16 if how == "bf16" else _as_fp16)


def _as_bf16(group: dist.ProcessGroup, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Do what torch's hook does; DDP refuses that one by name where there is no NCCL."""
    return default_hooks.bf16_compress_hook(group, bucket)


def _as_fp16(group: dist.ProcessGroup, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    return default_hooks.fp16_compress_hook(group, bucket)


def _check_options(options: Mapping[str, Any]) -> None:
    known = [*inspect.signature(powerSGD_hook.PowerSGDState).parameters][1:]
    for key in options:
        if key not in known:
            raise ConfigError(
                f"trainer.comm_options.{key}: no such key; {did_you_mean(key, known)}"
            )
    _power_state(options)


def _power_state(options: Mapping[str, Any]) -> powerSGD_hook.PowerSGDState:
    try:
        return powerSGD_hook.PowerSGDState(None, **options)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"trainer.comm_options={dict(options)}: {error}") from error
