"""Activation checkpointing: activations are computed again in backward instead of kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from distrain.checks import wrong
from distrain.errors import ConfigError
from distrain.events.storage import EventStorage, entered_storage
from distrain.transforms.blocks import outermost_blocks

Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


def checkpoint_activations(
    model: nn.Module,
    *,
    blocks: str | Sequence[str] | None = None,
    save: Sequence[str] = (),
) -> nn.Module:
    """Return the model, whose blocks keep their inputs only and run again in backward.

    Gradients have the same bits: dropout draws the same numbers again. Names of parameters stay.
    Scalars that a block puts are put once. By torch's `checkpoint(use_reentrant=False)`.

    Args:
        model: changed in place.
        blocks: class names or name patterns of modules; None: the repeated ones.
        save: operators whose results are kept, as ["aten.mm", "aten.addmm"]: selective
            checkpointing. Empty computes all again.

    Raises:
        ConfigError: no module matches, a block has BatchNorm, or an operator is unknown; in
            training: the forward of a block changes a buffer, as a spectral norm does.
    """
    operators = [_operator(name) for name in save]
    found = outermost_blocks(model, blocks)
    for name, block in found:
        if any(isinstance(part, _BatchNorm) for part in block.modules()):
            expected = f"blocks without BatchNorm, which would count twice; {name} has one"
            raise wrong("blocks", blocks, expected)
    for name, block in found:
        forward = block.forward
        if any(True for _ in block.buffers()):
            forward = partial(_with_same_buffers, forward, block, name)
        block.forward = partial(_again_in_backward, forward, operators)
    return model


def _with_same_buffers(
    forward: Callable[..., Any], block: nn.Module, name: str, *args: Any, **keywords: Any
) -> Any:
    """Call the forward; ConfigError if it changes a buffer, as it would again in backward."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return forward(*args, **keywords)
    before = {key: (buffer, buffer._version) for key, buffer in block.named_buffers()}
    output = forward(*args, **keywords)
    for key, buffer in block.named_buffers():
        old, version = before.get(key, (buffer, buffer._version))
        is_other = buffer._version != version if old is buffer else _has_changed(old, buffer)
        if is_other:
            raise ConfigError(
                f"checkpoint_activations: the forward of {name} changes its buffer {key}, and "
                "would again in backward, with other activations (as of a spectral norm): "
                "expected blocks whose forward changes no buffer; name others by blocks=..."
            )
    return output


def _has_changed(old: Tensor, new: Tensor) -> bool:
    """Whether a buffer that was replaced has other values."""
    # one of another shape is a cache that grew with its input
    return old.shape == new.shape and not torch.equal(old.to(new), new)


def _again_in_backward(
    forward: Callable[..., Any], operators: list[Any], *args: Any, **keywords: Any
) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **keywords)
    contexts: Any = partial(_contexts, operators)
    if torch.compiler.is_compiling():  # it traces contexts of operators only
        contexts = partial(create_selective_checkpoint_contexts, operators)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **keywords)


def _contexts(operators: list[Any]) -> Contexts:
    """Return the contexts of the forward and of its repetition, which puts no scalars."""
    first: AbstractContextManager[Any] = nullcontext()
    again: AbstractContextManager[Any] = nullcontext()
    if operators:
        first, again = create_selective_checkpoint_contexts(operators)
    return first, _repetition(again, entered_storage())


@contextmanager
def _repetition(inner: AbstractContextManager[Any], storage: EventStorage | None) -> Iterator[None]:
    with inner, EventStorage(0 if storage is None else storage.iter):
        yield


def _operator(name: str) -> Any:
    """Return torch's operator of a name such as aten.mm or aten.mm.default."""
    namespace, _, rest = str(name).partition(".")
    operator, _, overload = rest.partition(".")
    try:
        return getattr(getattr(getattr(torch.ops, namespace), operator), overload or "default")
    except (AttributeError, RuntimeError) as error:
        raise wrong("save", name, "the name of an operator of torch, as aten.mm") from error
