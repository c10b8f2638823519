"""Layer-wise decay of the learning rate: find the numbered layers and make a rule of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from distrain.checks import number, wrong
from distrain.optim.rules import Rule, Rules, parse

_NUMBERED = re.compile(r"(.*?)(\d+)")


def with_layer_decay(
    names: Mapping[str, nn.Parameter], rules: Rules, layer_decay: float | None, layers: str | None
) -> list[Rule]:
    """Return the rules, then one named `layer` that multiplies rates by depth.

    The rate of a parameter at depth d of L layers is multiplied by `layer_decay ** (L + 1 - d)`:
    parameters before the first layer have depth 0, the layers 1 ... L, the rest, such as the head,
    L + 1 (Clark et al. 2020, "ELECTRA", arXiv:2003.10555; Bao et al. 2021, "BEiT",
    arXiv:2106.08254). Example: 0.5 and two layers: 0.125 for the embedding, 0.25, 0.5, 1.

    Args:
        names: the parameters by their names in the model.
        rules: of the user.
        layer_decay: factor from one layer to the next; None adds no rule.
        layers: pattern of the layers' names, as "blocks.{}.*"; None finds it, see `find_layers`.

    Raises:
        ConfigError: the factor is out of range, or the model has no such layers.
    """
    parsed = parse(rules)
    if layer_decay is None:
        if layers is not None:
            raise wrong("layers", layers, "null without layer_decay; set layer_decay=0.75")
        return parsed
    decay = number("layer_decay", layer_decay, above=0.0)
    pattern = find_layers(names, decay) if layers is None else layers
    return [*parsed, *parse({"layer": {"layers": pattern, "layer_decay": decay}})]


def find_layers(names: Mapping[str, nn.Parameter], layer_decay: Any) -> str:
    """Return the pattern of the numbered modules that hold more than half of the weights.

    Of nested numbers the outermost count: stages before blocks. Examples: `blocks.{}.*`,
    `encoder.layers.encoder_layer_{}.*`, `layer{}.*` (a ResNet), `{}.*`.

    Raises:
        ConfigError: no modules do; names the numbered ones.
    """
    sizes: dict[str, int] = {}
    numbers: dict[str, set[str]] = {}
    for name, parameter in names.items():
        *parts, _ = name.split(".")  # the last one is the parameter's own
        for position, part in enumerate(parts):
            if found := _NUMBERED.fullmatch(part):
                pattern = ".".join([*parts[:position], found[1] + "{}", "*"])
                sizes[pattern] = sizes.get(pattern, 0) + parameter.numel()
                numbers.setdefault(pattern, set()).add(found[2])
    total = sum(parameter.numel() for parameter in names.values())
    candidates = [pattern for pattern in sizes if len(numbers[pattern]) > 1]
    most = [pattern for pattern in candidates if 2 * sizes[pattern] > total]
    if not most:
        largest = sorted(candidates, key=lambda pattern: -sizes[pattern])[:3]
        found_text = f" (found: {', '.join(largest)})" if largest else ""
        expected = f"a model with numbered layers that hold half of its weights{found_text}"
        raise wrong("layer_decay", layer_decay, f"{expected}; set optim.layers='blocks.{{}}.*'")
    return min(most, key=lambda pattern: pattern.count("."))
