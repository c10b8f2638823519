"""A transform: low-rank adapters (LoRA) on linear layers; everything else is frozen.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685::

    init: {weights: runs/pretrained}      # loaded before the transforms, by the model's own names
    transforms:
      lora: {_target_: examples.lora.add_adapters, match: "*.attention.*", rank: 8}
"""

from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn import functional


class LowRank(nn.Module):
    """`linear(x) + scale * up(down(x))`, where up starts at 0: the model is unchanged at first.

    Args:
        linear: the layer; its parameters are frozen.
        rank: width between down (rank, in) and up (out, rank).
        scale: factor of the adapter.
    """

    def __init__(self, linear: nn.Linear, *, rank: int, scale: float) -> None:
        super().__init__()
        self.linear, self.scale = linear, scale
        self.down = nn.Parameter(torch.randn(rank, linear.in_features) / rank)
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., out) for (..., in)."""
        adapted = functional.linear(functional.linear(x, self.down), self.up)
        return self.linear(x) + self.scale * adapted


def add_adapters(
    model: nn.Module, *, match: str = "*", rank: int = 8, scale: float = 2.0
) -> nn.Module:
    """Return the model, frozen, with an adapter on every linear layer whose name matches."""
    model.requires_grad_(False)
    names = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    matched = [name for name in names if fnmatchcase(name, match)]
    if not matched:
        raise ValueError(f"match={match}: expected a pattern of {', '.join(names)}")
    for name in matched:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        model.set_submodule(name, LowRank(linear, rank=rank, scale=scale))
    return model
