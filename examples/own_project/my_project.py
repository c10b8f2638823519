"""A data set, a model and a hook of your own: points on three spirals, told apart by a net."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from distrain import HookBase, Trainer

ARMS = 3


class Spirals(Dataset[tuple[Tensor, Tensor]]):
    """Points (2,) of the plane on three spiral arms, and the number of their arm ()."""

    def __init__(self, *, points: int, seed: int, noise: float = 0.02) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.arms = torch.arange(points) % ARMS  # (N,)
        radius = torch.rand(points, generator=generator).sqrt()
        angle = 9 * radius + 2 * math.pi / ARMS * self.arms
        self.points = radius[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)  # (N, 2)
        self.points += noise * torch.randn(points, 2, generator=generator)

    def __len__(self) -> int:
        return len(self.arms)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.points[index], self.arms[index]


class SpiralNet(nn.Module):
    """Two hidden layers. `forward` gets a batch of what the data set gives, returns the loss."""

    def __init__(self, *, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2, width),
            nn.LayerNorm(width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.LayerNorm(width),
            nn.GELU(),
            nn.Linear(width, ARMS),
        )

    def forward(self, points: Tensor, arms: Tensor) -> Tensor:  # (B, 2), (B,) -> ()
        return functional.cross_entropy(self.layers(points), arms)

    def metrics(self, points: Tensor, arms: Tensor) -> dict[str, Tensor]:
        """Return one value a sample (B,); their means appear as `eval/accuracy`."""
        return {"accuracy": (self.layers(points).argmax(dim=1) == arms).float()}


class DecisionMap(HookBase):
    """Every `period` iterations, shows in TensorBoard which arm the model sees where."""

    ranks = "main"  # it only looks, so one rank is enough
    trainer: Trainer

    def __init__(self, *, period: int, side: int = 96) -> None:
        self.period = period
        axis = torch.linspace(-1.1, 1.1, side)
        self.grid = torch.cartesian_prod(axis, axis)  # (side * side, 2)
        self.side = side

    def after_step(self) -> None:
        if (self.trainer.iter + 1) % self.period:
            return
        model = self.trainer.module  # the model itself, without what data-parallel training adds
        with torch.no_grad():
            scores = model.layers(self.grid.to(self.trainer.device))  # (side * side, 3)
        colors = scores.softmax(dim=1).T.unflatten(1, (self.side, self.side))  # one color an arm
        self.trainer.storage.put_image("decision_map", colors)
