"""DDP strategy: a replica of the model on each rank."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from typing_extensions import override

from distrain.checks import wrong
from distrain.distributed.comm_hooks import CommHook, check_comm_hook, compress_gradients
from distrain.distributed.ranks import topology
from distrain.distributed.replicas import average_gradients, broadcast
from distrain.distributed.rng import random_states, restore_random_states
from distrain.distributed.strategy import Strategy
from distrain.distributed.without_profiler import UnprofiledDDP
from distrain.errors import ConfigError
from distrain.log import logger

_UNUSED = re.compile(r"indices which did not receive grad for rank (\d+): ([\d ]+)")
_OPTIONS_OF_PARTS = {
    "broadcast_buffers",
    "find_unused_parameters",
    "gradient_as_bucket_view",
    "static_graph",
}
_MAX_LISTED = 5  # names in an error
# torch >= 2.13; before it, buffers are broadcast in every forward
_HAS_FORWARD_SYNC_BUFFERS = (
    "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
)


class DDP(Strategy):
    """A replica of the model on each rank: DistributedDataParallel.

    Args:
        options: keywords of torch's DistributedDataParallel.
        comm_hook: form of the gradients between ranks, see `comm_hooks.compress_gradients`.
        comm_options: of the comm hook.

    Raises:
        ConfigError: the comm hook or one of its options is not allowed.
    """

    def __init__(
        self,
        options: Mapping[str, Any] | None = None,
        *,
        comm_hook: CommHook = "none",
        comm_options: Mapping[str, Any] | None = None,
    ) -> None:
        self._options = dict(options or {})
        self._comm_hook: CommHook = comm_hook
        self._comm_options = comm_options or {}
        check_comm_hook(comm_hook, self._comm_options)

    @override
    def check(self, **settings: Any) -> None:
        if self._options.get("static_graph") and settings["accumulation"] > 1:
            raise ConfigError(
                "trainer.ddp.static_graph=true: expected trainer.accumulation=1, not "
                f"{settings['accumulation']}: DDP fails where gradients are not reduced in each "
                "backward; leave static_graph out"
            )

    @override
    def wrap(self, module: nn.Module, optimizer: Optimizer, device: torch.device) -> nn.Module:
        module = module.to(device)
        if topology().world_size == 1:
            return module
        options = {"gradient_as_bucket_view": True}
        if _HAS_FORWARD_SYNC_BUFFERS:
            options["forward_sync_buffers"] = has_own_buffers(module)
        device_ids = [device] if device.type == "cuda" else None
        ddp = Replica(module, device_ids=device_ids, **options | self._options)
        compress_gradients(ddp, self._comm_hook, self._comm_options)
        return ddp

    @override
    def wrap_parts(
        self, module: nn.Module, optimizers: Sequence[Optimizer], device: torch.device
    ) -> nn.Module:
        # DistributedDataParallel expects one backward of all parameters per forward
        if self._comm_hook != "none":
            raise wrong("trainer.comm_hook", self._comm_hook, "none with a step of your own")
        for key, value in self._options.items():
            if key not in _OPTIONS_OF_PARTS or (key == "static_graph" and value):
                expected = f"no {key} with a step of your own; leave it out"
                raise wrong(f"trainer.ddp.{key}", value, expected)
        module = module.to(device)
        broadcast([*module.parameters(), *module.buffers()])
        self._shares_buffers = self._options.get("broadcast_buffers", True) and has_own_buffers(
            module
        )
        return module

    @override
    def before_parts(self, module: nn.Module) -> None:
        if self._shares_buffers:  # as DDP does before a forward
            broadcast(module.buffers())

    @override
    def reduce_gradients(self, parameters: Sequence[Tensor]) -> None:
        average_gradients(parameters)

    @override
    def warm_up(self, model: nn.Module, first_loss: Callable[[], Tensor]) -> None:
        # From three ranks on the order of the buckets changes the order of additions, and DDP
        # rebuilds its buckets after its first backward. A resumed run has a first backward of its
        # own, so without this it would differ from a straight run in the last bits.
        if topology().world_size > 2:
            assert isinstance(model, Replica)
            _settle_buckets(model, first_loss)

    @override
    def reduced_parameters(self, model: nn.Module) -> Collection[str] | None:
        return model.reduced if isinstance(model, Replica) else None

    @override
    def no_sync(self, model: nn.Module) -> AbstractContextManager[object]:
        return model.no_sync() if isinstance(model, Replica) else nullcontext()


class Replica(UnprofiledDDP):
    """DistributedDataParallel that names unused parameters.

    Attributes:
        reduced: names of the parameters whose gradients are reduced, in DDP's order.
    """

    def __init__(self, module: nn.Module, **options: Any) -> None:
        super().__init__(module, **options)
        ignored = self.parameters_to_ignore
        self.reduced = [
            name for name, p in module.named_parameters() if p.requires_grad and name not in ignored
        ]

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Return what the module returns.

        Raises:
            ConfigError: parameters had no gradient in the last backward; with their names.
        """
        try:
            return super().forward(*inputs, **kwargs)
        except RuntimeError as error:
            found = _UNUSED.search(str(error))
            if found is None:
                raise
            names = [self.reduced[int(index)] for index in found[2].split()]
            shown = ", ".join(names[:_MAX_LISTED]) + (" and others" if names[_MAX_LISTED:] else "")
            raise ConfigError(
                f"model: {len(names)} parameters had no gradient in the last step on rank "
                f"{found[1]} ({shown}): expected all to take part in each loss; set "
                "trainer.ddp.find_unused_parameters=true, or requires_grad=False before training"
            ) from error


