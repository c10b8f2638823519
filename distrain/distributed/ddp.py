"""A copy of the model on each rank: DistributedDataParallel."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distrain.distributed.rng import random_states, restore_random_states
from distrain.errors import ConfigError
from distrain.log import logger

_UNUSED = re.compile(r"indices which did not receive grad for rank (\d+): ([\d ]+)")
_SHOWN = 5  # names in an error


class Replicated(DistributedDataParallel):
    """DDP that names unused parameters, and opens a profiler range only under a profiler.

    torch opens it always, and on a CPU that takes as long as a small layer.

    Attributes:
        combined: the names of the parameters whose gradients are combined, in DDP's order.
    """

    def __init__(self, module: nn.Module, **options: Any) -> None:
        super().__init__(module, **options)
        ignored = self.parameters_to_ignore
        self.combined = [
            name for name, p in module.named_parameters() if p.requires_grad and name not in ignored
        ]

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Return what the module returns.

        Raises:
            ConfigError: parameters had no gradient in the last backward; with their names.
        """
        ddp: Any = super()  # it has no types
        try:
            if torch.autograd.profiler._is_profiler_enabled or self._delay_all_reduce_all_params:
                return ddp.forward(*inputs, **kwargs)
            inputs, kwargs = ddp._pre_forward(*inputs, **kwargs)
            return ddp._post_forward(ddp._run_ddp_forward(*inputs, **kwargs))
        except RuntimeError as error:
            found = _UNUSED.search(str(error))
            if found is None:
                raise
            names = [self.combined[int(index)] for index in found[2].split()]
            shown = ", ".join(names[:_SHOWN]) + (" and others" if len(names) > _SHOWN else "")
            raise ConfigError(
                f"model: {len(names)} parameters had no gradient in the last step on rank "
                f"{found[1]} ({shown}): expected all to take part in each loss; set "
                "trainer.ddp.find_unused_parameters=true, or requires_grad=False before training"
            ) from error


def replicate(
    module: nn.Module, device: torch.device, world_size: int, options: Mapping[str, Any]
) -> nn.Module:
    """Return the model behind DistributedDataParallel; the model itself for one rank.

    Args:
        module: the model, on the device.
        device: of this rank.
        world_size: how many ranks there are.
        options: keywords of DistributedDataParallel, before our own.
    """
    if world_size == 1:
        return module
    options = {
        "gradient_as_bucket_view": True,
        "forward_sync_buffers": has_own_buffers(module),
    } | dict(options)
    device_ids = [device] if device.type == "cuda" else None
    return Replicated(module, device_ids=device_ids, **options)


def settle_buckets(ddp: DistributedDataParallel, forward: Callable[[], Tensor]) -> None:
    """Let DDP rebuild its gradient buckets, which it does once, before training. A collective.

    The model is not called: a module that only holds its parameters stands in for it, so that DDP's
    first backward gives each of them a gradient of zeros, the last one first. DDP rebuilds the
    buckets in that order at the next forward, and never again.

    Args:
        ddp: around the model.
        forward: calls it with the first batch and returns the loss; used for a static graph only,
            with a copy of the model in its place.
    """
    if not ddp.static_graph:
        with _standing_in(ddp, _Parameters(ddp.module)):
            ddp(torch.zeros((), device=ddp.device)).backward()
    else:
        _settle_static_graph(ddp, forward)
    for parameter in ddp.module.parameters():  # those that no optimizer has, too
        parameter.grad = None


def _settle_static_graph(ddp: DistributedDataParallel, forward: Callable[[], Tensor]) -> None:
    # The graph that DDP records in the first backward must be that of the model, so a copy with the
    # same parameters is called; such buckets are rebuilt after the second backward.
    memo: dict[int, Any] = {id(p): p for p in ddp.module.parameters()}
    try:
        twin = copy.deepcopy(ddp.module, memo)
    except Exception as error:
        logger.warning(
            "trainer.ddp.static_graph=true: the model cannot be copied (%s); on three ranks or "
            "more a resumed run may differ from a straight one in the last bits",
            str(error).partition("\n")[0],
        )
        return
    random = random_states()
    with _standing_in(ddp, twin):
        for _ in range(2):
            forward().backward()
    restore_random_states(random)


@contextmanager
def _standing_in(ddp: DistributedDataParallel, other: nn.Module) -> Iterator[None]:
    """Let DDP call another module in place of the model, without a broadcast of buffers."""
    module = ddp.module
    ddp.module = other
    ddp.require_forward_param_sync = False
    try:
        yield
    finally:
        ddp.module = module
        ddp.require_forward_param_sync = True


class _Parameters(nn.Module):
    """Has the parameters of a module, and a loss of 0 that depends on all of them."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.of_module = [p for p in module.parameters() if p.requires_grad]
        self.sparse = {
            part.weight
            for part in module.modules()
            if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.sparse
        }

    def forward(self, zero: Tensor) -> Tensor:
        """Return a () loss; its gradients are zeros, in the layout that DDP expects of each.

        Args:
            zero: () on the device.
        """
        loss = zero
        for p in self.of_module:
            if p in self.sparse:
                first = torch.zeros(1, dtype=torch.int64, device=p.device)
                part = nn.functional.embedding(first, p, sparse=True).sum()
            else:
                part = (torch.view_as_real(p) if p.is_complex() else p).sum()
            loss = loss + 0 * part.float()
        return loss


def has_own_buffers(module: nn.Module) -> bool:
    """Whether ranks may come to hold different buffers: those of SyncBatchNorm stay equal."""
    return any(
        "SyncBatchNorm" not in type(part).__name__
        for part in module.modules()
        for _ in part.buffers(recurse=False)
    )
