"""Restore modes, buffers and random generators after a use of the model outside of training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distrain.distributed.ranks import topology
from distrain.distributed.rng import random_states, restore_random_states
from distrain.events.storage import EventStorage


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode; at the end each submodule returns to its own mode."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        _set_modes(modes)


def train_mode(module: nn.Module) -> None:
    """Put a module into train mode, except for parts that are in eval mode.

    A module in eval mode as a whole, as `from_pretrained` returns it, has no such parts.
    """
    frozen = {part for part in module.modules() if not part.training} if module.training else set()
    module.train()  # an overridden one may put parts into eval mode
    _set_modes([(part, part.training and part not in frozen) for part in module.modules()])


def _set_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    for part, mode in modes:  # parents first: their train() also sets their children
        if part.training != mode:
            part.train(mode)
    for part, mode in modes:
        part.training = mode  # where an overridden train() sets another mode


@contextmanager
def kept_generators() -> Iterator[None]:
    """Restore the random generators of this process at the end."""
    states = random_states()
    try:
        yield
    finally:
        restore_random_states(states)


@contextmanager
def no_trace(module: nn.Module) -> Iterator[None]:
    """Restore a module's buffers and attributes, the generators and the storage at the end."""
    attributes = [(part, dict(vars(part))) for part in module.modules()]
    buffers = KeptBuffers(module.modules())
    with contextlib.ExitStack() as inside:
        inside.enter_context(kept_generators())
        inside.enter_context(EventStorage())
        parts = module.modules()  # the whole, or blocks
        if any(getattr(part, "_compiled_call_impl", None) is not None for part in parts):
            # with hooks and without gradients it would compile again, which takes a minute
            inside.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            yield
        finally:
            for part, before in attributes:
                for name in vars(part).keys() - before.keys():
                    del vars(part)[name]
                vars(part).update(before)
            buffers.restore()


class KeptBuffers:
    """Buffers of modules as they are now: the tensors and their contents.

    A forward may change them in place, or assign others: `self.center = 0.9 * self.center + ...`.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._places = [(part._buffers, dict(part._buffers)) for part in modules if part._buffers]
        kept = {id(b): b for _, named in self._places for b in named.values() if b is not None}
        self._contents = [(b, b.detach().clone()) for b in kept.values() if _is_writable(b)]

    @torch.no_grad()
    def restore(self) -> None:
        """Give the modules these buffers again; those that are new since stay."""
        for buffers, before in self._places:
            buffers.update(before)
        for buffer, old in self._contents:
            buffer.copy_(old)


def _is_writable(buffer: Tensor) -> bool:
    """Whether a buffer can change in place: one that is expanded cannot."""
    if buffer.layout is not torch.strided:
        return True
    return all(
        stride or size <= 1 for size, stride in zip(buffer.shape, buffer.stride(), strict=True)
    )


@contextmanager
def buffers_of_rank_0(module: nn.Module) -> Iterator[None]:
    """Use rank 0's buffers on all ranks; at the end each rank's own are restored.

    They differ where BatchNorm is not synchronised; checkpoints hold those of rank 0. Entering is a
    collective, leaving is not.
    """
    buffers = [
        b for b in module.buffers() if b.layout is torch.strided and b.numel() and _is_writable(b)
    ]
    if topology().world_size == 1 or not buffers:
        yield
        return
    own = [buffer.clone() for buffer in buffers]
    with torch.no_grad():
        _broadcast(buffers)
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, old in zip(buffers, own, strict=True):
                buffer.copy_(old)


def _broadcast(tensors: list[Tensor]) -> None:
    """Broadcast tensors from rank 0, by one collective per device."""
    for device in dict.fromkeys(tensor.device for tensor in tensors):
        group = [tensor for tensor in tensors if tensor.device == device]
        # as bytes: not every backend sends every dtype
        parts = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in group]
        packed = torch.cat(parts)
        dist.broadcast(packed, 0)
        for tensor, part in zip(group, packed.split([len(part) for part in parts]), strict=True):
            tensor.copy_(part.clone().view(tensor.dtype).view(tensor.shape))
