"""Regional compilation: torch.compile of a model's blocks one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from distrain.transforms.blocks import outermost_blocks


def compile_blocks(
    model: nn.Module, *, blocks: str | Sequence[str] | None = None, **options: Any
) -> nn.Module:
    """Return the model, whose blocks run through torch.compile.

    Blocks of one class share the compiled code, so it takes seconds where the whole model
    (`trainer.compile`) takes minutes. Names of parameters stay.

    Args:
        model: changed in place.
        blocks: class names or name patterns of modules, ConfigError if none matches; None: the
            repeated ones.
        options: keywords of torch.compile, as mode="max-autotune" or dynamic=False.
    """
    for _, block in outermost_blocks(model, blocks):
        block.compile(**options)
    return model
