"""Blocks of a model: the modules that a transform changes one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from torch import nn

from distrain.checks import did_you_mean, wrong
from distrain.distributed.fsdp_blocks import Block, find_blocks


def outermost_blocks(model: nn.Module, blocks: str | Sequence[str] | None) -> list[Block]:
    """Return the outermost modules that match, with their names; ConfigError if none does.

    Args:
        model: the model.
        blocks: class names or name patterns, see `fsdp_blocks.find_blocks`; None: those repeated.
    """
    words = [blocks] if isinstance(blocks, str) else blocks
    found = find_blocks(model, words, key="blocks")
    if not found:
        raise wrong("blocks", blocks, "a model with repeated modules; give classes or names")
    names = [f"{name}." for name, _ in found]
    return [block for block in found if not any(block[0].startswith(name) for name in names)]


def linear_layers(model: nn.Module, match: str | Sequence[str]) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the linear layers whose names match a pattern; ConfigError if none does."""
    patterns = [match] if isinstance(match, str) else match
    layers = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    matched = [name for name in layers if any(fnmatchcase(name, p) for p in patterns)]
    if not matched:
        hint = did_you_mean(str(patterns[0]), layers)
        raise wrong("match", match, f"a pattern of the names of linear layers; {hint}")
    for name in matched:
        yield name, layers[name]
