"""What differs where a model is sharded over the ranks instead of copied to each: FSDP2.

A sharded run keeps 1/W of parameters, gradients and optimizer state on each of W ranks; each block
is gathered for its forward and its backward. `torch.distributed.fsdp.fully_shard` does the work.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distrain.distributed.fsdp_blocks import check_shardable, find_blocks


def shard(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    *,
    blocks: Sequence[str] | None = None,
    reshard_after_forward: bool = True,
) -> None:
    """Shard a model in place, and let its optimizer hold the shards. A collective.

    All ranks begin with rank 0's weights. The model may lie on the CPU: it goes to the device block
    by block, so that it never lies there whole. The optimizer's groups stay as they are.

    Args:
        module: the model; its BatchNorms converted already.
        optimizer: over its parameters, without state yet.
        device: of this rank.
        blocks: see `find_blocks`.
        reshard_after_forward: free a block's gathered weights between forward and backward.

    Raises:
        ConfigError: the model cannot be sharded.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    parts = find_blocks(module, blocks)
    check_shardable(module)
    old = {parameter: name for name, parameter in module.named_parameters()}
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor, src=0)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for _, part in reversed(parts):
        fully_shard(part, mesh=mesh, reshard_after_forward=reshard_after_forward)
    fully_shard(module, mesh=mesh, reshard_after_forward=False)
    new = dict(module.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [new[old[p]] for p in group["params"]]
        group.update(_implementation(optimizer, device))
    # Gathered one block ahead in an order that all ranks share: by default the order follows the
    # forwards since the last backward, and those of an evaluation differ between ranks.
    before = [part for _, part in parts[:1]] + [part for _, part in parts]
    for (_, part), ahead in zip([*parts, ("", module)], before or [module], strict=True):
        assert isinstance(part, FSDPModule)
        assert isinstance(ahead, FSDPModule)
        part.set_modules_to_backward_prefetch([ahead])


def _implementation(optimizer: torch.optim.Optimizer, device: torch.device) -> dict[str, Any]:
    """Return the keywords of an optimizer's implementation that work on shards.

    Adam and AdamW fused do, on CPU and CUDA; fused SGD and Adagrad do not (torch 2.13: no sharding
    strategy registered). Then foreach on CUDA, and the plain loop on the CPU, where it is faster.
    """
    if "fused" not in optimizer.defaults and "foreach" not in optimizer.defaults:
        return {}
    fused = isinstance(optimizer, torch.optim.Adam) and bool(optimizer.param_groups[0]["fused"])
    return {"fused": fused or None, "foreach": None if fused else device.type == "cuda"}


@contextmanager
def without_sync(model: nn.Module) -> Iterator[None]:
    """Accumulate gradients on each rank, under DDP or FSDP, without combining them over ranks."""
    no_sync: Any = getattr(model, "no_sync", None)
    set_sync: Any = getattr(model, "set_requires_gradient_sync", None)
    if no_sync is not None:
        with no_sync():
            yield
    elif set_sync is not None:
        set_sync(False)
        try:
            yield
        finally:
            set_sync(True)
    else:
        yield


@contextmanager
def gathered_parameters(module: nn.Module, *, reshard_after_forward: bool) -> Iterator[None]:
    """Hold all parameters whole, so that ranks may call the model unequally often. A collective.

    Args:
        module: sharded by `shard`; any other is left as it is.
        reshard_after_forward: as it was given there.
    """
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
            part.set_reshard_after_forward(reshard_after_forward and is_block, recurse=False)
            part.reshard()


def total_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Return the () 2-norm of all gradients of all shards. A collective.

    Each rank has the norm n_r of its shards; the result is sqrt(n_0^2 + n_1^2 + ...), 5 for 3 and
    4.
    """
    norm = nn.utils.get_total_norm(_local_gradients(parameters))
    squared = norm.square()
    dist.all_reduce(squared)
    return squared.sqrt()


def gradient_norm(parameters: Sequence[Tensor]) -> Tensor:
    """Return the () 2-norm of all gradients, of shards or whole ones. A collective for shards."""
    if any(is_sharded(p) for p in parameters):
        return total_norm(parameters)
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def clip_sharded(
    parameters: Sequence[Tensor], *, norm: float | None = None, value: float | None = None
) -> Tensor | None:
    """Do what `optim.clip_gradients` does, to shards. A collective if `norm` is given."""
    gradients = _local_gradients(parameters)
    if value is not None:
        for gradient in gradients:
            gradient.clamp_(-value, value)
    if norm is None:
        return None
    total = total_norm(parameters)
    torch._foreach_mul_(gradients, (norm / (total + 1e-6)).clamp(max=1.0))
    return total


def _local_gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [_local(p.grad) for p in parameters if p.grad is not None]


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[no-any-return]


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a rank's part of a larger one."""
    return hasattr(tensor, "full_tensor")


def gather_state(state: Any) -> Any:
    """Return a nested state with each shard made whole, on the CPU of rank 0. A collective.

    Args:
        state: of a model or an optimizer; other ranks get None in place of a sharded tensor.
    """
    if is_sharded(state):
        whole = state.full_tensor()
        return whole.cpu() if dist.get_rank() == 0 else None
    if isinstance(state, Mapping):
        parts = {key: gather_state(value) for key, value in state.items()}
        return type(state)(parts) if type(state) is not dict else parts  # type: ignore[call-arg]
    if isinstance(state, list | tuple):
        return type(state)(gather_state(value) for value in state)
    return state


def load_model(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a whole state into a sharded model: each rank takes its part.

    Raises:
        RuntimeError: names or shapes differ; all are listed.
    """
    mine = module.state_dict()
    module.load_state_dict(
        {k: _part_of(v, mine[k]) if is_sharded(mine.get(k)) else v for k, v in state.items()}
    )


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load a whole state into an optimizer; of a sharded model, each rank takes its part.

    The implementation (fused, foreach) stays this run's.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [n for group in state["param_groups"] for n in group["params"]]
    own: list[dict[str, Any]] = [
        {k: g[k] for k in ("fused", "foreach") if k in g} for g in optimizer.param_groups
    ]
    by_number = dict(zip(numbers, parameters, strict=False))
    parts = {
        number: {
            key: _part_of(value, by_number[number])
            if isinstance(value, Tensor)
            and is_sharded(by_number.get(number))
            and value.shape == by_number[number].shape
            else value
            for key, value in entry.items()
        }
        for number, entry in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": parts})
    for group, keywords in zip(optimizer.param_groups, own, strict=True):
        group.update(keywords)


def _part_of(whole: Tensor, like: Any) -> Tensor:
    """Return this rank's part of a whole tensor, sharded as `like` is, in memory of its own."""
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