def _settle_buckets(ddp: Replica, first_loss: Callable[[], Tensor]) -> None:
    """Let DDP rebuild its gradient buckets, which it does once, before training. A collective.

    The model is not called: a module that holds its parameters stands in for it, so that the first
    backward gives each of them a gradient of zeros, the last one first. DDP rebuilds the buckets in
    that order at the next forward, and never again. The graph that DDP records of a static graph
    must be the model's, so there a copy of the model stands in.
    """
    if not ddp.static_graph:
        with _standing_in(ddp, _ZeroLoss(ddp.module)):
            ddp(torch.zeros((), device=ddp.device)).backward()
    else:
        _settle_static_graph(ddp, first_loss)
    for parameter in ddp.module.parameters():  # also those that no optimizer has
        parameter.grad = None


def _settle_static_graph(ddp: Replica, first_loss: Callable[[], Tensor]) -> None:
    memo: dict[int, Any] = {id(p): p for p in ddp.module.parameters()}
    try:
        twin = copy.deepcopy(ddp.module, memo)  # with the same parameters
    except Exception as error:
        logger.warning(
            "trainer.ddp.static_graph=true: the model cannot be copied (%s); on three ranks or "
            "more a resumed run may differ from a straight one in the last bits",
            str(error).partition("\n")[0],
        )
        return
    random = random_states()
    with _standing_in(ddp, twin):
        for _ in range(2):  # such buckets are rebuilt after the second backward
            first_loss().backward()
    restore_random_states(random)


@contextmanager
def _standing_in(ddp: Replica, other: nn.Module) -> Iterator[None]:
    """Let DDP call another module instead of the model, without a broadcast of buffers."""
    module = ddp.module
    ddp.module = other
    ddp.require_forward_param_sync = False
    try:
        yield
    finally:
        ddp.module = module
        ddp.require_forward_param_sync = True


class _ZeroLoss(nn.Module):
    """A loss of 0 that depends on all parameters of a module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.trained = [p for p in module.parameters() if p.requires_grad]
        self.sparse = {
            part.weight
            for part in module.modules()
            if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.sparse
        }

    def forward(self, zero: Tensor) -> Tensor:
        """Return a () loss whose gradients are zeros, in the layout that DDP expects of each.

        Args:
            zero: () on the device.
        """
        loss = zero
        for p in self.trained:
            if p in self.sparse:
                first = torch.zeros(1, dtype=torch.int64, device=p.device)
                part = nn.functional.embedding(first, p, sparse=True).sum()
            else:
                part = (torch.view_as_real(p) if p.is_complex() else p).sum()
            loss = loss + 0 * part.float()
        return loss


def has_own_buffers(module: nn.Module) -> bool:
    """Whether buffers may differ between ranks in training; those of SyncBatchNorm stay equal."""
    return any(
        "SyncBatchNorm" not in type(part).__name__
        for part in module.modules()
        for _ in part.buffers(recurse=False)
    )
