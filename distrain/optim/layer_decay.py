"""Layer-wise decay of the learning rate by one key: the layers are found by their numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from distrain.checks import number
from distrain.errors import ConfigError
from distrain.optim.rules import Rule, Rules, parse

_NUMBERED = re.compile(r"(.*?)(\d+)")


def with_layer_decay(
    names: Mapping[str, nn.Parameter], rules: Rules, layer_decay: float | None, layers: str | None
) -> list[Rule]:
    """Return the rules, and behind them one named `layer` that multiplies rates by depth.

    The rate of a parameter at depth d of L layers is multiplied by `layer_decay ** (L + 1 - d)`:
    what the model names before its first layer has depth 0, the layers 1 ... L, the rest, such as
    the head, L + 1 (Clark et al. 2020, "ELECTRA", arXiv:2003.10555; Bao et al. 2021, "BEiT",
    arXiv:2106.08254). Example: 0.5 and two layers: 0.125 for the embedding, 0.25, 0.5, 1.

    Args:
        names: the parameters by the names that the model gives them.
        rules: of the user.
        layer_decay: factor from one layer to the next; None adds no rule.
        layers: how layers are named, as "blocks.{}.*"; None finds it, see `find_layers`.

    Raises:
        ConfigError: the factor is out of range, or there are no such layers.
    """
    parsed = parse(rules)
    if layer_decay is None:
        if layers is not None:
            raise ConfigError(f"layers={layers!r} numbers them for layer_decay, which is not set")
        return parsed
    decay = number("layer_decay", layer_decay, above=0.0)
    pattern = find_layers(names, decay) if layers is None else layers
    return [*parsed, *parse({"layer": {"layers": pattern, "layer_decay": decay}})]


def find_layers(names: Mapping[str, nn.Parameter], layer_decay: Any) -> str:
    """Return the pattern of the modules that are numbered and hold more than half of the weights.

    Where numbers are inside numbers the outermost count, stages before blocks. Examples:
    `blocks.{}.*`, `encoder.layers.encoder_layer_{}.*`, `layer{}.*` (a ResNet), `{}.*`.

    Args:
        names: the parameters by name.
        layer_decay: for the error.

    Raises:
        ConfigError: no modules do; names those that are numbered.
    """
    sizes: dict[str, int] = {}
    numbers: dict[str, set[str]] = {}
    for name, parameter in names.items():
        parts = name.split(".")
        for position, part in enumerate(parts[:-1]):  # the last one is the parameter's own
            found = _NUMBERED.fullmatch(part)
            if found:
                pattern = ".".join([*parts[:position], found[1] + "{}", "*"])
                sizes[pattern] = sizes.get(pattern, 0) + parameter.numel()
                numbers.setdefault(pattern, set()).add(found[2])
    total = sum(parameter.numel() for parameter in names.values())
    candidates = [pattern for pattern in sizes if len(numbers[pattern]) > 1]
    most = [pattern for pattern in candidates if 2 * sizes[pattern] > total]
    if not most:
        largest = sorted(candidates, key=lambda pattern: -sizes[pattern])[:3]
        known = f"; there are {', '.join(largest)}" if largest else ""
        raise ConfigError(
            f"layer_decay={layer_decay}: no numbered layers hold half of the model's weights{known}"
            "; say which are meant: optim.layers='blocks.{}.*'"
        )
    return min(most, key=lambda pattern: pattern.count("."))
