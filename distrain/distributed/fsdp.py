"""FSDP strategy, by torch's FSDP2: the model sharded over the ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from distrain.distributed.fsdp_blocks import check_shardable, find_blocks
from distrain.distributed.ranks import topology
from distrain.distributed.strategy import Strategy
from distrain.errors import ConfigError


class FSDP(Strategy):
    """Each of W ranks holds 1/W of parameters, gradients and optimizer state.

    Each block is gathered for its forward and its backward, by torch's `fully_shard`.

    Args:
        blocks: see `fsdp_blocks.find_blocks`.
        reshard_after_forward: free a block's gathered weights between forward and backward.
    """

    def __init__(
        self, blocks: Sequence[str] | None = None, reshard_after_forward: bool = True
    ) -> None:
        self._blocks = blocks
        self._reshards = reshard_after_forward
        self.is_sharded = topology().world_size > 1
        self._syncs = True  # whether a backward reduces gradients
        self._parts: list[Any] = []  # modules that are gathered one by one

    @override
    def check(self, **settings: Any) -> None:
        if settings["compile"] or settings["channels_last"] or settings["precision"] == "fp16":
            raise ConfigError(
                "trainer.strategy=fsdp does not go with trainer.compile, trainer.channels_last or "
                "trainer.precision=fp16; leave them at their defaults (bf16 works)"
            )

    @override
    def wrap(self, module: nn.Module, optimizer: Optimizer, device: torch.device) -> nn.Module:
        blocks = find_blocks(module, self._blocks)  # checked with one rank, too
        if not self.is_sharded:
            return module.to(device)
        check_shardable(module)
        if type(optimizer).__module__.startswith("torchao."):
            raise ConfigError(
                f"trainer.strategy=fsdp: expected an optimizer with whole states, not "
                f"{type(optimizer).__name__} of torchao; set trainer.strategy=ddp"
            )
        old = {parameter: name for name, parameter in module.named_parameters()}
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                dist.broadcast(tensor, src=0)
        # block by block from where the model lies, so that it is never on the device as a whole
        self._shard(module, [block for _, block in blocks], device)
        new = dict(module.named_parameters())
        for group in optimizer.param_groups:
            group["params"] = [new[old[p]] for p in group["params"]]
            group.update(_implementation(optimizer, group, device))
        return module

    @override
    def wrap_parts(
        self, module: nn.Module, optimizers: Sequence[Optimizer], device: torch.device
    ) -> nn.Module:
        if len(optimizers) > 1 or isinstance(module, nn.ModuleDict):
            raise ConfigError(
                "trainer.strategy=fsdp: expected one model with one optimizer; use ddp"
            )
        return self.wrap(module, optimizers[0], device)

    def _shard(self, module: nn.Module, blocks: list[nn.Module], device: torch.device) -> None:
        # imported here: it takes 0.3 s
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard

        mesh = init_device_mesh(device.type, (topology().world_size,))
        for block in reversed(blocks):
            fully_shard(block, mesh=mesh, reshard_after_forward=self._reshards)
        fully_shard(module, mesh=mesh, reshard_after_forward=False)
        self._parts = [*blocks, module]
        # Prefetch one block in an order that all ranks share: by default it is that of the forwards
        # since the last backward, and those of an evaluation differ between ranks.
        before = blocks[:1] + blocks
        for part, ahead in zip([*blocks, module], before or [module], strict=True):
            assert isinstance(part, FSDPModule)
            assert isinstance(ahead, FSDPModule)
            part.set_modules_to_backward_prefetch([ahead])
        # torch takes the first module that is called for the root, and fails later if it was a
        # block: a model's `metrics`, which is called before the first forward, calls blocks alone
        assert isinstance(module, FSDPModule)
        module._get_fsdp_state()._lazy_init()

    @contextmanager
    @override
    def no_sync(self, model: Any) -> Iterator[None]:
        with self._synced(model, False):
            yield

    @contextmanager
    @override
    def reduced_backward(self, model: Any) -> Iterator[None]:
        # inside `no_sync` gradients that are not reduced lie in torch's private buffers
        with self._synced(model, True):
            yield

    @contextmanager
    def _synced(self, model: Any, syncs: bool) -> Iterator[None]:
        if not self.is_sharded:
            yield
            return
        before, self._syncs = self._syncs, syncs
        model.set_requires_gradient_sync(syncs)
        try:
            yield
        finally:
            self._syncs = before
            model.set_requires_gradient_sync(before)

    @override
    def local(self, tensor: Tensor) -> Tensor:
        return _local(tensor)

    @override
    def gathered(self, state: Any) -> Any:
        return _gathered(state) if self.is_sharded else state

    @override
    def part_of(self, whole: Tensor, like: Tensor) -> Tensor:
        return _part_of(whole, like) if is_sharded(like) else whole

    @override
    def gradient_norm(self, parameters: Sequence[Tensor]) -> Tensor:
        """Return sqrt(n_0^2 + n_1^2 + ...) of the norms of all ranks' shards: 5 for 3 and 4."""
        if not self.is_sharded:
            return super().gradient_norm(parameters)
        squared = nn.utils.get_total_norm(_local_gradients(parameters)).square()
        dist.all_reduce(squared)
        return squared.sqrt()

    @override
    def clip(
        self, parameters: Sequence[Tensor], *, norm: float | None = None, value: float | None = None
    ) -> Tensor | None:
        if not self.is_sharded:
            return super().clip(parameters, norm=norm, value=value)
        gradients = _local_gradients(parameters)
        if value is not None:
            for gradient in gradients:
                gradient.clamp_(-value, value)
        if norm is None:
            return None
        total = self.gradient_norm(parameters)
        torch._foreach_mul_(gradients, (norm / (total + 1e-6)).clamp(max=1.0))
        return total

    @contextmanager
    @override
    def whole_parameters(self, module: nn.Module) -> Iterator[None]:
        from torch.distributed.fsdp import FSDPModule

        parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        try:
            yield
        finally:
            for part in parts:
                is_block = part is not module
                part.set_reshard_after_forward(self._reshards and is_block, recurse=False)
                part.reshard()

    @override
    def free_gathered(self, module: nn.Module) -> None:
        for part in self._parts:
            part.reshard()

    @override
    def state_dict(self, module: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        return self.gathered(super().state_dict(module, optimizer))  # type: ignore[no-any-return]

    @override
    def load_state_dict(
        self, module: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]
    ) -> None:
        if self.is_sharded:
            parts = module.state_dict()
            model = {
                name: _part_of(value, parts[name]) if is_sharded(parts.get(name)) else value
                for name, value in state["model"].items()
            }
            state = {"model": model, "optimizer": _parts(optimizer, state["optimizer"])}
        super().load_state_dict(module, optimizer, state)


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a rank's shard of a larger one."""
    return hasattr(tensor, "full_tensor")


