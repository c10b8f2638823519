"""FSDP blocks: the modules that are sharded one by one, and whether a model can be sharded."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from distrain.checks import wrong
from distrain.errors import ConfigError

Block = tuple[str, nn.Module]


def find_blocks(
    module: nn.Module, blocks: Sequence[str] | None, *, key: str = "trainer.fsdp.blocks"
) -> list[Block]:
    """Return the modules that are gathered and freed one by one, with their names.

    A module that shares a parameter with one outside of it is no block: the rest of the model,
    which is sharded as one, holds both.

    Args:
        module: the model.
        blocks: names of classes, or patterns of module names such as "encoder.layer.*"; None takes
            the outermost modules whose class occurs twice or more in a ModuleList or Sequential.
        key: name of `blocks` in an error.

    Raises:
        ConfigError: no module has a name or matches a pattern.
    """
    if blocks is None:
        found = _repeated(module)
    else:
        parts = [*module.named_modules()][1:]
        found = [part for part in parts if any(_matches(word, *part) for word in blocks)]
        for word in blocks:
            if not any(_matches(word, *part) for part in found):
                expected = "a class or name of the model's modules; null takes the repeated ones"
                raise wrong(key, word, expected)
    owners = _num_owners(module)
    return [(name, part) for name, part in found if _num_owners(part).items() <= owners.items()]


def _matches(word: str, name: str, part: nn.Module) -> bool:
    is_named = type(part).__name__ == word or fnmatch.fnmatchcase(name, word)
    return is_named and _has_parameters(part)


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _repeated(module: nn.Module, prefix: str = "") -> list[Block]:
    found: list[Block] = []
    num = Counter(type(child) for child in module.children())
    for name, child in module.named_children():
        is_repeated = isinstance(module, nn.ModuleList | nn.Sequential) and num[type(child)] > 1
        is_container = isinstance(child, nn.ModuleList | nn.ModuleDict)  # they have no forward
        if is_repeated and not is_container and _has_parameters(child):
            found.append((prefix + name, child))
        else:
            found += _repeated(child, f"{prefix}{name}.")
    return found


def _num_owners(module: nn.Module) -> dict[nn.Parameter, int]:
    """Return the number of submodules that hold each parameter."""
    return Counter(
        p for part in module.modules() for p in part._parameters.values() if p is not None
    )


def check_shardable(module: nn.Module) -> None:
    """Raise ConfigError if a part of a model cannot be sharded."""
    for name, part in module.named_modules():
        is_sync = "SyncBatchNorm" in type(part).__name__
        if isinstance(part, _BatchNorm) and part.track_running_stats and not is_sync:
            raise ConfigError(
                f"trainer.strategy=fsdp: {name} is a BatchNorm with statistics per rank, which "
                "would differ between ranks; set trainer.sync_batchnorm=true"
            )
    for name, parameter in module.named_parameters():
        if not parameter.is_contiguous() or parameter.dim() == 0:
            raise ConfigError(
                f"trainer.strategy=fsdp: {name} has shape {[*parameter.shape]} and strides "
                f"{[*parameter.stride()]}; only contiguous parameters of a dimension or more can "
                "be sharded: use trainer.strategy=ddp"
            )
