"""State of a model that a look at it must leave alone: modes, buffers, random generators."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distrain.distributed.ranks import topology
from distrain.distributed.rng import random_states, restore_random_states
from distrain.events.storage import EventStorage


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode inside `with`; each submodule gets its own mode back."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        _set_modes(modes)


def train_mode(module: nn.Module) -> None:
    """Put a module into train mode, except those of its parts that are in eval mode.

    A module that is in eval mode as a whole, as `from_pretrained` returns it, has no such parts.
    """
    frozen = {part for part in module.modules() if not part.training} if module.training else set()
    module.train()  # one of the user's own may put parts into eval mode
    _set_modes([(part, part.training and part not in frozen) for part in module.modules()])


def _set_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    for part, mode in modes:  # a parent before its children, whose own modes come later
        if part.training != mode:
            part.train(mode)
    for part, mode in modes:
        part.training = mode  # where a `train` of the user's own does something else


@contextmanager
def kept_generators() -> Iterator[None]:
    """Give the random generators of this process their states back at the end of `with`."""
    states = random_states()
    try:
        yield
    finally:
        restore_random_states(states)


@contextmanager
def no_trace(module: nn.Module) -> Iterator[None]:
    """Call a module inside `with`, leaving no trace of it.

    Its buffers, the generators and the storage stay as they are, and each attribute of a submodule
    keeps its object.
    """
    attributes = [(part, dict(vars(part))) for part in module.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers() if _is_writable(buffer)]
    with contextlib.ExitStack() as inside:
        inside.enter_context(kept_generators())
        inside.enter_context(EventStorage())
        if getattr(module, "_compiled_call_impl", None) is not None:
            # with hooks and without gradients it would be compiled again, which takes a minute
            inside.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            yield
        finally:
            for part, before in attributes:
                for name in vars(part).keys() - before.keys():
                    del vars(part)[name]
                vars(part).update(before)
            with torch.no_grad():
                for buffer, old in buffers:
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
    """Let all ranks have rank 0's buffers inside `with`, and their own again after it.

    They differ where BatchNorm is not synchronised; rank 0's are those that checkpoints hold. The
    beginning is a collective, the end is not.
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
    """Give all ranks the values of rank 0, with one collective per device."""
    for device in dict.fromkeys(tensor.device for tensor in tensors):
        here = [tensor for tensor in tensors if tensor.device == device]
        # bytes, as not every backend sends every dtype
        parts = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in here]
        packed = torch.cat(parts)
        dist.broadcast(packed, 0)
        for tensor, part in zip(here, packed.split([len(part) for part in parts]), strict=True):
            tensor.copy_(part.clone().view(tensor.dtype).view(tensor.shape))
