"""Low-rank adapters (LoRA) by peft."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from distrain.checks import did_you_mean, wrong
from distrain.extras import optional_library
from distrain.transforms.blocks import linear_layers


def add_lora(
    model: nn.Module,
    *,
    match: str | Sequence[str] = "*",
    rank: int = 8,
    alpha: int = 16,
    dropout: float = 0.0,
    train: Sequence[str] = (),
) -> nn.Module:
    """Return the model, frozen, with a low-rank adapter on each linear layer that matches.

    Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, by
    peft's `inject_adapter_in_model`. The output stays the same at first. Weights of the layers are
    named `LAYER.base_layer.weight` from now on, so `init.weights` is loaded before.

    Args:
        model: changed in place.
        match: name patterns of linear layers.
        rank: width of an adapter.
        alpha: the adapter's output is multiplied by alpha / rank.
        dropout: before the adapter.
        train: name patterns of other parameters that stay trainable, as ["head.*"].

    Raises:
        ConfigError: peft is not installed, or a pattern matches nothing.
    """
    peft = optional_library("peft", extra="jobs")
    names = [name for name, _ in linear_layers(model, match)]
    parameters = dict(model.named_parameters())
    for pattern in train:
        if not any(fnmatchcase(name, pattern) for name in parameters):
            hint = did_you_mean(pattern, parameters)
            raise wrong("train", pattern, f"a pattern of the names of parameters; {hint}")
    config = peft.LoraConfig(
        target_modules="|".join(map(re.escape, names)),
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
    )
    peft.inject_adapter_in_model(config, model)
    for name, parameter in parameters.items():
        parameter.requires_grad_(any(fnmatchcase(name, pattern) for pattern in train))
    return model