def _implementation(
    optimizer: Optimizer, group: Mapping[str, Any], device: torch.device
) -> dict[str, Any]:
    """Return the keywords of an optimizer's implementation that work on shards, for a group.

    Fused Adam and AdamW do, on CPU and CUDA; fused SGD and Adagrad do not (torch 2.13: no sharding
    strategy registered). Then foreach on CUDA, and the plain loop on the CPU, where it is faster.
    """
    if "fused" not in group and "foreach" not in group:
        return {}
    fused = isinstance(optimizer, torch.optim.Adam) and bool(group["fused"])
    return {"fused": fused or None, "foreach": None if fused else device.type == "cuda"}


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[no-any-return]


def _local_gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [_local(p.grad) for p in parameters if p.grad is not None]


def _gathered(state: Any) -> Any:
    """Return a nested state with whole tensors on the CPU of rank 0, None for them elsewhere."""
    if is_sharded(state):
        whole = state.full_tensor()
        return whole.cpu() if dist.get_rank() == 0 else None
    if isinstance(state, Mapping):
        parts = {key: _gathered(value) for key, value in state.items()}
        return type(state)(parts) if type(state) is not dict else parts  # type: ignore[call-arg]
    if isinstance(state, list | tuple):
        return type(state)(_gathered(value) for value in state)
    return state


def _parts(optimizer: Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return this rank's parts of a whole optimizer state."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [n for group in state["param_groups"] for n in group["params"]]
    sharded = {
        number: parameter
        for number, parameter in zip(numbers, parameters, strict=False)
        if is_sharded(parameter)
    }

    def part(number: int, value: Any) -> Any:
        parameter = sharded.get(number)
        if parameter is None or not isinstance(value, Tensor) or value.shape != parameter.shape:
            return value
        return _part_of(value, parameter)

    entries = {
        number: {key: part(number, value) for key, value in entry.items()}
        for number, entry in state["state"].items()
    }
    return {**state, "state": entries}


def _part_of(whole: Tensor, like: Any) -> Tensor:
    """Return this rank's shard of a whole tensor, placed as `like` is, in memory of its own."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    mesh = like.device_mesh
    part = distribute_tensor(
        whole.to(_local(like).device), mesh, like.placements, src_data_rank=None
    )
    return DTensor.from_local(
        part.to_local().clone(),
        mesh,
        like.placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )
