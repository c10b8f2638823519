"""Matrix products in float8 by torchao."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from distrain.checks import one_of
from distrain.errors import ConfigError
from distrain.extras import optional_library
from distrain.transforms.blocks import linear_layers

_LEAST_CAPABILITY = (8, 9)  # Ada and Hopper have float8 tensor cores
_MULTIPLE = 16  # of a matrix's sizes


def train_in_float8(
    model: nn.Module,
    *,
    match: str | Sequence[str] = "*",
    recipe: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] = "tensorwise",
    emulate: bool = False,
) -> nn.Module:
    """Return the model, whose linear layers multiply in float8, forward and backward.

    By torchao's `convert_to_float8_training`; faster under `trainer.compile` or `compile_blocks`
    only. Weights, their names and their updates stay in their own precision. Layers whose sizes
    are no multiples of 16 stay as they are.

    Args:
        model: changed in place.
        match: name patterns of linear layers; leave out the head, as in language models.
        recipe: of the scales: one per tensor, or per row.
        emulate: in another precision on any device, to try it; slow.

    Raises:
        ConfigError: torchao is not installed, the device has no float8, or nothing matches.
    """
    one_of("recipe", recipe, ("tensorwise", "rowwise", "rowwise_with_gw_hp"))
    is_able = torch.cuda.is_available() and torch.cuda.get_device_capability() >= _LEAST_CAPABILITY
    if not is_able and not emulate:
        raise ConfigError(
            "this device cannot multiply in float8: expected a GPU of compute capability 8.9 or "
            "more; leave this transform out, as transforms.float8=null"
        )
    float8 = optional_library("torchao.float8", extra="jobs")
    names = {name for name, part in linear_layers(model, match) if _is_aligned(part)}
    config = replace(float8.Float8LinearConfig.from_recipe_name(recipe), emulate=emulate)

    def is_chosen(_: Any, name: str) -> bool:
        return name in names

    float8.convert_to_float8_training(model, module_filter_fn=is_chosen, config=config)
    return model


def _is_aligned(layer: nn.Linear) -> bool:
    return layer.in_features % _MULTIPLE == 0 and layer.out_features % _MULTIPLE == 0
