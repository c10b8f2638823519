"""Which parts of a model are sharded one by one, and whether it can be sharded at all."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from distrain.errors import ConfigError

Block = tuple[str, nn.Module]


def find_blocks(module: nn.Module, blocks: Sequence[str] | None) -> list[Block]:
    """Return the modules that are gathered and freed one by one, by name; the rest is one more.

    A module that shares a parameter with one outside of it is left to the rest, where the two stay
    one.

    Args:
        module: the model.
        blocks: names of classes, or patterns of module names such as "encoder.layer.*"; None takes
            the outermost modules whose class occurs twice or more in a ModuleList or Sequential.

    Raises:
        ConfigError: a name or pattern has no module.
    """
    if blocks is None:
        found = _repeated(module)
    else:
        found = []
        for name, part in module.named_modules():
            if name and any(_is_named(word, name, part) for word in blocks):
                found.append((name, part))
        for word in blocks:
            if not any(_is_named(word, name, part) for name, part in found):
                raise ConfigError(
                    f"trainer.fsdp.blocks: {word!r} is no class or name of the model's modules; "
                    "null takes the repeated ones"
                )
    owners = _owners(module)
    return [(name, part) for name, part in found if _owners(part).items() <= owners.items()]


def _is_named(word: str, name: str, part: nn.Module) -> bool:
    has_parameters = next(part.parameters(), None) is not None
    return has_parameters and (type(part).__name__ == word or fnmatch.fnmatchcase(name, word))


def _repeated(module: nn.Module, prefix: str = "") -> list[Block]:
    found: list[Block] = []
    kinds = Counter(type(child) for child in module.children())
    for name, child in module.named_children():
        is_repeated = isinstance(module, nn.ModuleList | nn.Sequential) and kinds[type(child)] > 1
        is_container = isinstance(child, nn.ModuleList | nn.ModuleDict)  # they have no forward
        if is_repeated and not is_container and next(child.parameters(), None) is not None:
            found.append((prefix + name, child))
        else:
            found += _repeated(child, f"{prefix}{name}.")
    return found


def _owners(module: nn.Module) -> dict[nn.Parameter, int]:
    """Return in how many places each parameter of a module is."""
    return Counter(
        p for part in module.modules() for p in part._parameters.values() if p is not None
    )


def check_shardable(module: nn.Module) -> None:
    """Raise ConfigError for the first part of a model that cannot be sharded."""
    for name, part in module.named_modules():
        is_sync = "SyncBatchNorm" in type(part).__name__
        if isinstance(part, _BatchNorm) and part.track_running_stats and not is_sync:
            raise ConfigError(
                f"trainer.strategy=fsdp: {name} is a BatchNorm of its rank alone, whose statistics "
                "nobody keeps equal; set trainer.sync_batchnorm=true"
            )
    for name, parameter in module.named_parameters():
        if not parameter.is_contiguous() or parameter.dim() == 0:
            raise ConfigError(
                f"trainer.strategy=fsdp: {name} has shape {[*parameter.shape]} and strides "
                f"{[*parameter.stride()]}; only contiguous parameters of a dimension or more can "
                "be sharded: use trainer.strategy=ddp"
            )
